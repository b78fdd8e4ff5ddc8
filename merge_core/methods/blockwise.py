"""Merge rules of one parameter, a block of its entries at a time: no copy of all experts is made.

What lies in the span of the T experts follows from their T x T inner products, and is summed once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from merge_core.methods.declaration import Run
from merge_core.task_vectors import Origin, TensorGroup

BLOCK = 1 << 14  # entries of each expert: T of them stay near the cache, in float64
# A vote's total below this share of its largest entry is what float64 leaves of an even one: each
# of T entries is off by some 2⁻⁵³ of the largest, times 1/(1 − p) ≤ 1000 where DARE rescales.
EVEN = 1e-10


def elect_sign(votes: Tensor, task_vectors: Tensor | None = None) -> Tensor:
    """n: the sign of the sum over tasks, 0 where the vote is even.

    The stored numbers are taken as exact: a total that is zero but for the rounding of float64
    elects nobody.

    Args:
        votes: T x n.
        task_vectors: T x n, what the votes were taken from, where entries were dropped.
    """
    largest = torch.maximum(votes.amax(dim=0), -votes.amin(dim=0))
    if task_vectors is not None:
        largest = torch.maximum(largest, task_vectors.abs().amax(dim=0))
    return sign_of_vote(votes.sum(dim=0, dtype=torch.float64), largest)


def sign_of_vote(total: Tensor, largest: Tensor) -> Tensor:
    """n: the sign of a vote, float64, 0 where it is even but for what rounding leaves.

    Args:
        total: n, the sum over tasks, float64.
        largest: n, the largest magnitude among them.
    """
    return total.sign() * (total.abs() > EVEN * largest).to(total.dtype)


def agreement(votes: Tensor, sign: Tensor) -> Tensor:
    """1 where an entry that is not zero has the sign, 0 elsewhere; shape and dtype of the votes.

    Numbers rather than booleans: what they let through is then a product, several times faster
    than a choice by a condition that no processor can foresee.

    Args:
        votes: T x n, or n of one task.
        sign: n, of 1, −1 and 0.
    """
    return (votes * sign.to(votes.dtype)).sign_().clamp_min_(0)


def merge_entrywise(
    group: TensorGroup,
    run: Run,
    update: Callable[[Tensor, slice], Tensor],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Origin + update of one parameter, where each entry of it depends on that entry alone.

    Args:
        group: the parameter.
        run: the task vectors' origin and weights.
        update: of a block of task vectors (T x n) and its place among the parameter's entries,
            the block's update (n).
        dtype: of the task vectors, as :meth:`TensorGroup.blocks` has it.

    Returns:
        The shape of one expert.
    """
    origin = group.origin(run.origin)
    merged = torch.empty(origin.shape, dtype=group.widest_dtype(run.origin))
    whole, flat = merged.view(-1), origin.ravel()
    narrow = run.origin == "base" and (dtype or merged.dtype) == torch.float32
    for part, tau in group.blocks(run.origin, 2 * BLOCK if narrow else BLOCK, dtype=dtype):
        whole[part] = flat[part] + update(run.apply_weights(tau), part)
    return merged


def gram(group: TensorGroup, origin: Origin | None = None) -> Tensor:
    """T x T, float64: the inner products of all task vectors, or of the experts themselves.

    Args:
        group: the parameter.
        origin: what the task vectors are taken about; None for the experts.
    """
    total = torch.zeros(len(group.tasks), len(group.tasks), dtype=torch.float64)
    for _, block in group.blocks(origin, BLOCK, dtype=torch.float64):
        total += block @ block.T
    return total


def weighted_sum(group: TensorGroup, weights: Tensor) -> Tensor:
    """shape of one expert: Σ_t w_t θ_t of one parameter, summed in float64 and rounded once.

    Args:
        group: the parameter.
        weights: T, float64.
    """
    result = torch.empty(group.info.shape, dtype=group.widest_dtype(None))
    whole = result.view(-1)
    for part, block in group.blocks(None, BLOCK, dtype=torch.float64):
        whole[part] = weights @ block
    return result
