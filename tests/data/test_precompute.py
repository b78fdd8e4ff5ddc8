"""What a suite ships of its first views: enough to show them without computing anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest

from analysis.comparison import first_result
from analysis.comparison.scaling import draw_subsets, task_counts
from analysis.evaluation.evaluator import Evaluator
from analysis.frames import recording
from analysis.frames.from_outputs import OutputFrames
from analysis.frames.from_weights import WeightFrames
from analysis.frames.record import load_record
from analysis.frames.scaling import scaling_if_known
from analysis.frames.store import FrameStore
from analysis.rank_selection.rule import Mode
from analysis.rank_selection.select import SelectionOptions
from analysis.rank_selection.space import SearchSpace, search_space
from data import precompute
from merge_core.factors.store import FactorStore
from merge_core.suites.suite import Suite, load_suite
from tests.evaluable import copy_evaluable, edit_document


def small_space(method: str, suite: str, tasks: Sequence[str] | None = None) -> SearchSpace:
    whole = search_space(method, suite, tasks)
    return SearchSpace(whole.base, whole.ranks[8:12:3], whole.scales[2:6:3])


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    for module in (precompute, recording, first_result):
        monkeypatch.setattr(module, "search_space", small_space)
    return copy_evaluable(tmp_path / "suite")


def stored(suite: Suite, target: Path, folder: Path) -> OutputFrames:
    """The outputs as another machine sees them: it has what is shipped, and cannot compute."""

    def none_here() -> Evaluator:
        raise AssertionError("something was computed")

    frames = FrameStore(folder / "empty", shipped=[folder / "absent", target])
    return OutputFrames(str(suite.path), suite, suite.tasks, frames, none_here, none_here)  # type: ignore[arg-type]


def test_what_is_shipped_makes_the_first_views_free(suite: Suite, tmp_path: Path) -> None:
    names = list(suite.tasks)
    suite = edit_document(suite.root, presets={"all": names, "two": names[:2]})
    target = precompute.precompute(str(suite.path))
    assert target == suite.root / "frames.mergescope"
    assert load_record(target).suite.tasks == suite.select(["all"])
    outputs = stored(suite, target, tmp_path)
    live = Evaluator(suite).experts(suite.tasks)
    assert outputs.experts("val")["correct"].tolist() == live["correct"].tolist()
    space = small_space("cart", str(suite.path), suite.tasks)
    for mode in get_args(Mode):
        assert outputs.select(space, SelectionOptions(mode)).rank > 0
    drawn = draw_subsets(suite.tasks, task_counts(len(suite.tasks)), 3)
    assert scaling_if_known(outputs, drawn) is not None
    for preset in ("all", "two"):
        chosen = load_suite(suite.path).restrict([preset])
        assert stored(chosen, target, tmp_path).first_result_if_known() is not None
    weights = WeightFrames(suite, suite.tasks, outputs.frames, FactorStore())
    before = set((tmp_path / "empty").glob("*"))
    assert len(weights.summary("average", False)) > 0
    assert set((tmp_path / "empty").glob("*")) == before  # it was read, not computed and kept
