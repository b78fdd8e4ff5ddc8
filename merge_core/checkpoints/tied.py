"""Tensors with several names: merged once, and written under the names that the input has.

A pickle keeps both names over one storage. Safetensors files hold one of the names, both with
equal values, or both with values that differ: then they are two tensors, whatever ``config.json``
says, and transformers 5 reads them so. Which of these a file holds is told from its values.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar
from weakref import WeakKeyDictionary

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.parameter_roles import VOCABULARY, describe
from merge_core.checkpoints.side_files import read_description
from merge_core.errors import HubError

Names = tuple[str, ...]
Key = TypeVar("Key", bound=Hashable)

# A checkpoint's files do not change while it is open, so its values are compared once.
_known: WeakKeyDictionary[Checkpoint, tuple[Names, ...]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Tie:
    """One tensor of a merge that has several names.

    Attributes:
        merged: the name that is merged, an embedding's where one is among them.
        also_written: the other names that the reference's files have.
        names: all of them.
    """

    merged: str
    also_written: Names
    names: frozenset[str]


def ties(model: Checkpoint) -> tuple[Names, ...]:
    """Sets of names under which a model keeps one tensor.

    They are told from a pickle's storages, and by comparing embeddings and language heads of one
    shape, entry by entry until two differ. Of a model that is known by its headers alone, from
    storages and aliases only.

    Args:
        model: a checkpoint.

    Raises:
        CheckpointError: unreadable.
    """
    if model not in _known:
        stored = _join({frozenset(names) for names in model.ties})
        found = _join({*stored, *_equal_vocabularies(model, stored)})
        _known[model] = tuple(sorted(tuple(sorted(names)) for names in found))
    return _known[model]


def declares_tied(model: Checkpoint) -> bool | None:
    """Whether ``config.json`` beside a model says that its head is its embedding.

    Returns:
        None where there is no such file, or it does not say.
    """
    if not model.files:  # headers of a model on the hub, say
        return None
    document = read_description(model.files[0].parent / "config.json")
    if not isinstance(document, dict):
        return None
    parts = (document, document.get("text_config"), document.get("decoder"))
    said = [part.get("tie_word_embeddings") for part in parts if isinstance(part, dict)]
    return next((word for word in said if isinstance(word, bool)), None)


def with_aliases(
    members: Mapping[Key, Checkpoint], others: Sequence[Checkpoint] = ()
) -> dict[Key, Checkpoint]:
    """Members that hold a tied tensor once, given the other names that it has in other members.

    Of a name that a member lacks and another has, its own tensor is the same one where its
    safetensors header says so (as ``safetensors.torch.save_model`` writes it), where its
    config.json declares the head tied, or, where that says nothing, where all members that hold
    both names tie them.

    Args:
        members: whole models of a suite, under names that mean the same in each.
        others: its adapters, whose names and ties count as well.

    Returns:
        The members, each with aliases where it has some.

    Raises:
        CheckpointError: unreadable.
    """
    models = [*members.values(), *others]
    every = sorted(set().union(*models))
    found = {}
    for key, model in members.items():
        aliased = model
        for name in every:
            if name not in model:
                own = _own_name(name, model, [other for other in models if name in other])
                if own is not None:
                    aliased = aliased.with_alias(name, own)
        found[key] = aliased
    return found


def tied_tensors(reference: Checkpoint, members: Sequence[Checkpoint]) -> list[Tie]:
    """The tensors with several names that are one in every member.

    Args:
        reference: the member whose names are written.
        members: all members, with aliases.

    Raises:
        CheckpointError: unreadable.
    """
    known = [ties(member) for member in members]
    found = []
    for names in _join({frozenset(group) for groups in known for group in groups}):
        held = [name for name in sorted(names) if all(name in member for member in members)]
        while held:
            first = held[0]
            one = [name for name in held if all(_are_tied(first, name, own) for own in known)]
            if len(one) > 1:
                found.append(_tie(one, reference))
            held = [name for name in held if name not in one]
    return found


def _tie(names: Sequence[str], reference: Checkpoint) -> Tie:
    def place(name: str) -> tuple[bool, bool, str]:
        kind = describe(name, reference.info(name)).kind
        return name in reference.aliases, kind != "token embedding", name

    first, *others = sorted(names, key=place)
    written = tuple(sorted(name for name in others if name not in reference.aliases))
    return Tie(first, written, frozenset(names))


def _are_tied(first: str, second: str, groups: Sequence[Names]) -> bool:
    return first == second or any(first in names and second in names for names in groups)


def _own_name(name: str, model: Checkpoint, others: Sequence[Checkpoint]) -> str | None:
    """Under which name a model holds the tensor that others hold under a name that it lacks."""
    told = model.metadata.get(name)
    if told is not None and told in model:
        return told
    info = others[0].info(name)
    partners = [
        {n for names in ties(other) if name in names for n in names if n in model}
        for other in others
    ]
    kind = describe(name, info).kind
    declared = declares_tied(model) if kind in VOCABULARY else None
    if declared is False:
        return None
    if declared is None:
        shared = set.intersection(*partners)
        return min(shared) if shared else None
    other_kind = VOCABULARY[1 - VOCABULARY.index(kind)]
    alike = {
        n
        for n in model
        if describe(n, model.info(n)).kind == other_kind
        and model.info(n).shape[1:] == info.shape[1:]
        and len(info.shape) > 1
    }
    candidates = sorted(set().union(*partners) or alike)
    one_tensor = all(_are_tied(candidates[0], each, ties(model)) for each in candidates)
    return candidates[0] if candidates and one_tensor else None


def _equal_vocabularies(model: Checkpoint, known: Sequence[frozenset[str]]) -> list[frozenset[str]]:
    """Pairs of embeddings and language heads that hold the same values."""
    alike: dict[object, list[str]] = {}
    for name in model:
        info = model.info(name)
        if describe(name, info).kind in VOCABULARY:
            alike.setdefault(info, []).append(name)
    pairs = (pair for names in alike.values() for pair in combinations(names, 2))
    try:
        return [
            frozenset(pair)
            for pair in pairs
            if not any(known_names.issuperset(pair) for known_names in known)
            and model.are_equal(*pair)
        ]
    except HubError:  # headers alone
        return []


def _join(sets: set[frozenset[str]]) -> list[frozenset[str]]:
    """Join sets that have a name in common."""
    joined: list[frozenset[str]] = []
    for names in sets:
        overlapping = [other for other in joined if other & names]
        joined = [other for other in joined if not other & names]
        joined.append(names.union(*overlapping))
    return joined
