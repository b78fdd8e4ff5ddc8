"""Passes over the task vectors of a whole model, and exact order statistics from them.

Memory does not grow with the model: a pass holds a few blocks of a few parameters at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from merge_core.executors.local import Threads
from merge_core.methods import blockwise
from merge_core.progress import Progress
from merge_core.task_vectors import Origin, TensorGroup, TensorGroups
from merge_core.work_sizes import SAMPLE

Found = TypeVar("Found")

# Standard deviations of a sample's quantile between which the model's is looked for.
DEVIATIONS = 6
# Entries of a row that its order statistics are first looked for in.
ROW_SAMPLE = 1 << 14


def count_kept(density: float, total: int) -> int:
    """Number of entries that a density keeps of `total`: the floor, at least one unless 0."""
    if density == 0:
        return 0
    return min(total, max(1, int(density * total + 1e-9)))


def as_it_is(tau: Tensor) -> Tensor:
    """A view of a block of task vectors that changes nothing."""
    return tau


class Passes:
    """A planned number of passes over the floating parameters of a model, several at once.

    Args:
        groups: all parameters.
        origin: of the task vectors.
        view: what is looked at, of a block of task vectors (T x n to T x n).
        progress: reports each parameter of each pass.
        plain: how many calls of :meth:`run` there will be.
        selections: how many calls of :func:`kth_largest`.
        dtype: of the task vectors, as :meth:`TensorGroup.blocks` has it.
    """

    def __init__(
        self,
        groups: TensorGroups,
        origin: Origin,
        view: Callable[[Tensor], Tensor],
        progress: Progress,
        plain: int,
        selections: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.tasks = len(groups.tasks)
        self.entries = sum(g.info.numel for g in groups.members if g.info.is_floating)
        self._groups, self._origin, self._view, self._dtype = groups, origin, view, dtype
        # Odd, so that it does not walk along the columns of matrices whose sides are powers of 2.
        self.stride = max(1, self.entries // SAMPLE) | 1
        self._count = plain + selections * (1 if self.stride == 1 else 2)
        self._progress, self._done = progress, 0

    def run(
        self,
        label: str,
        look: Callable[[Tensor], Found],
        fold: Callable[[list[Found]], Found],
        stride: int = 1,
    ) -> Iterator[Found]:
        """One pass: what is found in the task vectors of each parameter, in order.

        Args:
            label: what the pass looks for, in words.
            look: at a block, T x n.
            fold: what a parameter's blocks give together. Little is kept of each block, so that
                memory is not left in small pieces.
            stride: of the entries that are looked at; those of all parameters count on.
        """

        def found(item: tuple[TensorGroup, int]) -> Found | None:
            group, first = item
            try:
                if not group.info.is_floating:
                    return None
                blocks = group.blocks(self._origin, blockwise.BLOCK, stride, first, self._dtype)
                parts = [look(self._view(tau)) for _, tau in blocks]
                return fold(parts) if parts else None
            finally:
                if not self._groups.keep:
                    group.release()

        size, firsts, before = len(self._groups), [], 0
        for group in self._groups.members:
            firsts.append(-before % stride)
            before += group.info.numel if group.info.is_floating else 0
        self._count = max(self._count, self._done + 1)
        items = zip(self._groups.members, firsts, strict=True)
        results = Threads().map(found, items, self._progress.cancel)
        for i, group in enumerate(self._groups.members):
            done = self._done * size + i
            self._progress.step(done, self._count * size, f"{label} of {group.name}")
            if (result := next(results)) is not None:
                yield result
        self._done += 1


def sum_pairs(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The sums of pairs of tensors, each of one shape."""
    first, second = zip(*parts, strict=True)
    return torch.stack(first).sum(dim=0), torch.stack(second).sum(dim=0)


def kth_largest(
    passes: Passes, values: Callable[[Tensor], Tensor], ranks: Sequence[int], label: str
) -> Tensor:
    """Order statistics of each task over the whole model, exactly, in one or two passes.

    Of a small model everything is ranked. Of a larger one a sample gives two bounds that hold the
    wanted value between them, but for a chance of about 1e-9; one pass counts the entries beyond
    the bounds and collects those between. Where the bounds miss, a denser sample gives others.

    Args:
        passes: one or two of these are used, more where bounds miss.
        values: of a block of task vectors (T x n), the values to rank (T x n).
        ranks: 1 for the largest, at most the number of entries; zeros are given where there are
            no entries.
        label: what the values are, for the progress.

    Returns:
        T x ranks: the values at these ranks, in their own dtype.

    Source: Floyd and Rivest, Communications of the ACM 18 (1975), 165, on selection by sampling.
    """
    stride = passes.stride
    if passes.entries == 0:
        return torch.zeros(passes.tasks, len(ranks))
    while True:
        sample = torch.cat(list(passes.run(label, values, partial(torch.cat, dim=1), stride)), 1)
        if stride == 1:
            return torch.stack([_kth_of_rows(sample, rank) for rank in ranks], dim=1)
        bounds = [_bounds(sample, rank / passes.entries) for rank in ranks]
        look = partial(_counts, values=values, bounds=bounds)
        counted = _sum_counts(list(passes.run(f"thresholds: {label}", look, _sum_counts)))
        found = [
            [
                _value_at_rank(cell, low, high, rank)
                for cell, low, high in zip(cells, *(b.tolist() for b in limits), strict=True)
            ]
            for cells, limits, rank in zip(counted, bounds, ranks, strict=True)
        ]
        if not any(value is None for column in found for value in column):
            return torch.tensor(found, dtype=sample.dtype).T
        stride = (stride // 16) | 1


def kth_in_place(values: Tensor, rank: int) -> Tensor:
    """The rank-th largest of the entries (a scalar), which are reordered: nothing is copied.

    Args:
        values: n.
        rank: 1 for the largest.
    """
    place = len(values) - rank
    values.numpy().partition(place)
    return values[place].clone()


def _kth_of_rows(values: Tensor, rank: int) -> Tensor:
    """The rank-th largest of each row; rows are reordered."""
    return torch.stack([kth_in_place(row, rank) for row in values])


def kth_of_rows(values: Tensor, rank: int) -> Tensor:
    """The rank-th largest of each row (T x n), exactly; see :func:`kth_largest`.

    A sample of each row says between which bounds it lies, so that few entries are sorted.

    Args:
        values: T x n, finite; as it was afterwards.
        rank: 1 for the largest, at most n.

    Example:
        >>> kth_of_rows(torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 5.0]]), 2)
        tensor([2., 0.])
    """
    size = values.shape[1]
    stride = max(1, size // ROW_SAMPLE) | 1
    if stride == 1:
        return _kth_of_rows(values.clone(), rank)
    low, high = _bounds(values[:, ::stride].contiguous(), rank / size)
    (cells,) = _counts(values, as_it_is, [(low, high)])
    found = [
        _value_at_rank(*each, rank) for each in zip(cells, low.tolist(), high.tolist(), strict=True)
    ]
    for t, value in enumerate(found):
        if value is None:  # the sample misled, for a chance of about 1e-9
            found[t] = float(kth_in_place(values[t].clone(), rank))
    return torch.tensor(found, dtype=values.dtype)


Bounds = tuple[Tensor, Tensor]


def _bounds(sample: Tensor, share: float) -> Bounds:
    """For each row, values below and above the one that a share of the population reaches."""
    size = sample.shape[1]
    around = DEVIATIONS * (share * (1 - share) * size) ** 0.5 + DEVIATIONS
    above, below = int(share * size - around), int(share * size + around) + 1
    none = sample.new_full((len(sample),), torch.inf)
    return (
        _kth_of_rows(sample, below) if below <= size else -none,
        _kth_of_rows(sample, above) if above >= 1 else none,
    )


@dataclass(frozen=True)
class _RankCounts:
    """How many values of one task lie where, against a pair of bounds.

    Attributes:
        above: greater than the upper bound.
        upper: equal to it.
        lower: equal to the lower bound.
        between: the values strictly between.
    """

    above: int
    upper: int
    lower: int
    between: np.ndarray


Counts = list[list[_RankCounts]]  # for each rank, for each task


def _counts(tau: Tensor, values: Callable[[Tensor], Tensor], bounds: Sequence[Bounds]) -> Counts:
    """The counts of the values of one block, T x n."""
    ranked = values(tau).numpy()
    counts = []
    for low, high in bounds:
        # NumPy counts and picks bits several times faster than torch.
        reaching, beyond = (ranked >= low.numpy()[:, None]), (ranked > high.numpy()[:, None])
        near = reaching ^ beyond
        row = []
        for t, (least, most) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
            candidates = ranked[t][near[t]]
            inside = candidates[(candidates > least) & (candidates < most)]
            upper = int(np.count_nonzero(candidates == most))
            lower = len(candidates) - len(inside) - upper if least < most else 0
            row.append(_RankCounts(int(np.count_nonzero(beyond[t])), upper, lower, inside))
        counts.append(row)
    return counts


def _sum_counts(counts: list[Counts]) -> Counts:
    """The counts of several blocks or parameters together."""
    return [
        [
            _RankCounts(
                sum(cell.above for cell in cells),
                sum(cell.upper for cell in cells),
                sum(cell.lower for cell in cells),
                np.concatenate([cell.between for cell in cells]),
            )
            for cells in zip(*rows, strict=True)
        ]
        for rows in zip(*counts, strict=True)
    ]


def _value_at_rank(counted: _RankCounts, low: float, high: float, rank: int) -> float | None:
    """The value at a rank; None where it lies beyond the bounds."""
    position = rank - counted.above
    if position < 1:
        return None
    if position <= counted.upper:
        return high
    position -= counted.upper
    if position <= len(counted.between):
        smaller = len(counted.between) - position
        return float(np.partition(counted.between, smaller)[smaller])
    return low if position - len(counted.between) <= counted.lower else None
