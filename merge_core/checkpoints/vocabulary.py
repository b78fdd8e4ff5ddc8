"""Embeddings and language heads of members whose vocabularies differ in size.

Rows are matched by their number, as tokens are: a member with fewer rows has the first ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def longest_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape with the most rows, where shapes differ in their number of rows alone.

    Returns:
        None where all shapes are equal, or differ in more than rows.
    """
    if len(set(shapes)) == 1 or not all(shapes) or len({shape[1:] for shape in shapes}) > 1:
        return None
    return max(shapes)


def filler(experts: Sequence[Tensor], base: Tensor | None, rows: int) -> Tensor:
    """Rows for members that lack them: the base's, else the mean over the experts that have them.

    An expert without a token so counts as one that did not change the token.

    Args:
        experts: each with at most `rows` rows.
        base: likewise, where there is one.
        rows: of the longest member.

    Returns:
        rows x (the other sizes), in the experts' dtype.
    """
    import torch

    total = torch.zeros(rows, *experts[0].shape[1:], dtype=torch.float64)
    count = torch.zeros(rows, *(1,) * (total.ndim - 1), dtype=torch.float64)
    for expert in experts:
        total[: len(expert)] += expert
        count[: len(expert)] += 1
    mean = (total / count.clamp_min(1)).to(experts[0].dtype)
    if base is not None:
        mean[: len(base)] = base
    return mean


def complete_rows(member: Tensor, filling: Tensor) -> Tensor:
    """A member with the rows that it lacks taken from `filling`; the same tensor if none."""
    import torch

    short = len(member) < len(filling)
    return torch.cat([member, filling[len(member) :].to(member.dtype)]) if short else member
