"""Work on one parameter after another, several at once, each under one torch thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

from merge_core.executors.base import Executor
from merge_core.executors.local import Serial, Threads
from merge_core.factors.decomposition import Route
from merge_core.factors.store import FactorStore
from merge_core.progress import Progress
from merge_core.suites.suite import load_suite
from merge_core.task_vectors import Origin, TensorGroup, TensorGroups

Result = TypeVar("Result")


def map_parameters(
    function: Callable[[TensorGroup], Result],
    groups: TensorGroups | TensorGroup,
    chosen: Callable[[TensorGroup], bool] = lambda _: True,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """What a function gives for each parameter, in their order.

    Parameters are looked at on as many threads as torch has in this one, each of which works
    alone: an operation that torch splits ends when its slowest part does, and beside another busy
    process a loop of small ones would wait at each of them.

    Args:
        function: of one parameter; it runs on several threads at once.
        groups: the suite's parameters, or a single one, which is looked at in this thread.
        chosen: which of the suite's parameters are looked at.
        progress: told after each parameter, in this thread; cancels between two.

    Yields:
        The results. Unless `groups` keeps what it read, each parameter is released before.

    Raises:
        Cancelled: between two parameters.
        Exception: whatever `function` raises, in its parameter's place.

    Example:
        >>> groups = TensorGroups(load_suite("vision"), ["digits", "dots"], FactorStore())
        >>> names = list(map_parameters(lambda group: group.name, groups))
        >>> names == list(groups.suite.parameters)
        True
    """
    progress = progress or Progress()
    where: Executor
    if isinstance(groups, TensorGroup):
        members, keep, where = [groups], True, Serial()
    else:
        members, keep, where = list(filter(chosen, groups.members)), groups.keep, Threads()

    def here(group: TensorGroup) -> Result:
        try:
            return function(group)
        finally:
            if not keep:
                group.release()

    results = where.map(here, members, progress.cancel)
    for done, (group, result) in enumerate(zip(members, results, strict=True), start=1):
        progress.step(done, len(members), group.name)
        yield result


def map_matrices(
    function: Callable[[TensorGroup], Result],
    groups: TensorGroups | TensorGroup,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """What a function gives for each decomposed parameter (see :func:`map_parameters`).

    Args:
        function: of one parameter; it runs on several threads at once.
        groups: the suite's parameters, or a single one.
        progress: told after each matrix; cancels between two.

    Yields:
        The results.

    Raises:
        Cancelled: between two matrices.
        Exception: whatever `function` raises, in its matrix's place.

    Example:
        >>> groups = TensorGroups(load_suite("vision"), ["digits", "dots"], FactorStore())
        >>> list(map_matrices(lambda group: group.info.shape, groups))[:2]
        [(256, 256), (768, 256)]
    """
    return map_parameters(function, groups, attrgetter("decomposed"), progress)


def decompose_all(
    groups: TensorGroups,
    origin: Origin,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> int:
    """Leave the directions of all matrices in the store.

    Args:
        groups: the suite's parameters; unless they keep what was read, each is released.
        origin: what the task vectors are taken about.
        executor: where matrices are decomposed; on as many threads as torch has when None.
            Workers that share no memory must share the store's folder.
        progress: told after each matrix; cancels between two.

    Returns:
        How many matrices there are.

    Raises:
        MergeScopeError: unreadable or unfit inputs; origin "base" without a base; workers that
            die.
        Cancelled: between two matrices.

    Example:
        >>> groups = TensorGroups(load_suite("vision"), ["digits", "dots"], FactorStore())
        >>> decompose_all(groups, "average")
        8
    """
    progress, where = progress or Progress(), executor or Threads()
    members = {group.name: group for group in groups.members if group.decomposed}

    def here(name: str) -> None:
        members[name].directions(origin)
        if not groups.keep:
            members[name].release()

    there = _Decompose(StoredGroups.of(groups), origin)
    finished = where.map(here if where.shares_memory else there, members, progress.cancel)
    for done, (name, _) in enumerate(zip(members, finished, strict=True), start=1):
        progress.step(done, len(members), name)
    return len(members)


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
    def of(cls, groups: TensorGroups) -> StoredGroups:
        """Where parameters at hand lie."""
        store = groups.store
        return cls(str(groups.suite.path), groups.tasks, store.folder, store.route)

    def store(self) -> FactorStore:
        """The factor store, opened anew."""
        return FactorStore(self.factors, route=self.route)

    def parameter(self, name: str) -> TensorGroup:
        """One parameter; the suite is opened once in each worker process.

        Raises:
            SuiteError, CheckpointError: unreadable.
        """
        return _parameters(self)[name]


@lru_cache(maxsize=1)
def _parameters(stored: StoredGroups) -> dict[str, TensorGroup]:
    groups = TensorGroups(load_suite(stored.suite), stored.tasks, stored.store())
    return {group.name: group for group in groups.members}


@dataclass(frozen=True)
class _Decompose:
    """Decomposes a parameter by its name, in a worker."""

    stored: StoredGroups
    origin: Origin

    def __call__(self, name: str) -> None:
        group = self.stored.parameter(name)
        group.directions(self.origin)
        group.release()
