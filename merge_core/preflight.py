"""Pre-flight: what fits, what differs, and what a merge will take, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from merge_core.checkpoint import Checkpoint, TensorInfo
from merge_core.suite import Suite


@dataclass(frozen=True)
class Difference:
    """One way in which a member departs from the first expert."""

    member: str
    parameter: str
    kind: str
    detail: str

    @property
    def blocking(self) -> bool:
        """Whether a merge is refused (a dtype that differs is only cast)."""
        return self.kind in ("missing", "shape")


@dataclass(frozen=True)
class ParameterPlan:
    """How one parameter will be treated by spectral methods."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    decomposed: bool
    reason: str


@dataclass(frozen=True)
class Preflight:
    """The report.

    Attributes:
        differences: missing, extra, shape and dtype differences per member.
        plan: one row per common parameter.
        memory_bytes: estimated peak memory of a streamed merge (all members' copies of the
            largest parameter in float32, its factors in float64 included).
        disk_bytes: size of the merged file.
    """

    differences: tuple[Difference, ...]
    plan: tuple[ParameterPlan, ...]
    memory_bytes: int
    disk_bytes: int

    @property
    def blocking(self) -> tuple[Difference, ...]:
        """The differences that make a merge impossible."""
        return tuple(d for d in self.differences if d.blocking)


def preflight(suite: Suite, tasks: Sequence[str] | None = None) -> Preflight:
    """Compare the headers of all members; no tensor is read.

    Args:
        suite: the suite.
        tasks: which experts (all when None).

    Raises:
        SuiteError: unknown tasks.
        CheckpointError: a member cannot be opened.
    """
    chosen = suite.select(tasks)
    first = suite.expert(chosen[0])
    members = [(task, suite.expert(task)) for task in chosen[1:]]
    if suite.base is not None:
        members.append(("base", suite.base))
    differences = tuple(
        difference
        for who, checkpoint in members
        for difference in _differences(who, checkpoint, chosen[0], first)
    )
    bad = {d.parameter for d in differences if d.blocking}
    plan = []
    peak = 0
    disk = 0
    copies = len(chosen) + (suite.base is not None)
    for name in first:
        if name in bad:
            continue
        info = first.info(name)
        rule = suite.treatment(name, chosen[0])
        plan.append(ParameterPlan(name, info.shape, _dtype(info), rule.decomposed, rule.reason))
        peak = max(peak, _working_bytes(info, copies, len(chosen), rule.decomposed))
        disk += info.nbytes
    return Preflight(differences, tuple(plan), peak, disk)


def _differences(
    who: str, checkpoint: Checkpoint, reference: str, first: Checkpoint
) -> Iterator[Difference]:
    for name in first:
        if name not in checkpoint:
            yield Difference(who, name, "missing", f"present in {reference}")
            continue
        here, there = checkpoint.info(name), first.info(name)
        if here.shape != there.shape:
            yield Difference(who, name, "shape", f"{here.shape}, {reference} has {there.shape}")
        elif here.dtype != there.dtype:
            yield Difference(who, name, "dtype", f"{_dtype(here)}, {reference} has {_dtype(there)}")
    for name in checkpoint:
        if name not in first:
            yield Difference(who, name, "extra", f"not in {reference}; left out of the merge")


def _working_bytes(info: TensorInfo, copies: int, experts: int, decomposed: bool) -> int:
    # Stacked experts, their working copies (float32 at least), the result and one temporary.
    total = (2 * copies + 2) * info.numel * max(4, info.dtype.itemsize)
    if decomposed:
        m = info.shape[0]
        n = info.numel // m
        r = min(m, n)
        total += experts * (m + n + 1) * r * 4 + 3 * (m * n + r * r) * 8
    return total


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")
