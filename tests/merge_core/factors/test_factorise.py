"""Factors made ahead: on threads, in processes that share only files, once and the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from merge_core.errors import Cancelled, SuiteError
from merge_core.executors.base import Executor
from merge_core.executors.local import Processes, Serial, Threads
from merge_core.factors.factorise import decompose_all, map_matrices, map_parameters
from merge_core.factors.store import FactorStore
from merge_core.progress import Progress
from merge_core.suites.suite import Suite
from merge_core.task_vectors import Origin, TensorGroup, TensorGroups

Make = Callable[..., Suite]


@pytest.fixture(autouse=True)
def plain_main(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of pages leave a page as ``__main__``, which spawned processes would run."""
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))


def sides(group: TensorGroup, origin: Origin = "average") -> tuple[str, torch.Tensor]:
    """All singular values and right sides of a parameter, side by side."""
    found = group.directions(origin)
    return group.name, torch.cat([torch.cat([f.S[None], f.V]) for f in found])


def values(suite: Suite, folder: Path, where: Executor | None) -> dict[str, torch.Tensor]:
    """The sides of each parameter, decomposed by an executor."""
    groups = TensorGroups(suite, None, FactorStore(folder))
    decompose_all(groups, "average", executor=where)
    return dict(map_matrices(sides, groups))


@pytest.mark.parametrize("where", [Threads(2), Processes(2)], ids=["threads", "processes"])
def test_factors_do_not_depend_on_where_they_are_made(
    synthetic_suite: Make, tmp_path: Path, where: Executor
) -> None:
    suite = synthetic_suite(3, seed=2)
    alone = values(suite, tmp_path / "alone", Serial())
    assert list(alone) == list(suite.matrices)
    side_by_side = values(suite, tmp_path / "many", where)
    assert side_by_side.keys() == alone.keys()
    assert all(torch.equal(side_by_side[name], alone[name]) for name in alone)
    # What the workers left is found by whoever comes later.
    later = FactorStore(tmp_path / "many")
    assert decompose_all(TensorGroups(suite, None, later), "average", executor=Serial()) == len(
        alone
    )
    assert later.decompositions == 0


def test_progress_is_told_and_cancels_between_two(synthetic_suite: Make, tmp_path: Path) -> None:
    suite = synthetic_suite(2)
    told: list[tuple[int, int]] = []
    groups = TensorGroups(suite, None, FactorStore(tmp_path))
    n = len(suite.matrices)
    decompose_all(groups, "base", progress=Progress(lambda d, t, _: told.append((d, t))))
    assert told == [(i, n) for i in range(1, n + 1)]
    stop = Progress(lambda d, t, _: stop.cancel.set())
    with pytest.raises(Cancelled):
        decompose_all(groups, "average", progress=stop)
    told.clear()
    stop = Progress(lambda d, t, _: told.append((d, t)))
    seen = map_matrices(sides, groups, stop)
    next(seen)
    stop.cancel.set()
    with pytest.raises(Cancelled):
        next(seen)
    assert told == [(1, n)]


def test_each_is_released_unless_all_are_kept(synthetic_suite: Make, tmp_path: Path) -> None:
    for keep in (False, True):
        groups = TensorGroups(
            synthetic_suite(2), None, FactorStore(tmp_path / str(keep)), keep=keep
        )
        decompose_all(groups, "average")
        held = {"members" in vars(group) for group in groups.members if group.decomposed}
        assert held == {keep}
        list(map_parameters(lambda group: group.members, groups))
        assert {"members" in vars(group) for group in groups.members} == {keep}


def test_no_base_is_said_before_any_work(synthetic_suite: Make, tmp_path: Path) -> None:
    suite = synthetic_suite(2, with_base=False)
    groups = TensorGroups(suite, None, FactorStore(tmp_path))
    with pytest.raises(SuiteError, match="names no base"):
        decompose_all(groups, "base")
    with pytest.raises(SuiteError, match="names no base"):
        list(map_matrices(partial(sides, origin="base"), groups))


@pytest.mark.parametrize("torch_threads", [1, 2])
def test_each_parameter_is_looked_at_by_one_torch_thread_in_order(
    synthetic_suite: Make, tmp_path: Path, torch_threads: int
) -> None:
    groups = TensorGroups(synthetic_suite(2), None, FactorStore(tmp_path))

    def look(group: TensorGroup) -> tuple[str, int]:
        return group.name, torch.get_num_threads()

    torch.set_num_threads(torch_threads)
    try:
        found = list(map_parameters(look, groups, lambda group: group.info.is_floating))
        single = list(map_parameters(look, groups.members[0]))
        assert torch.get_num_threads() == torch_threads
    finally:
        torch.set_num_threads(1)
    wanted = [group.name for group in groups.members if group.info.is_floating]
    assert found == [(name, 1) for name in wanted]
    assert single == [(groups.members[0].name, 1)]
