"""Configuration files of several models compared: which fields make another network of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_core.compatibility.companions import Companions, agree, documents_of
from merge_core.compatibility.config_fields import (
    CLASS_DECIDES,
    DEFAULTS,
    DERIVED,
    EPS_FIELDS,
    MODEL_TYPES,
    RULES,
    SILENT,
    Rule,
)
from merge_core.compatibility.config_values import (
    Fields,
    align_parts,
    align_types,
    are_equal,
    class_defaults,
    flatten,
)
from merge_core.compatibility.findings import (
    Finding,
    name_members,
    shorten,
    sort_members,
    tell_values,
)

MODEL_CONFIG = "config.json"
GENERATION = "generation_config.json"
CONFIG_FILES = (
    MODEL_CONFIG,
    "open_clip_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "processor_config.json",
)
# In files of networks an absent field has a meaning; in those of inputs it says nothing.
WITH_DEFAULTS = CONFIG_FILES[:2]
MOST_FIELDS = 2000
MOST_NOTED = 8
SMALL_EPS = 1e-5
FEW_TIMES = 10
ANOTHER = Rule("refused", "another architecture")
OTHER_POSITIONS = Rule("refused", "there are other positions for the same rows")
SMALL = Rule("warned", "norms divide by a slightly different number")
UNREAD = "damaged, too large or out of reach: not compared"
NOTED = Rule("noted", "no other function of the weights")
# timm: resolution and source of the weights, which change no layer.
TIMM_ENDINGS = re.compile(r"(\.[\w-]+|_in2[12]k|_in1k|_\d{3})+$")


def compare_configs(members: Mapping[str, Companions]) -> list[Finding]:
    """What the configurations of models and of their inputs say of one another.

    Args:
        members: files beside each member's weights.
    """
    found = []
    for file in CONFIG_FILES:
        if agree(members, (file,)):
            continue
        documents = dict(documents_of(members, file))
        found += compare_documents(file, documents)
        unread = [m for m, files in members.items() if m not in documents and files.digest(file)]
        if unread:
            values = f"cannot be read in {name_members(sort_members(unread))}"
            found.append(Finding("warned", file, "the whole file", values, UNREAD))
    return found


def compare_documents(file: str, documents: Mapping[str, dict[str, Any]]) -> list[Finding]:
    """Findings of one file.

    Args:
        file: its name; what is absent from a model's ``config.json`` has the library's default.
        documents: its content by member; the order of members does not count.

    Example:
        >>> files = {"a": {"hidden_act": "gelu"}, "b": {"hidden_act": "relu"}}
        >>> print(compare_documents("config.json", files)[0].sentence)
        hidden_act of config.json differs (gelu in a; relu in b): another nonlinearity
    """
    if len(documents) < 2:
        return []
    aligned = align_parts(align_types(documents))
    fields = {member: flatten(aligned[member]) for member in sort_members(aligned)}
    every = set().union(*fields.values())
    names = sorted(every, key=lambda name: (_leaf(name) not in RULES, name))[:MOST_FIELDS]
    found, noted = [], []
    for name in names:
        said = _resolve(name, fields, file in WITH_DEFAULTS)
        rule = _judge(name, said, fields)
        if rule is None:
            continue
        if rule.level == "noted":
            noted.append(shorten(name))
            continue
        shown = {member: value.shown for member, value in said.items()}
        lacking = {member: "nothing said" for member in fields if member not in said}
        values = tell_values(shown | lacking)
        found.append(Finding(rule.level, file, shorten(name), values, rule.meaning))
    if noted:
        more = f" and {len(noted) - MOST_NOTED} more" if len(noted) > MOST_NOTED else ""
        listed = ", ".join(noted[:MOST_NOTED]) + more
        found.append(Finding("noted", file, listed, "", NOTED.meaning))
    return found


@dataclass(frozen=True)
class _Value:
    """What a field is in one configuration, and whether the file says so itself."""

    value: Any
    is_default: bool = False

    @property
    def shown(self) -> str:
        return shorten(self.value) + (" by default" if self.is_default else "")


def _leaf(name: str) -> str:
    """The last part of a field's path, without the type of layers that it is for."""
    return re.sub(r"\[.*\]$", "", name.rpartition(".")[2])


def _resolve(name: str, fields: Mapping[str, Fields], with_defaults: bool) -> dict[str, _Value]:
    """A field's value by member, the library's default where it is absent and that is known."""
    leaf = _leaf(name)
    said = {member: _Value(own[name]) for member, own in fields.items() if name in own}
    if leaf in DERIVED or leaf not in RULES or not with_defaults:
        return said
    usual = DEFAULTS.get(leaf)
    is_usual = leaf in DEFAULTS and all(are_equal(leaf, v.value, usual) for v in said.values())
    for member, own in fields.items():
        if name in own:
            continue
        if is_usual and leaf not in CLASS_DECIDES:
            said[member] = _Value(usual, True)
        elif (found := _class_default(name, own)) is not None:
            said[member] = found
        elif leaf in DEFAULTS:
            said[member] = _Value(usual, True)
    return said


def _class_default(name: str, own: Fields) -> _Value | None:
    """What the library's class takes for an absent field; of a part, also the part's own class."""
    parts = name.split(".")
    for depth in range(len(parts)):
        kind = own.get(".".join([*parts[:depth], "model_type"]))
        defaults = class_defaults(kind) if isinstance(kind, str) else {}
        path = ".".join(parts[depth:])
        if path in defaults:
            return _Value(defaults[path], True)
    return None


def _judge(name: str, said: Mapping[str, _Value], fields: Mapping[str, Fields]) -> Rule | None:
    """What a field's values mean; None where they are one, or say nothing."""
    leaf = _leaf(name)
    if leaf in SILENT:
        return None
    rule = _rule_of_differing(name, leaf, [each.value for each in said.values()], fields)
    if rule is None and len(said) < len(fields) and leaf not in DERIVED:
        return NOTED if any(each.value is not None for each in said.values()) else None
    return rule


def _rule_of_differing(
    name: str, leaf: str, values: Sequence[Any], fields: Mapping[str, Fields]
) -> Rule | None:
    """What it means that a field has these values; None where they are all one."""
    if leaf == "model_type":
        values = [MODEL_TYPES.get(v, v) if isinstance(v, str) else v for v in values]
    if all(are_equal(leaf, values[0], value) for value in values[1:]):
        return None
    if leaf == "model_type":
        return ANOTHER
    if leaf == "architecture":
        cores = {TIMM_ENDINGS.sub("", value) if isinstance(value, str) else "" for value in values}
        return ANOTHER if len(cores) > 1 else NOTED
    if leaf in EPS_FIELDS and _are_small(values):
        return SMALL
    if leaf == "image_size":
        prefix = name.removesuffix(leaf)
        # A table of positions has a row for each patch; shifted windows have no such table.
        with_patches = any(f"{prefix}patch_size" in own for own in fields.values())
        if with_patches and not any(f"{prefix}window_size" in own for own in fields.values()):
            return OTHER_POSITIONS
    return RULES.get(leaf, NOTED)


def _are_small(values: Sequence[Any]) -> bool:
    """Whether these ε are so small that variances of activations hide which of them is added.

    At variances about 1e-3 and above, as residual streams have, 1e-5 changes a norm's output by
    at most half a percent.
    """
    if not all(isinstance(value, float | int) for value in values):
        return False
    return 0 < max(values) <= SMALL_EPS * 1.001 and max(values) <= FEW_TIMES * 1.001 * min(values)


def compare_generation(members: Mapping[str, Companions]) -> list[Finding]:
    """What ``generation_config.json`` says: with which tokens texts begin and end.

    How texts are sampled is noted.
    """
    if agree(members, (GENERATION,)):
        return []
    documents = dict(documents_of(members, GENERATION))
    names = set().union(*documents.values()) if documents else set()
    tokens = {name for name in names if name.endswith(("token_id", "token_ids", "_tokens"))}
    whole = {
        member: dict.fromkeys(tokens) | document  # an absent token is none
        for member, document in documents.items()
    }
    return compare_documents(GENERATION, whole)
