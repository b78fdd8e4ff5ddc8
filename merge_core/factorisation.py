"""Factors of all matrices of a suite, several matrices at once, ahead of whoever looks at them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from merge_core.decomposition import Route
from merge_core.executors import Executor, Threads
from merge_core.factors import FactorStore
from merge_core.progress import Progress
from merge_core.suite import load_suite
from merge_core.task_vectors import Groups, Origin, ParameterGroup

Wanted = Literal["singular values", "directions"]


def decompose_ahead(
    groups: Groups,
    origin: Origin,
    wanted: Wanted,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Iterator[ParameterGroup]:
    """The decomposed parameters one after another, each with what is wanted at hand.

    Args:
        groups: the suite's parameters.
        origin: what the task vectors are taken about.
        wanted: what will be looked at: spectra only, or all directions too.
        executor: where matrices are decomposed, a few ahead; on as many threads as torch has
            when None. Workers that share no memory leave the factors in the store's folder, which
            they must share.
        progress: told after each matrix; cancels between two.

    Yields:
        Each parameter; unless `groups` keeps what it read, it is released afterwards.

    Raises:
        MergeScopeError: unreadable or unfit inputs; origin "base" without a base; workers that
            die.
        Cancelled: between two matrices.
    """
    progress, where = progress or Progress(), executor or Threads()
    members = [group for group in groups.members if group.decomposed]
    if where.shares_memory:

        def here(group: ParameterGroup) -> None:
            _decompose(group, origin, wanted)

        finished = where.map(here, members, progress.cancel)
    else:
        store = groups.store
        unit = _Unit(
            str(groups.suite.path), groups.tasks, store.folder, store.route, origin, wanted
        )
        finished = where.map(unit, [group.name for group in members], progress.cancel)
    for done, group in enumerate(members, start=1):
        next(finished)
        yield group
        if not groups.keep:
            group.release()
        progress.step(done, len(members), group.name)


def _decompose(group: ParameterGroup, origin: Origin, wanted: Wanted) -> None:
    if wanted == "directions":
        group.directions(origin)
    group.singular_values(origin)


@dataclass(frozen=True)
class _Unit:
    """Decomposes a parameter by its name in a worker that shares files, not memory."""

    suite: str
    tasks: Sequence[str]
    factors: Path
    route: Route
    origin: Origin
    wanted: Wanted

    def __call__(self, name: str) -> None:
        groups = opened(self.suite, tuple(self.tasks), self.factors, self.route)
        _decompose(groups[name], self.origin, self.wanted)
        groups[name].release()


@lru_cache(maxsize=1)
def opened(
    suite: str, tasks: tuple[str, ...], factors: Path, route: Route
) -> dict[str, ParameterGroup]:
    """A suite's parameters by name, opened once in each worker process.

    Args:
        suite: path of its file.
        tasks: chosen tasks.
        factors: folder of the factor store.
        route: how matrices are decomposed.

    Raises:
        SuiteError, CheckpointError: unreadable.
    """
    groups = Groups(load_suite(suite), tasks, FactorStore(factors, route=route))
    return {group.name: group for group in groups.members}
