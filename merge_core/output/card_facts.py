"""What a model card says of the models that were merged: library, licence, task, heads.

Cards of members are texts of strangers: a field is taken if it has the form that the hub gives it,
and left out otherwise. Source: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from merge_core.checkpoints.side_files import describes_model, read_description
from merge_core.output.layout import OPEN_CLIP_CONFIG, folder_of
from merge_core.suites.suite import Suite
from merge_core.yaml_text import load_yaml

CARD = "README.md"
CARD_CHARACTERS = 1_000_000
_FRONT = re.compile(r"\A\ufeff?\s*---[ \t]*\n(.*?)\n---[ \t]*(\n|\Z)", re.DOTALL)
_FORMS = {
    "license": re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}"),
    "license_name": re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,80}"),
    "license_link": re.compile(
        r"https://[A-Za-z0-9][A-Za-z0-9./%_~+-]{0,300}|LICEN[CS]E[A-Z.a-z]*"
    ),
    "pipeline_tag": re.compile(r"[a-z0-9]+(-[a-z0-9]+){0,8}"),
    "library_name": re.compile("transformers|timm|open_clip|sentence-transformers"),
}
_FOLDER = re.compile(r"[A-Za-z0-9_]{1,60}")
MODULE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
LICENCE = ("license", "license_name", "license_link")
BASE = "(base)"


@dataclass(frozen=True)
class CardFacts:
    """What the members say of themselves.

    Attributes:
        library: that opens the merged model.
        pipeline_tag: the hub's name of what it does: the base's, else what the experts agree on.
        licence: fields of the licence on which all members that state one agree; else none.
        licences: what each member states, where they do not agree.
        heads: names of heads that each task keeps, which the merge does not hold.
        modules: folders of sentence-transformers' modules with weights of their own.
    """

    library: str | None = None
    pipeline_tag: str | None = None
    licence: Mapping[str, str] = field(default_factory=dict)
    licences: Mapping[str, str] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


def card_facts(suite: Suite, tasks: Sequence[str]) -> CardFacts:
    """What the chosen members of a suite say of themselves.

    Raises:
        CheckpointError: a member cannot be opened.
    """
    manifest = suite.manifest(tasks)
    members = {task: suite.expert(task) for task in tasks}
    if suite.base is not None:
        members = {BASE: suite.base, **members}
    told = {name: read_card(folder_of(member)) for name, member in members.items()}
    licences = {name: _licence(card) for name, card in told.items() if "license" in card}
    first = next(iter(licences.values()), {})
    agree = all(each == first for each in licences.values())
    folders = [folder_of(member) for member in members.values()]
    described = next((folder for folder in folders if describes_model(folder)), None)
    return CardFacts(
        library=_library(described) or _of_network(suite) or _agreed("library_name", told),
        pipeline_tag=_agreed("pipeline_tag", told),
        licence=first if agree else {},
        licences={} if agree else {name: each["license"] for name, each in licences.items()},
        heads=tuple(sorted({d.parameter for d in manifest.differences if d.kind == "head"})),
        modules=_weighted_modules(described),
    )


def read_card(folder: Path) -> dict[str, str]:
    """The fields of a model's card that have the hub's form; none where there is no card."""
    document: Any = None
    with suppress(OSError, ValueError, yaml.YAMLError):
        path = folder / CARD
        if path.is_file():
            with path.open(encoding="utf-8") as stream:
                front = _FRONT.match(stream.read(CARD_CHARACTERS))
            document = load_yaml(front[1]) if front else None
    if not isinstance(document, dict):
        return {}
    found = {name: _single(document.get(name)) for name in _FORMS}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, str) and _FORMS[name].fullmatch(value)
    }


def _agreed(name: str, told: Mapping[str, Mapping[str, str]]) -> str | None:
    """A field as the base's card has it, else as all cards that have it do."""
    values = {card[name] for card in told.values() if name in card}
    return told.get(BASE, {}).get(name) or (values.pop() if len(values) == 1 else None)


def _single(value: Any) -> Any:
    """A value, or the one that a list holds."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _licence(card: Mapping[str, str]) -> dict[str, str]:
    return {name: card[name] for name in LICENCE if name in card}


def _library(folder: Path | None) -> str | None:
    """The library whose layout a folder has."""
    if folder is None:
        return None
    config = read_description(folder / "config.json")
    if (folder / "modules.json").is_file():
        return "sentence-transformers"
    if isinstance(config, dict) and "model_type" in config:
        return "transformers"
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return "open_clip"
    return "timm" if isinstance(config, dict) and "architecture" in config else None


def _of_network(suite: Suite) -> str | None:
    return suite.architecture.library if suite.architecture else None


def _weighted_modules(folder: Path | None) -> tuple[str, ...]:
    """Folders of modules (``2_Dense``) whose weights lie apart from the network's."""
    listed = None if folder is None else read_description(folder / "modules.json")
    if folder is None or not isinstance(listed, list):
        return ()
    paths = [entry.get("path") for entry in listed if isinstance(entry, dict)]
    names = [path for path in paths if isinstance(path, str) and _FOLDER.fullmatch(path)]
    return tuple(
        name for name in names if any((folder / name / file).is_file() for file in MODULE_WEIGHTS)
    )
