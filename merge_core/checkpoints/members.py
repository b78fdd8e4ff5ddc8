"""What several checkpoints have in common, told from their headers."""

from __future__ import annotations

from collections.abc import Sequence

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.parameter_roles import describe
from merge_core.checkpoints.shards import TensorInfo
from merge_core.checkpoints.vocabulary import longest_shape


def names_in_all(members: Sequence[Checkpoint]) -> list[str]:
    """Names that all members have, in the first one's order."""
    first, *others = members
    return [name for name in first if all(name in other for other in others)]


def are_own_heads(name: str, members: Sequence[Checkpoint]) -> bool:
    """Whether a head's shapes differ, as those of tasks with other classes do.

    Args:
        name: a parameter that all members have.
        members: experts, and the base where there is one.
    """
    shapes = {member.info(name).shape for member in members}
    return len(shapes) > 1 and describe(name, members[0].info(name)).kind == "head"


def longest_vocabulary(name: str, members: Sequence[Checkpoint]) -> TensorInfo | None:
    """Header of an embedding or language head at its largest, where its rows differ.

    Args:
        name: a parameter that all members have.
        members: experts, and the base where there is one.

    Returns:
        The longest member's shape and the first one's dtype; None for other parameters, and
        where the members agree or differ in more than rows.
    """
    first = members[0].info(name)
    shape = longest_shape([member.info(name).shape for member in members])
    if shape is None or not describe(name, first).is_vocabulary:
        return None
    return TensorInfo(shape, first.dtype)
