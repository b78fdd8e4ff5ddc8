"""Special tokens, chat templates and settings of tokenizers compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_core.compatibility.companions import Companions, agree
from merge_core.compatibility.config_values import normalise
from merge_core.compatibility.configs import compare_documents
from merge_core.compatibility.findings import Finding, group_members, name_members
from merge_core.files import digest_of

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
SPECIAL = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens"),
)
# Which tokens there are is told by the vocabulary, and templates are compared for themselves.
ELSEWHERE = frozenset({"added_tokens_decoder", "chat_template", "vocab_file", "merges_file"})
# Classes that cut texts alike carry several names.
NAMES = frozenset({"tokenizer_class", "tokenizer_file", "special_tokens_map_file", "backend"})


def compare_settings(members: Mapping[str, Companions]) -> list[Finding]:
    """What tokenizers' settings say: special tokens, lower case, what is added before and after.

    Args:
        members: files beside each member's weights.
    """
    if agree(members, SETTINGS):
        return []
    documents = {member: settings(files) for member, files in members.items()}
    return compare_documents(SETTINGS[0], {m: d for m, d in documents.items() if d})


def settings(files: Companions) -> dict[str, Any]:
    """A tokenizer's settings, special tokens by their text and none where they are not set."""
    found = files.document(SETTINGS[0]) or {}
    special = files.document(SETTINGS[1]) or {}
    if not found and not special:
        return {}
    plain = {n: v for n, v in found.items() if n not in ELSEWHERE and n not in NAMES}
    tokens = {name: _texts(found.get(name) or special.get(name)) for name in SPECIAL}
    return {**plain, **tokens}


def _texts(value: object) -> object:
    """A special token, or several, as text."""
    if isinstance(value, list):
        return [normalise("", item) for item in value] or None
    return normalise("", value)


def chat_template(files: Companions) -> str | None:
    """The template by which chats become text: of its own file first, as transformers reads it."""
    text = files.text("chat_template.jinja")
    if text is not None:
        return text
    for name in TEMPLATE_FILES[1:]:
        value = (files.document(name) or {}).get("chat_template")
        if isinstance(value, str):
            return value
        for item in value if isinstance(value, list) else []:
            if isinstance(item, dict) and item.get("name") == "default":
                return str(item.get("template"))
    return None


def compare_templates(members: Mapping[str, Companions]) -> list[Finding]:
    """Whether all members that have a tokenizer read chats by one template."""
    if agree(members, TEMPLATE_FILES):
        return []
    templates = {
        member: (chat_template(files) or "").strip()
        for member, files in members.items()
        if any(files.vocabulary_key) or any(files.digest(name) for name in TEMPLATE_FILES)
    }
    digests = {member: digest_of(text) if text else "" for member, text in templates.items()}
    groups = group_members(digests)
    if len(groups) < 2:
        return []
    said = []
    for number, (_, who) in enumerate((g for g in groups if g[0]), 1):
        length = len(templates[who[0]])
        said.append(f"template {number} ({length:,} characters) in {name_members(who)}")
    said += [f"none in {name_members(who)}" for digest, who in groups if not digest]
    meaning = "chats become other texts: the output has one member's template"
    return [Finding("warned", "chat template", "chat_template", "; ".join(said), meaning)]
