"""Factors made ahead: on threads, in processes that share only files, once and the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from merge_core.errors import Cancelled, SuiteError
from merge_core.executors.base import Executor
from merge_core.executors.local import Processes, Serial, Threads
from merge_core.factors.factorise import decompose_ahead
from merge_core.factors.store import FactorStore
from merge_core.progress import Progress
from merge_core.suites.suite import Suite
from merge_core.task_vectors import Groups

Make = Callable[..., Suite]


@pytest.fixture(autouse=True)
def plain_main(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of pages leave a page as ``__main__``, which spawned processes would run."""
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))


def values(suite: Suite, folder: Path, where: Executor | None) -> dict[str, torch.Tensor]:
    """All singular values and right sides, side by side, by parameter."""
    groups = Groups(suite, None, FactorStore(folder))
    return {
        group.name: torch.cat([torch.cat([f.S[None], f.V]) for f in group.directions("average")])
        for group in decompose_ahead(groups, "average", "directions", where)
    }


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
    groups = Groups(suite, None, later)
    for group in decompose_ahead(groups, "average", "directions", Serial()):
        group.directions("average")
    assert later.decompositions == 0


def test_progress_is_told_and_cancels_between_two(synthetic_suite: Make, tmp_path: Path) -> None:
    suite = synthetic_suite(2)
    told: list[tuple[int, int]] = []
    groups = Groups(suite, None, FactorStore(tmp_path))
    n = len(suite.matrices)
    list(
        decompose_ahead(
            groups,
            "base",
            "singular values",
            progress=Progress(lambda d, t, _: told.append((d, t))),
        )
    )
    assert told == [(i, n) for i in range(1, n + 1)]
    stop = Progress()
    seen = decompose_ahead(groups, "average", "directions", Serial(), stop)
    next(seen)
    stop.cancel.set()
    with pytest.raises(Cancelled):
        next(seen)


def test_each_is_released_unless_all_are_kept(synthetic_suite: Make, tmp_path: Path) -> None:
    for keep in (False, True):
        groups = Groups(synthetic_suite(2), None, FactorStore(tmp_path / str(keep)), keep=keep)
        list(decompose_ahead(groups, "average", "singular values"))
        held = {"members" in vars(group) for group in groups.members if group.decomposed}
        assert held == {keep}


def test_no_base_is_said_before_any_work(synthetic_suite: Make, tmp_path: Path) -> None:
    suite = synthetic_suite(2, with_base=False)
    groups = Groups(suite, None, FactorStore(tmp_path))
    with pytest.raises(SuiteError, match="names no base"):
        list(decompose_ahead(groups, "base", "directions"))
