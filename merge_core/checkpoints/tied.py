"""Tensors with several names: merged once, and written under the names that the input has.

A pickle keeps both names over one storage. Safetensors files of transformers keep one of them,
or both where ``tie_word_embeddings`` of ``config.json`` says that they are one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.parameter_roles import describe

CONFIG_BYTES = 10_000_000


def ties(model: Checkpoint) -> tuple[tuple[str, ...], ...]:
    """Sets of names under which a model keeps one tensor, told from its headers.

    Args:
        model: a checkpoint; beside its first file may lie a ``config.json``.
    """
    found = {frozenset(names) for names in model.ties}
    if declares_tied(model):
        kinds = {name: describe(name, model.info(name)).kind for name in model}
        heads = [n for n, kind in kinds.items() if kind == "language head" and _is_weight(n)]
        for name, kind in kinds.items():
            if kind == "token embedding":
                alike = {h for h in heads if model.info(h).shape == model.info(name).shape}
                if alike:
                    found.add(frozenset({name, *alike}))
    return tuple(sorted(tuple(sorted(names)) for names in _join(found)))


def declares_tied(model: Checkpoint) -> bool:
    """Whether ``config.json`` beside a model says that its head is its embedding."""
    if not model.files:  # headers of a model on the hub, say
        return False
    path = model.files[0].parent / "config.json"
    try:
        if not path.is_file() or path.stat().st_size > CONFIG_BYTES:
            return False
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # no description of a model
        return False
    return isinstance(document, dict) and document.get("tie_word_embeddings") is True


def tied_names(reference: Checkpoint, members: Sequence[Checkpoint]) -> dict[str, tuple[str, ...]]:
    """Further names of tensors of the reference that every member ties, or keeps once.

    Args:
        reference: the member whose names are written.
        members: all members.

    Returns:
        By the name that is merged (an embedding's, where one is among them), the other names.
    """
    tied = ties(reference)
    if not tied:
        return {}
    known = [{name: names for names in ties(m) for name in names} for m in members]

    def place(name: str) -> tuple[bool, str]:
        return describe(name, reference.info(name)).kind != "token embedding", name

    found = {}
    for names in tied:
        in_all = [name for name in names if all(name in member for member in members)]
        if not in_all:
            continue
        first = min(in_all, key=place)
        others = tuple(
            name
            for name in names
            if name != first
            and all(
                name not in member or first in own.get(name, ())
                for member, own in zip(members, known, strict=True)
            )
        )
        if others:
            found[first] = others
    return found


def _is_weight(name: str) -> bool:
    return name.endswith("weight")


def _join(sets: set[frozenset[str]]) -> list[frozenset[str]]:
    """Join sets that have a name in common."""
    joined: list[frozenset[str]] = []
    for names in sets:
        overlapping = [other for other in joined if other & names]
        joined = [other for other in joined if not other & names]
        joined.append(names.union(*overlapping))
    return joined
