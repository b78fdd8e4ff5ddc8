"""The search: what it finds on surfaces that are known, what it spends, and that it resumes."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from scipy.stats import t as student

import analysis.rank_selection.adaptive as module
from analysis.evaluation.evaluator import Evaluator
from analysis.outputs.prediction_store import PredictionStore
from analysis.rank_selection.adaptive import Search, adaptive_search, exhaustive_search
from analysis.rank_selection.scores import image_scores
from analysis.rank_selection.space import RANKS, SearchSpace, search_space
from merge_core.errors import Cancelled, RecipeError
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.progress import Progress
from merge_core.suites.suite import Suite
from tests.evaluable import IMAGES, copy_evaluable

COUNTS = {"a": 120, "b": 200, "c": 90}
SCALES = tuple(np.arange(1, 21) / 2.5)
GRID = search_space("cart", ".", None, RANKS, SCALES)
LINE = search_space("task_arithmetic", ".", None, scales=tuple(np.arange(1, 21) / 20))
Values = dict[str, np.ndarray]
World = Callable[[SearchSpace, Values], tuple[SearchSpace, Any, Any]]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Scores (settings x images per task) instead of a suite."""

    def make(space: SearchSpace, values: Values) -> tuple[SearchSpace, Any, Any]:
        place = {recipe: i for i, recipe in enumerate(map(str, space.recipes()))}

        def scores(name: str, recipe: Any, session: Any, evaluator: Any, images: Any, *_: Any):  # type: ignore[no-untyped-def]
            row = place[str(recipe)]
            return {task: values[task][row, numbers] for task, numbers in images.items()}

        monkeypatch.setattr(module, "image_scores", scores)
        session = types.SimpleNamespace(groups=types.SimpleNamespace(tasks=tuple(values)))
        outputs = types.SimpleNamespace(
            forward_images=0,
            images=lambda tasks, split: {t: np.arange(values[t].shape[1]) for t in tasks},
            unit_weights=lambda task, split: None,  # all images count alike
        )
        return space, session, types.SimpleNamespace(outputs=outputs)

    return make


def hits(surface: np.ndarray, seed: int, counts: dict[str, int] = COUNTS) -> Values:
    """Images that are hit where a smooth score of their own exceeds a threshold of their own."""
    random = np.random.default_rng(seed)
    places = np.linspace(0, 1, surface.size)
    return {
        task: (
            norm.cdf(random.normal(size=n))[None]
            + 0.1 * np.sin(9 * places[:, None] + random.uniform(0, 6, n))
            < surface.reshape(-1, 1)
        ).astype(float)
        for task, n in counts.items()
    }


def bell(rank: float, scale: float) -> np.ndarray:
    """A peak of 80 % at places in [0, 1] of a 20 x 20 grid, 40 % far from it."""
    x, y = np.meshgrid(np.linspace(0, 1, 20), np.linspace(0, 1, 20), indexing="ij")
    return 0.4 + 0.4 * np.exp(-(((x - rank) / 0.25) ** 2) - ((y - scale) / 0.4) ** 2)


def means(values: Values) -> np.ndarray:
    result: np.ndarray = np.mean([each.mean(axis=1) for each in values.values()], axis=0)
    return result


def gap(search: Search, space: SearchSpace, values: Values) -> float:
    """Points below the best setting of all."""
    rank = space.ranks.index(search.rank) if space.ranks else 0
    scale = space.scales.index(search.scale) if space.scales else 0
    whole = means(values)
    return 100 * float(whole.max() - whole[rank * max(len(space.scales), 1) + scale])


class TestFinding:
    @pytest.mark.parametrize("peak", [(0.5, 0.6), (0.0, 0.0), (1.0, 1.0), (0.3, 1.0)])
    def test_a_peak_anywhere(self, world: World, peak: tuple[float, float]) -> None:
        values = hits(bell(*peak), seed=1)
        space, session, evaluator = world(GRID, values)
        search = adaptive_search(space, session, evaluator)
        assert gap(search, space, values) <= 0.3
        assert search.asked_images <= search.grid_images / 8

    def test_seeds_differ_in_images_not_in_the_answer(self, world: World) -> None:
        values = hits(bell(0.4, 0.7), seed=2)
        space, session, evaluator = world(GRID, values)
        found = [adaptive_search(space, session, evaluator, seed=seed) for seed in range(5)]
        assert max(gap(each, space, values) for each in found) <= 0.3
        first = [
            each.points[each.points["images"] == each.points["images"].min()] for each in found
        ]
        assert len({tuple(each["score"].head(10)) for each in first}) == 5
        for each in found:  # few images may score higher; the curve has the most
            most = each.points.groupby("rank")["images"].max()
            assert each.curve["images"].tolist() == most.tolist()
        again = adaptive_search(space, session, evaluator, seed=3)
        pd.testing.assert_frame_equal(again.points, found[3].points)

    def test_scores_that_are_not_shares(self, world: World) -> None:
        """Their unit and origin do not matter."""
        random = np.random.default_rng(3)
        surface = bell(0.5, 0.5).reshape(-1, 1)
        values = {t: surface + 0.3 * random.normal(size=(1, n)) for t, n in COUNTS.items()}
        values = {t: v + 0.02 * random.normal(size=v.shape) for t, v in values.items()}
        scaled = {t: 50 * v - 1000 for t, v in values.items()}
        found = []
        for each in (values, scaled):
            space, session, evaluator = world(GRID, each)
            found.append(adaptive_search(space, session, evaluator))
            best = means(each)
            assert gap(found[-1], space, each) <= 1 * np.ptp(best)  # in hundredths
        assert (found[0].rank, found[0].scale) == (found[1].rank, found[1].scale)

    def test_one_axis(self, world: World) -> None:
        surface = 0.4 + 0.4 * np.exp(-(((np.linspace(0, 1, 20) - 0.3) / 0.3) ** 2))
        values = hits(surface, seed=4)
        space, session, evaluator = world(LINE, values)
        search = adaptive_search(space, session, evaluator)
        assert np.isnan(search.rank)
        assert gap(search, space, values) <= 0.3
        assert search.points["rank"].isna().all()
        pd.testing.assert_frame_equal(search.curve, search.points)

    def test_of_equal_settings_the_lowest(self, world: World) -> None:
        values = {
            t: np.tile(np.arange(n) < n // 2, (400, 1)).astype(float) for t, n in COUNTS.items()
        }
        space, session, evaluator = world(GRID, values)
        exhaustive = exhaustive_search(space, session, evaluator)
        assert (exhaustive.rank, exhaustive.scale) == (RANKS[0], SCALES[0])
        assert exhaustive.points["tied"].all()
        search = adaptive_search(space, session, evaluator)
        whole = search.points[search.points["images"] == search.points["images"].max()]
        assert search.rank == whole["rank"].min()
        assert whole["tied"].all()

    @pytest.mark.filterwarnings("error")  # such as the mean of no image
    @pytest.mark.parametrize("count", [1, 2, 10])
    def test_very_few_images(self, world: World, count: int) -> None:
        values = hits(bell(0.5, 0.5), seed=5, counts={"a": count, "b": 40})
        space, session, evaluator = world(GRID, values)
        search = adaptive_search(space, session, evaluator)
        assert search.asked_images <= search.grid_images / 8
        assert np.isfinite(search.points.to_numpy(float)).all()


class TestFrames:
    @pytest.fixture
    def found(self, world: World) -> tuple[Search, Search, Values]:
        values = hits(bell(0.5, 0.5), seed=6)
        args = world(GRID, values)
        return adaptive_search(*args), exhaustive_search(*args), values

    def test_scores_and_intervals_by_hand(self, found: tuple[Search, Search, Values]) -> None:
        search, exhaustive, values = found
        assert search.grid_images == exhaustive.asked_images == 400 * 410
        np.testing.assert_allclose(exhaustive.points["score"], means(values))
        # Price and Bonett's, of three tasks: z²/6 successes and failures more for each.
        more = np.array(list(COUNTS.values()))[:, None] + norm.ppf(0.975) ** 2 / 3
        right = np.stack([values[task].sum(axis=1) for task in COUNTS])
        shares = (right + norm.ppf(0.975) ** 2 / 6) / more
        half = student.ppf(0.975, more.sum()) * np.sqrt((shares * (1 - shares) / more).sum(0)) / 3
        low, high = shares.mean(0) - half, shares.mean(0) + half
        np.testing.assert_allclose(exhaustive.points["low"], low, atol=1e-6)
        np.testing.assert_allclose(exhaustive.points["high"], high, atol=1e-6)
        both = search.points.merge(exhaustive.points, on=["rank", "scale"], suffixes=("", "_all"))
        assert len(both) == len(search.points)
        whole = both[both["images"] == both["images_all"]]
        np.testing.assert_allclose(whole["score"], whole["score_all"])
        assert search.asked_images == pytest.approx(3 * search.points["images"].sum())
        inside = (both["low"] <= both["score_all"]) & (both["score_all"] <= both["high"])
        assert inside.mean() > 0.9

    def test_tied_by_hand(self, found: tuple[Search, Search, Values]) -> None:
        _, exhaustive, values = found
        best = int(means(values).argmax())
        tied = []
        for other in range(400):
            gaps = [v[best] - v[other] for v in values.values()]
            error = np.sqrt(sum(g.var(ddof=1) / len(g) for g in gaps)) / 3
            mean = np.mean([g.mean() for g in gaps])
            tied.append(mean == 0 or norm.sf(mean / error) >= 0.05 / 399)
        assert exhaustive.points["tied"].tolist() == tied
        assert 1 < sum(tied) < 400

    def test_only_settings_run_on_all_images_tie(
        self, found: tuple[Search, Search, Values]
    ) -> None:
        points = found[0].points
        assert (points.loc[points["tied"], "images"] == points["images"].max()).all()
        assert points["images"].nunique() > 2
        recommended = points[points["score"] == points.loc[points["tied"], "score"].max()]
        assert [found[0].rank, found[0].scale] in recommended[["rank", "scale"]].to_numpy().tolist()

    def test_the_curve_has_the_best_of_each_rank(
        self, found: tuple[Search, Search, Values]
    ) -> None:
        search, exhaustive, values = found
        assert search.curve["rank"].tolist() == list(RANKS)
        np.testing.assert_allclose(
            exhaustive.curve["score"], means(values).reshape(20, 20).max(axis=1)
        )
        here = search.curve[search.curve["rank"] == search.rank].iloc[0]
        assert here["scale"] == search.scale

    def test_what_is_expected_is_no_luck(self, world: World) -> None:
        """Of the best score a part is luck; new images are foretold better than by the scores."""
        truth, closer, lower = bell(0.5, 0.5).reshape(-1, 1), [], []
        for seed in range(4):
            random = np.random.default_rng(seed)
            rough = {t: random.normal(size=(400, n)) for t, n in COUNTS.items()}
            values = {t: truth + 0.4 * v + 0.3 * v[:1] for t, v in rough.items()}
            points = exhaustive_search(*world(GRID, values)).points
            # Up to what all settings share, which these images cannot tell.
            gaps = [(points[name] - truth[:, 0]).std() for name in ("expected", "score")]
            closer.append(gaps[0] / gaps[1])
            best = points.loc[points["score"].idxmax()]
            lower.append(best["score"] - best["expected"])
        assert np.mean(closer) < 0.7
        assert np.mean(lower) > 0.01


class TestWithASuite:
    @pytest.fixture
    def suite(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
        monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
        return copy_evaluable(tmp_path / "suite")

    @pytest.fixture
    def space(self) -> SearchSpace:
        return search_space("cart", ".", None, [1, 2, 4, 8, 16], tuple(np.arange(1, 9) / 2))

    @pytest.mark.parametrize("score", ["accuracy", "agreement", "entropy", "cosine"])
    def test_scores_are_those_of_the_evaluator(
        self, suite: Suite, space: SearchSpace, score: str
    ) -> None:
        session, evaluator = MergeSession(suite, None, FactorStore()), Evaluator(suite)
        search = adaptive_search(space, session, evaluator, score)
        images = evaluator.outputs.images(suite.tasks, "val")
        for row in search.points[search.points["images"] == IMAGES].to_dict("records"):
            values = image_scores(
                score, space.recipe(int(row["rank"]), row["scale"]), session, evaluator, images
            )
            assert row["score"] == pytest.approx(np.mean([v.mean() for v in values.values()]))
        assert search.forward_images >= search.asked_images - 1

    def test_a_cancelled_search_goes_on_where_it_was(
        self, suite: Suite, space: SearchSpace, tmp_path: Path
    ) -> None:
        session = MergeSession(suite, None, FactorStore())
        alone = adaptive_search(
            space, session, Evaluator(suite, PredictionStore(tmp_path / "alone"))
        )
        progress, events = Progress(), []

        def stop(done: int, total: int, label: str) -> None:
            events.append((done, total, label))
            if done > alone.asked_images / 2:
                progress.cancel.set()

        progress.listener = stop
        first = Evaluator(suite)
        with pytest.raises(Cancelled):
            adaptive_search(space, session, first, progress=progress)
        assert 0 < first.outputs.forward_images < alone.asked_images
        assert events[0][2] == "rank 1, scale 1.5"
        second = adaptive_search(space, session, Evaluator(suite))
        pd.testing.assert_frame_equal(second.points, alone.points)
        assert (second.rank, second.scale) == (alone.rank, alone.scale)
        assert second.asked_images == alone.asked_images
        # The point in work was finished, too.
        assert second.forward_images == alone.forward_images - first.outputs.forward_images
        third = adaptive_search(space, session, Evaluator(suite))
        assert third.forward_images == 0
        pd.testing.assert_frame_equal(third.points, alone.points)

    def test_progress_ends_at_its_total(self, suite: Suite, space: SearchSpace) -> None:
        events: list[tuple[int, int, str]] = []
        session = MergeSession(suite, None, FactorStore())
        adaptive_search(
            space, session, Evaluator(suite), progress=Progress(lambda *e: events.append(e))
        )
        done = [event[0] for event in events]
        assert done == sorted(done)
        assert events[-1][0] == events[-1][1]
        assert all(event[0] <= event[1] for event in events)

    def test_an_unknown_score(self, suite: Suite, space: SearchSpace) -> None:
        session = MergeSession(suite, None, FactorStore())
        with pytest.raises(RecipeError, match="no score 'luck'; choose from accuracy"):
            adaptive_search(space, session, Evaluator(suite), "luck")
