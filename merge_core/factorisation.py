"""Work on one parameter after another, several at once, each under one torch thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

from merge_core.decomposition import Route
from merge_core.executors import Executor, Serial, Threads
from merge_core.factors import FactorStore
from merge_core.progress import Progress
from merge_core.suite import load_suite
from merge_core.task_vectors import Groups, Origin, ParameterGroup

Result = TypeVar("Result")


def map_parameters(
    function: Callable[[ParameterGroup], Result],
    groups: Groups | ParameterGroup,
    chosen: Callable[[ParameterGroup], bool] = lambda _: True,
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
    """
    progress = progress or Progress()
    where: Executor
    if isinstance(groups, ParameterGroup):
        members, keep, where = [groups], True, Serial()
    else:
        members, keep, where = list(filter(chosen, groups.members)), groups.keep, Threads()

    def here(group: ParameterGroup) -> Result:
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
    function: Callable[[ParameterGroup], Result],
    groups: Groups | ParameterGroup,
    origin: Origin,
    k: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """What a function gives for each decomposed parameter, with its factors at hand.

    Args:
        function: of one parameter; it runs on several threads at once.
        groups: the suite's parameters, or a single one, which finds its factors itself.
        origin: what the task vectors are taken about.
        k: how many singular vectors are looked at (see
            :meth:`merge_core.task_vectors.ParameterGroup.factors`).
        progress: told after each matrix; cancels between two.

    Yields:
        The results (see :func:`map_parameters`).

    Raises:
        MergeScopeError: unreadable or unfit inputs; origin "base" without a base.
        Cancelled: between two matrices.
    """
    if isinstance(groups, ParameterGroup):
        return map_parameters(function, groups, progress=progress)

    def decomposed(group: ParameterGroup) -> Result:
        group.factors(origin, k)
        return function(group)

    return map_parameters(decomposed, groups, attrgetter("decomposed"), progress)


def decompose(
    groups: Groups,
    origin: Origin,
    k: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> int:
    """Leave the factors of all matrices in the store.

    Args:
        groups: the suite's parameters; unless they keep what was read, each is released.
        origin: what the task vectors are taken about.
        k: as in :meth:`merge_core.task_vectors.ParameterGroup.factors`.
        executor: where matrices are decomposed; on as many threads as torch has when None.
            Workers that share no memory must share the store's folder.
        progress: told after each matrix; cancels between two.

    Returns:
        How many matrices there are.

    Raises:
        MergeScopeError: unreadable or unfit inputs; origin "base" without a base; workers that
            die.
        Cancelled: between two matrices.
    """
    progress, where, store = progress or Progress(), executor or Threads(), groups.store
    members = {group.name: group for group in groups.members if group.decomposed}

    def here(name: str) -> None:
        members[name].factors(origin, k)
        if not groups.keep:
            members[name].release()

    unit = _Unit(str(groups.suite.path), groups.tasks, store.folder, store.route, origin, k)
    finished = where.map(here if where.shares_memory else unit, members, progress.cancel)
    for done, (name, _) in enumerate(zip(members, finished, strict=True), start=1):
        progress.step(done, len(members), name)
    return len(members)


@dataclass(frozen=True)
class _Unit:
    """Decomposes a parameter by its name in a worker that shares files, not memory."""

    suite: str
    tasks: Sequence[str]
    factors: Path
    route: Route
    origin: Origin
    k: int | None

    def __call__(self, name: str) -> None:
        groups = opened(self.suite, tuple(self.tasks), self.factors, self.route)
        groups[name].factors(self.origin, self.k)
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
