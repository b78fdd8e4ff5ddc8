"""Means of tensors: rounded as weights are, and exact, as what task vectors are taken about."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Entries that are worked on at a time, so that they stay in the processor's cache.
PIECE = 1 << 17


def mean(members: Sequence[Tensor]) -> Tensor:
    """The mean of tensors of one shape and floating dtype (T of them; a single one itself)."""
    if len(members) == 1:
        return members[0]
    result = torch.empty_like(members[0], memory_format=torch.contiguous_format)
    flat, whole = [member.reshape(-1) for member in members], result.view(-1)
    # In pieces that stay in the processor's cache while all members are added to them.
    for start in range(0, whole.numel(), PIECE):
        part = slice(start, start + PIECE)
        total = torch.add(flat[0][part], flat[1][part], out=whole[part])
        for member in flat[2:]:
            total += member[part]
        total /= len(flat)
    return result


def mean_offset(members: Sequence[Tensor]) -> Tensor:
    """The mean of tensors less the first of them, float64.

    Differences of near numbers are exact, so that what rounding leaves is measured by them and
    not by the numbers.

    Args:
        members: T tensors of one shape and floating dtype.

    Example:
        >>> mean_offset([torch.tensor([1.0]), torch.tensor([2.0])])
        tensor([0.5000], dtype=torch.float64)
    """
    first = members[0].double()
    total = torch.zeros_like(first)
    for member in members[1:]:
        total += member.double() - first
    return total / len(members)


def centre(members: Tensor) -> Tensor:
    """Each of T tensors less their mean, T x shape, float64.

    Args:
        members: T x shape, floating.

    Example:
        >>> centre(torch.tensor([[1.0], [2.0]]))
        tensor([[-0.5000],
                [ 0.5000]], dtype=torch.float64)
    """
    offset = mean_offset(members.unbind())
    return (members.double() - members[0].double()).sub_(offset)
