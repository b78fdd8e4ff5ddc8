"""Prefixes that the names of some members of a suite lack, such as ``bert.`` or ``transformer.``.

A library saves the backbone alone (``BertModel``) without the prefix that it has inside a model
with a head (``BertForSequenceClassification``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import TypeVar

from merge_core.checkpoints.checkpoint import Checkpoint

Key = TypeVar("Key", bound=Hashable)


def align_names(members: Mapping[Key, Checkpoint]) -> dict[Key, str]:
    """The prefixes that some members' names lack to be those of the others.

    Args:
        members: whole models.

    Returns:
        By member its prefix, such as ``bert.``; only where it is plain: more than half of the
        member's matrices are another's, in name and shape, with this one prefix, and at most half
        as many with any other.
    """
    found = {}
    for key, model in members.items():
        prefixes = {missing_prefix(model, other) for other in members.values()} - {""}
        longest = max(prefixes, key=len, default="")
        if longest and all(longest.endswith(prefix) for prefix in prefixes):
            found[key] = longest
    return found


def missing_prefix(model: Checkpoint, other: Checkpoint) -> str:
    """The prefix that a model's names lack to be another's; empty if none, or none is plain.

    Args:
        model: whose names may lack it.
        other: whose names may have it.
    """
    matrices = [name for name in model if len(model.info(name).shape) >= 2]
    if 2 * sum(name in other for name in matrices) >= len(matrices):
        return ""
    by_end: dict[str, list[str]] = {}
    for name in other:
        words = name.split(".")
        for i in range(1, len(words)):
            by_end.setdefault(".".join(words[i:]), []).append(name)
    counts = Counter(
        candidate.removesuffix(name)
        for name in matrices
        for candidate in by_end.get(name, ())
        if other.info(candidate).shape == model.info(name).shape
    )
    (best, most), (_, second) = [*counts.most_common(2), ("", 0), ("", 0)][:2]
    return best if 2 * most > len(matrices) and 2 * second <= most else ""


def add_prefix(model: Checkpoint, prefix: str, others: Mapping[Key, Checkpoint]) -> Checkpoint:
    """A model with a prefix before its names, but for those that others have without it.

    Args:
        model: whose names lack the prefix.
        prefix: such as ``bert.``.
        others: further members of the suite.
    """
    known = set().union(*others.values())
    return model.renamed(
        {name: prefix + name for name in model if name not in known or prefix + name in known}
    )
