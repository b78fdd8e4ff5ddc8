"""Sweeps: which points, in which order, at what cost, and what is called the best."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.evaluation import Evaluator, mean_accuracy
from analysis.sweep import (
    DEFAULT_SCALES,
    RANKS,
    SCALES,
    best_point,
    grid,
    known_sweep,
    mean_over_tasks,
    normalised_by_experts,
    sweep,
)
from merge_core.engine import MergeSession
from merge_core.errors import Cancelled, RecipeError
from merge_core.factors import FactorStore
from merge_core.progress import Progress
from merge_core.recipe import make_recipe
from merge_core.suite import Suite
from tests.evaluable import IMAGES, evaluable


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    return evaluable(tmp_path / "suite")


@pytest.fixture
def session(suite: Suite) -> MergeSession:
    return MergeSession(suite, None, FactorStore())


class TestGrid:
    def test_points_with_ranks_outermost(self) -> None:
        recipes = grid("cart", "demo", ["b", "a"], [0.5, 8], [1, 2.5])
        assert [(r.parameters["rank"], r.parameters["scale"]) for r in recipes] == [
            (0.5, 1.0),
            (0.5, 2.5),
            (8, 1.0),
            (8, 2.5),
        ]
        assert all(r.tasks == ("b", "a") and r.suite == "demo" for r in recipes)

    def test_whole_ranks_are_directions_and_shares_are_shares(self) -> None:
        one, whole = grid("cart", "demo", None, [1], [1.0]) + grid("cart", "demo", None, [1.0], [1])
        assert type(one.parameters["rank"]) is int
        assert type(whole.parameters["rank"]) is float
        assert type(whole.parameters["scale"]) is float

    @pytest.mark.parametrize("method", ["cart", "low_rank_task_arithmetic", "task_arithmetic"])
    def test_the_usual_grid(self, method: str) -> None:
        ranks = 1 if method == "task_arithmetic" else len(RANKS)
        assert len(grid(method, "demo", None)) == ranks * len(SCALES[method])
        assert SCALES[method] == tuple(sorted(set(SCALES[method])))
        assert tuple(sorted(set(RANKS))) == RANKS

    def test_a_method_without_usual_scales(self) -> None:
        got = [r.parameters["scale"] for r in grid("iso_c", "demo", None)]
        assert got == list(DEFAULT_SCALES)

    @pytest.mark.parametrize(
        ("method", "ranks", "scales", "words"),
        [
            ("average", None, None, "neither a rank nor a scale"),
            ("task_arithmetic", [0.5], None, "'task_arithmetic' has no rank; leave --ranks out"),
            ("average", None, [1.0], "'average' has no scale; leave --scales out"),
            ("bogus", None, None, "no method 'bogus'. Known: average"),
            ("cart", [0], None, "rank.*got 0"),
            ("cart", [1.5], None, "rank.*got 1.5"),
            ("cart", [-3], None, "rank.*got -3"),
            ("cart", [float("nan")], None, "rank"),
            ("cart", None, [11], "scale"),
            ("cart", None, [float("inf")], "scale"),
            ("cart", [0.1, 0.2, 0.1], None, "--ranks names 0.1 twice"),
            ("cart", [1, 1.0], None, "1 is one direction, 1.0 all of them"),
            ("cart", None, [2, 2.0], "--scales names 2 twice"),
        ],
    )
    def test_refusals(
        self, method: str, ranks: list[float] | None, scales: list[float] | None, words: str
    ) -> None:
        with pytest.raises(RecipeError, match=words):
            grid(method, "demo", None, ranks, scales)


class TestSweep:
    def test_rows_are_those_of_single_evaluations(
        self, suite: Suite, session: MergeSession
    ) -> None:
        recipes = grid("cart", ".", None, [2, 0.5], [0.5, 3])
        frame = sweep(recipes, session, Evaluator(suite))
        assert frame[["rank", "scale"]].drop_duplicates().to_numpy().tolist() == [
            [2.0, 0.5],
            [2.0, 3.0],
            [0.5, 0.5],
            [0.5, 3.0],
        ]
        assert frame["task"].tolist() == [*suite.tasks] * 4
        for i, recipe in enumerate(recipes):
            alone = Evaluator(suite).recipe(recipe, session)
            mine = frame.iloc[3 * i : 3 * i + 3][alone.columns].reset_index(drop=True)
            pd.testing.assert_frame_equal(mine, alone)
        assert len(set(frame["correct"])) > 1

    def test_a_method_without_rank(self, suite: Suite, session: MergeSession) -> None:
        frame = sweep(grid("task_arithmetic", ".", None), session, Evaluator(suite), limit=3)
        assert frame["rank"].isna().all()
        assert len(mean_over_tasks(frame)) == len(SCALES["task_arithmetic"])
        assert (frame["images"] == 3).all()

    def test_at_full_rank_cart_is_the_average(self, suite: Suite, session: MergeSession) -> None:
        evaluator = Evaluator(suite)
        average = evaluator.recipe(make_recipe({"method": "average"}), session)
        frame = sweep(grid("cart", ".", None, [1.0], [0.5, 2, 8]), session, evaluator)
        for _, mine in frame.groupby("scale"):
            assert mine["correct"].tolist() == average["correct"].tolist()
        low = sweep(grid("cart", ".", None, [2], [2]), session, evaluator)  # it can differ
        assert low["correct"].tolist() != average["correct"].tolist()

    def test_a_cancelled_sweep_goes_on_where_it_was(
        self, suite: Suite, session: MergeSession
    ) -> None:
        recipes = grid("cart", ".", None, [0.25, 0.5, 0.75], [1, 2])
        progress = Progress()

        def stop(done: int, total: int, label: str) -> None:
            assert total == 6
            if done == 2:
                progress.cancel.set()

        progress.listener = stop
        first = Evaluator(suite)
        with pytest.raises(Cancelled):
            sweep(recipes, session, first, progress=progress)
        assert first.forward_images == 2 * 3 * IMAGES
        second = Evaluator(suite)
        assert known_sweep(recipes, session, second) is None
        whole = sweep(recipes, session, second)
        assert second.forward_images == 4 * 3 * IMAGES
        known = known_sweep(recipes, session, second)
        assert known is not None
        pd.testing.assert_frame_equal(known, whole)

    def test_only_a_whole_sweep_is_known(self, suite: Suite, session: MergeSession) -> None:
        evaluator = Evaluator(suite)
        recipes = grid("cart", ".", None, [0.25], [1, 2])
        assert known_sweep(recipes, session, evaluator) is None
        sweep(recipes[:1], session, evaluator)
        assert known_sweep(recipes[:1], session, evaluator) is not None
        assert known_sweep(recipes, session, evaluator) is None
        assert known_sweep(recipes[:1], session, evaluator, "test") is None
        assert known_sweep(recipes[:1], session, evaluator, "val", 4) is None
        assert evaluator.forward_images == 3 * IMAGES  # asking runs nothing

    def test_progress_names_the_point(self, suite: Suite, session: MergeSession) -> None:
        events: list[tuple[int, int, str]] = []
        recipes = grid("cart", ".", None, [3], [0.5, 2])
        progress = Progress(lambda *event: events.append(event))
        sweep(recipes, session, Evaluator(suite), limit=2, progress=progress)
        assert events == [
            (0, 2, "rank 3, scale 0.5"),
            (1, 2, "rank 3, scale 2"),
            (2, 2, "done"),
        ]


def test_of_equal_points_the_lowest_rank_and_scale_is_best() -> None:
    rows = [(0.5, 1, 0.9), (0.1, 3, 0.9), (0.1, 2, 0.9), (0.05, 1, 0.8), (0.1, 1, 0.85)]
    for order in (rows, rows[::-1]):
        frame = pd.DataFrame(order, columns=["rank", "scale", "accuracy"])
        best = best_point(frame)
        assert (best["rank"], best["scale"], best["accuracy"]) == (0.1, 2, 0.9)
    without_rank = pd.DataFrame({"rank": np.nan, "scale": [3, 1, 2], "accuracy": [0.5, 0.2, 0.5]})
    assert best_point(without_rank)["scale"] == 2


def test_normalised_by_the_tasks_own_expert() -> None:
    experts = pd.DataFrame({"task": ["a", "b"], "accuracy": [0.5, 0.8]})
    frame = pd.DataFrame({"task": ["b", "a", "b"], "accuracy": [0.4, 0.5, 0.88]})
    got = normalised_by_experts(frame, experts)
    assert got["normalised"].tolist() == pytest.approx([0.5, 1.0, 1.1])
    assert "normalised" not in frame


def test_the_mean_is_per_setting() -> None:
    frame = pd.DataFrame(
        {
            "method": "cart",
            "rank": [0.1, 0.1, 0.2, 0.2],
            "scale": 1.0,
            "accuracy": [0.2, 0.4, 0.6, 1.0],
            "images": 10,
        }
    )
    assert mean_over_tasks(frame)["accuracy"].tolist() == pytest.approx([0.3, 0.8])
    assert mean_accuracy(frame)["accuracy"].tolist() == pytest.approx([0.55])
