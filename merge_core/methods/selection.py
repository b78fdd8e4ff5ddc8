"""Passes over the task vectors of a whole model, and exact order statistics from them.

Memory does not grow with the model: a pass holds one block of one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from merge_core.progress import Progress
from merge_core.task_vectors import Groups, ParameterGroup

BLOCK = 1 << 14  # T x T x BLOCK numbers of PCB stay near the cache
BINS = 1 << 16


def kept_count(density: float, total: int) -> int:
    """Number of entries that a density keeps of `total`: the floor, at least one unless 0."""
    if density == 0:
        return 0
    return min(total, max(1, int(density * total + 1e-9)))


def blocks(tau: Tensor) -> tuple[Tensor, ...]:
    """T x shape as blocks T x at most :data:`BLOCK` entries, in order; none where it is empty."""
    return () if tau.numel() == 0 else tau.reshape(len(tau), -1).split(BLOCK, dim=1)


class Passes:
    """A planned number of passes over the floating parameters of a model.

    Args:
        groups: all parameters.
        task_vectors: of one parameter, T x shape.
        progress: reports each parameter of each pass.
        count: how many passes there will be.
    """

    def __init__(
        self,
        groups: Groups,
        task_vectors: Callable[[ParameterGroup], Tensor],
        progress: Progress,
        count: int,
    ) -> None:
        self.tasks = len(groups.tasks)
        self.entries = sum(g.info.numel for g in groups if g.info.is_floating)
        self._groups, self._task_vectors = groups, task_vectors
        self._progress, self._count, self._done = progress, count, 0

    def over(self, label: str) -> Iterator[Tensor]:
        """One pass: the task vectors of all parameters, in blocks T x entries.

        Args:
            label: what the pass looks for, in words.
        """
        size = len(self._groups)
        for i, group in enumerate(self._groups):
            done = self._done * size + i
            self._progress.step(done, self._count * size, f"{label} of {group.name}")
            if group.info.is_floating:
                yield from blocks(self._task_vectors(group))
        self._done += 1


def _keys(values: Tensor) -> Tensor:
    """Integers in [0, 2³²) in the order of float32 values: the bit pattern made monotone."""
    bits = values.float().contiguous().view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() + (1 << 31)


def _values(keys: Tensor) -> Tensor:
    """The float32 values of such integers."""
    bits = (keys - (1 << 31)).to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _bin_of(counts: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """The bin (last axis) that holds the rank-th largest entry, and its rank inside that bin."""
    from_top = counts.flip(-1)
    reached = from_top.cumsum(-1)
    place = (reached >= rank[..., None]).int().argmax(dim=-1)
    above = (reached - from_top).gather(-1, place[..., None])[..., 0]
    return BINS - 1 - place, rank - above


def kth_largest(
    passes: Passes, values: Callable[[Tensor], Tensor], ranks: Sequence[int], label: str
) -> Tensor:
    """Order statistics of each task over the whole model, exactly, in two passes.

    A radix selection: a histogram of the upper 16 bits of the values as float32, then one of the
    lower 16 bits inside the bin that holds the rank.

    Args:
        passes: two of these are used.
        values: of a block of task vectors (T x n), the values to rank (T x n).
        ranks: 1 for the largest, at most the number of entries.
        label: what the values are, for the progress.

    Returns:
        T x ranks: the values at these ranks, float32.
    """
    tasks = passes.tasks
    upper = torch.zeros(tasks, 1, BINS, dtype=torch.int64)
    for tau in passes.over(label):
        for t, row in enumerate(values(tau)):
            upper[t, 0] += torch.bincount(_keys(row) >> 16, minlength=BINS)
    wanted = torch.tensor(ranks).expand(tasks, -1)
    bins, inside = _bin_of(upper.expand(-1, len(ranks), -1), wanted)
    lower = torch.zeros(tasks, len(ranks), BINS, dtype=torch.int64)
    for tau in passes.over(f"thresholds: {label}"):
        for t, row in enumerate(values(tau)):
            keys = _keys(row)
            for r, chosen in enumerate(bins[t]):
                low = keys[(keys >> 16) == chosen] & (BINS - 1)
                lower[t, r] += torch.bincount(low, minlength=BINS)
    below, _ = _bin_of(lower, inside)
    return _values((bins << 16) | below)
