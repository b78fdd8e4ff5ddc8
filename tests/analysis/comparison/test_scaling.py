"""Merges of subsets of tasks, against the evaluator and against counting by hand."""

from __future__ import annotations

import threading
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.comparison.scaling import (
    METHODS,
    accuracy_over_tasks,
    draw_subsets,
    summarise_over,
    task_counts,
)
from analysis.evaluation.evaluator import Evaluator
from analysis.frames.from_outputs import OutputFrames
from analysis.frames.scaling import scaling, scaling_if_known
from analysis.frames.store import FrameStore
from analysis.outputs.prediction_store import PredictionStore
from analysis.rank_selection.select import SelectionOptions, select_rank
from analysis.rank_selection.space import search_space
from merge_core.errors import Cancelled
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.methods import get_method
from merge_core.progress import Progress
from merge_core.suites.suite import Suite
from tests.evaluable import TASKS, copy_evaluable

NAMES = {name: get_method(name).title for name in METHODS}


@settings(max_examples=40, deadline=None)
@given(total=st.integers(2, 24), repeats=st.integers(1, 6), seed=st.integers(0, 99))
def test_subsets_are_different_and_of_the_sizes_asked_for(
    total: int, repeats: int, seed: int
) -> None:
    tasks = [f"t{i}" for i in range(total)]
    counts = task_counts(total)
    assert counts[0] == 2
    assert counts[-1] == total
    assert len(counts) <= 7
    subsets = draw_subsets(tasks, counts, repeats, seed)
    assert len(set(subsets)) == len(subsets)
    assert draw_subsets(tasks, counts, repeats, seed) == subsets
    for count in counts:
        mine = [subset for subset in subsets if len(subset) == count]
        assert len(mine) == min(repeats, comb(total, count))
        assert all(sorted(subset, key=tasks.index) == list(subset) for subset in mine)


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Suite, Evaluator, FactorStore]:
    suite = copy_evaluable(tmp_path / "suite")
    predictions = PredictionStore(tmp_path / "predictions")
    return suite, Evaluator(suite, predictions), FactorStore(tmp_path / "factors")


def test_each_subset_is_merged_and_evaluated_on_its_own_tasks(
    parts: tuple[Suite, Evaluator, FactorStore],
) -> None:
    suite, evaluator, factors = parts
    subsets = [("digits", "lines"), TASKS]
    frame = accuracy_over_tasks(str(suite.path), suite, subsets, evaluator, factors)
    assert frame["method"].tolist() == [*NAMES.values()] * 2
    assert frame["count"].tolist() == [2] * 5 + [3] * 5
    assert frame["subset"].unique().tolist() == ["digits + lines", "digits + shapes + lines"]
    experts = evaluator.experts(suite.tasks, "test").set_index("task")["accuracy"]
    for subset in subsets:
        session = MergeSession(suite, subset, FactorStore())
        for name, title in NAMES.items():
            recipe = make_recipe({"suite": str(suite.path), "tasks": subset, "method": name})
            if name == "task_arithmetic" or (name == "cart" and len(subset) > 2):
                space = search_space(name, str(suite.path), subset)
                recipe = select_rank(space, session, None, SelectionOptions("weights")).recipe
            wanted = evaluator.recipe(recipe, session, "test").set_index("task")["accuracy"]
            row = frame[(frame["method"] == title) & (frame["count"] == len(subset))].iloc[0]
            assert row["accuracy"] == pytest.approx(wanted.mean())
            assert row["normalised"] == pytest.approx(np.mean(wanted / experts[list(subset)]))


def test_it_is_cancelled_between_two_merges(parts: tuple[Suite, Evaluator, FactorStore]) -> None:
    suite, evaluator, factors = parts
    seen: list[str] = []
    cancel = threading.Event()

    def listen(done: int, total: int, label: str) -> None:
        seen.append(label)
        if done == 1:
            cancel.set()

    progress = Progress(listener=listen, cancel=cancel)
    with pytest.raises(Cancelled):
        accuracy_over_tasks("s", suite, [TASKS], evaluator, factors, progress=progress)
    assert seen[0] == "Weight average, 3 tasks"


def test_the_range_is_over_the_subsets_of_a_size() -> None:
    frame = pd.DataFrame(
        {
            "method": ["A", "B", "A", "A"],
            "count": [2, 2, 2, 3],
            "accuracy": [0.5, 0.1, 0.8, 0.6],
        }
    )
    found = summarise_over(frame, "count", "accuracy").set_index(["method", "count"])
    assert found.loc[("A", 2)].tolist() == [pytest.approx(0.65), 0.5, 0.8, 2]
    assert found.loc[("B", 2)].tolist() == [pytest.approx(0.1), 0.1, 0.1, 1]
    assert found.loc[("A", 3)].tolist() == [pytest.approx(0.6), 0.6, 0.6, 1]


def test_it_is_kept_by_content(parts: tuple[Suite, Evaluator, FactorStore], tmp_path: Path) -> None:
    suite, evaluator, factors = parts
    store = FrameStore(tmp_path / "frames")

    def ask() -> OutputFrames:
        session = MergeSession(suite, TASKS, factors)
        return OutputFrames("s", suite, TASKS, store, lambda: session, lambda: evaluator)

    assert scaling_if_known(ask(), [TASKS]) is None
    frame = scaling(ask(), [TASKS], factors)
    known = scaling_if_known(ask(), [TASKS])
    assert known is not None
    pd.testing.assert_frame_equal(known, frame)
    assert scaling_if_known(ask(), [TASKS[:2]]) is None
