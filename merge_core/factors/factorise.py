"""Factors of all matrices of a suite, several matrices at once, ahead of whoever looks at them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from merge_core.executors.base import Executor
from merge_core.executors.local import Threads
from merge_core.factors.decomposition import Route
from merge_core.factors.store import FactorStore
from merge_core.progress import Progress
from merge_core.suites.suite import load_suite
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

    Example:
        >>> groups = Groups(load_suite("demo"), ["digits", "dots"], FactorStore())
        >>> ahead = decompose_ahead(groups, "average", "singular values")
        >>> [tuple(S.shape) for S in next(ahead).singular_values("average")]
        [(256,), (256,)]
    """
    progress, where = progress or Progress(), executor or Threads()
    members = [group for group in groups.members if group.decomposed]
    if where.shares_memory:

        def here(group: ParameterGroup) -> None:
            _decompose(group, origin, wanted)

        finished = where.map(here, members, progress.cancel)
    else:
        there = _Decompose(StoredGroups.of(groups), origin, wanted)
        finished = where.map(there, [group.name for group in members], progress.cancel)
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
class StoredGroups:
    """A suite's parameters by where they lie, for workers that share files, not memory.

    Attributes:
        suite: path of its file.
        tasks: chosen tasks.
        factors: folder of the factor store.
        route: how matrices are decomposed.
    """

    suite: str
    tasks: tuple[str, ...]
    factors: Path
    route: Route

    @classmethod
    def of(cls, groups: Groups) -> StoredGroups:
        """Where parameters at hand lie."""
        store = groups.store
        return cls(str(groups.suite.path), groups.tasks, store.folder, store.route)

    def store(self) -> FactorStore:
        """The factor store, opened anew."""
        return FactorStore(self.factors, route=self.route)

    def parameter(self, name: str) -> ParameterGroup:
        """One parameter; the suite is opened once in each worker process.

        Raises:
            SuiteError, CheckpointError: unreadable.
        """
        return _parameters(self)[name]


@lru_cache(maxsize=1)
def _parameters(stored: StoredGroups) -> dict[str, ParameterGroup]:
    groups = Groups(load_suite(stored.suite), stored.tasks, stored.store())
    return {group.name: group for group in groups.members}


@dataclass(frozen=True)
class _Decompose:
    """Decomposes a parameter by its name, in a worker."""

    stored: StoredGroups
    origin: Origin
    wanted: Wanted

    def __call__(self, name: str) -> None:
        group = self.stored.parameter(name)
        _decompose(group, self.origin, self.wanted)
        group.release()
