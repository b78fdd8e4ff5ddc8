"""Regret by brute force on a tiny suite."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.evaluation.evaluator import Evaluator
from analysis.rank_selection.input_proxies import INPUT_PROXIES
from analysis.rank_selection.regret import (
    FIXED,
    best_setting,
    grid_scores,
    regret_by_images,
    regret_table,
    rule_regret,
)
from analysis.rank_selection.scores import image_scores
from analysis.rank_selection.space import SearchSpace, search_space
from analysis.rank_selection.weight_proxies import CONTENDERS
from merge_core.errors import Cancelled
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.progress import Progress
from merge_core.suites.suite import Suite
from tests.evaluable import IMAGES, TASKS, by_hand, copy_evaluable

# Chosen so that accuracy and agreement differ in their best setting, and it lies inside.
RANKS, SCALES = (0.2, 0.8), (0.5, 1.0, 1.5)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return copy_evaluable(tmp_path_factory.mktemp("regret") / "suite")


@pytest.fixture(scope="module")
def session(suite: Suite) -> MergeSession:
    return MergeSession(suite, None, FactorStore())


@pytest.fixture(scope="module")
def space(suite: Suite) -> SearchSpace:
    return search_space("cart", str(suite.path), None, RANKS, SCALES)


@pytest.fixture(scope="module")
def tables(
    suite: Suite, session: MergeSession, space: SearchSpace
) -> tuple[pd.DataFrame, pd.DataFrame]:
    return regret_table("all", space, session, Evaluator(suite))


def hits_by_hand(
    suite: Suite, session: MergeSession, rank: float, scale: float, split: str
) -> np.ndarray:
    """Hits (tasks x images) of CART, run by the bare timm model."""
    document = {"suite": str(suite.path), "method": "cart"}
    state = session.merge(make_recipe({**document, "parameters": {"rank": rank, "scale": scale}}))
    results = [by_hand(state, suite.root, task, split) for task in TASKS]
    return np.stack([classes == labels for classes, labels in results]).astype(float)


def paired_interval(gaps: np.ndarray) -> tuple[float, float]:
    """Bonett and Price's interval over tasks, written out, of T x images in −1, 0, 1."""
    T, n = gaps.shape
    more = n + 2 / T
    centre = (gaps.sum(axis=1) / more).mean()
    variance = ((np.abs(gaps).sum(axis=1) + 2 / T) / more**2).sum() / T**2
    half = stats.t.ppf(0.975, T * n + stats.norm.ppf(0.975) ** 2) * math.sqrt(variance)
    low, high = min(centre - half, gaps.mean()), max(centre + half, gaps.mean())
    ahead, behind = int((gaps > 0).sum()), int((gaps < 0).sum())
    if ahead + behind == 0 or stats.binomtest(ahead, ahead + behind).pvalue >= 0.05:
        return min(low, 0.0), max(high, 0.0)
    return (max(low, 0.0), high) if gaps.mean() > 0 else (low, min(high, 0.0))


class TestTable:
    def test_regrets_by_brute_force(
        self, suite: Suite, session: MergeSession, tables: tuple[pd.DataFrame, pd.DataFrame]
    ) -> None:
        settings = [(rank, scale) for rank in RANKS for scale in SCALES]
        means = [hits_by_hand(suite, session, *s, "val").mean() for s in settings]
        best = settings[int(np.flatnonzero(np.isclose(means, max(means)))[0])]
        assert best == (0.8, 1.0)
        table, _ = tables
        assert set(table["best_rank"]) == {best[0]}
        assert set(table["best_scale"]) == {best[1]}
        for row in table.drop_duplicates(["rank", "scale"]).itertuples():
            for split, prefix in (("val", ""), ("test", "test_")):
                top = hits_by_hand(suite, session, *best, split)
                there = hits_by_hand(suite, session, row.rank, row.scale, split)
                loss = top.mean() - there.mean()
                same = (row.rank, row.scale) == best
                low, high = (0.0, 0.0) if same else paired_interval(top - there)
                assert getattr(row, f"{prefix}accuracy") == pytest.approx(there.mean())
                assert getattr(row, f"{prefix}regret") == pytest.approx(loss)
                assert getattr(row, f"{prefix}low") == pytest.approx(low, abs=1e-9)
                assert getattr(row, f"{prefix}high") == pytest.approx(high, abs=1e-9)

    def test_who_recommends(self, tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
        table, _ = tables
        found = {
            mode: set(zip(rows["proxy"], rows["search"], strict=True))
            for mode, rows in table.groupby("mode")
        }
        both = ("grid", "adaptive")
        assert found["default"] == {("default", "rule"), *((name, "rule") for name in FIXED)}
        assert found["labels"] == {("accuracy", search) for search in both}
        assert found["inputs"] == {(name, search) for name in INPUT_PROXIES for search in both}
        assert {search for _, search in found["weights"]} == {"rule"}
        assert table.groupby("mode")["images"].max()[["default", "weights"]].tolist() == [0, 0]
        whole = len(RANKS) * len(SCALES) * len(TASKS) * IMAGES
        assert set(table.loc[table["search"] == "grid", "images"]) == {whole}
        default = table[table["mode"] == "default"].iloc[0]
        assert (default["rank"], default["scale"]) == (0.08, 1.0)
        assert (table["tasks"] == 3).all()
        assert (table["regret"] >= -1e-12)[table["search"] == "grid"].all()
        assert (table["regret"] == 0)[
            (table["mode"] == "labels") & (table["search"] == "grid")
        ].all()

    def test_the_best_is_in_its_tied_range(self, tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
        row = tables[0].iloc[0]
        assert row["tied_rank_low"] <= row["best_rank"] <= row["tied_rank_high"]
        assert row["tied_scale_low"] <= row["best_scale"] <= row["tied_scale_high"]

    def test_grid_picks_have_the_best_mean_score(
        self,
        suite: Suite,
        session: MergeSession,
        space: SearchSpace,
        tables: tuple[pd.DataFrame, pd.DataFrame],
    ) -> None:
        evaluator = Evaluator(suite)
        images = evaluator.outputs.images(TASKS, "val")
        rows = tables[0].query("search == 'grid'").set_index("proxy")
        for name, row in rows.iterrows():
            means = {}
            for recipe in space.recipes():
                scores = image_scores(str(name), recipe, session, evaluator, images)
                setting = (recipe.parameters["rank"], recipe.parameters["scale"])
                means[setting] = np.mean([each.mean() for each in scores.values()])
            assert means[row["rank"], row["scale"]] == pytest.approx(max(means.values()))

    def test_nothing_is_run_twice(
        self,
        suite: Suite,
        session: MergeSession,
        space: SearchSpace,
        tables: tuple[pd.DataFrame, pd.DataFrame],
    ) -> None:
        evaluator = Evaluator(suite)
        again = regret_table("all", space, session, evaluator)
        assert evaluator.outputs.forward_images == 0
        pd.testing.assert_frame_equal(again[0], tables[0])
        pd.testing.assert_frame_equal(again[1], tables[1])

    def test_rules_alone_are_measured_against_the_known_best(
        self,
        suite: Suite,
        session: MergeSession,
        space: SearchSpace,
        tables: tuple[pd.DataFrame, pd.DataFrame],
    ) -> None:
        table, _ = tables
        mine = table["mode"].isin(["default", "weights"])
        evaluator = Evaluator(suite)
        before = evaluator.outputs.forward_images
        found = rule_regret(table[~mine], space, session, evaluator)
        assert evaluator.outputs.forward_images == before  # all of it is stored
        expected = table[mine].reset_index(drop=True)
        pd.testing.assert_frame_equal(found, expected[list(found)])
        # A row whose setting still holds is kept, whatever it says; one that moved is not.
        told = table.assign(accuracy=0.123)
        told["scale"] = told["scale"].where(told["proxy"] != "alignment", 0.01)
        again = rule_regret(told, space, session, evaluator).set_index("proxy")["accuracy"]
        assert set(again.drop("alignment")) == {0.123}
        assert again["alignment"] == found.set_index("proxy")["accuracy"]["alignment"]
        brief = rule_regret(table, space, session, evaluator, brief=True)
        kept = (expected["mode"] == "default") | expected["proxy"].isin(CONTENDERS)
        assert brief["proxy"].tolist() == expected[kept]["proxy"].tolist()
        assert len(brief) < len(found)

    def test_a_stopped_grid_goes_on(
        self, suite: Suite, session: MergeSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path))
        space = search_space("task_arithmetic", str(suite.path), None, None, [0.11, 0.22, 0.33])
        progress = Progress()

        def stop(done: int, total: int, label: str) -> None:
            if done == 2:
                progress.cancel.set()

        progress.listener = stop
        first, second = Evaluator(suite), Evaluator(suite)
        with pytest.raises(Cancelled):
            grid_scores(space, session, first, ("entropy", "accuracy"), progress=progress)
        grid_scores(space, session, second, ("entropy", "accuracy"))
        assert first.outputs.forward_images == 2 * len(TASKS) * IMAGES
        assert second.outputs.forward_images == len(TASKS) * IMAGES


class TestChoosing:
    @given(st.data())
    def test_the_first_of_the_best(self, draw: st.DataObject) -> None:
        settings, images = draw.draw(st.integers(1, 6)), draw.draw(st.integers(1, 5))
        bits = st.lists(st.booleans(), min_size=images, max_size=images)
        rows = st.lists(bits, min_size=settings, max_size=settings)
        values = {task: np.array(draw.draw(rows), dtype=float) for task in "ab"}
        counts = [int(values["a"][i].sum() + values["b"][i].sum()) for i in range(settings)]
        assert best_setting(values) == counts.index(max(counts))

    def test_tasks_count_alike_whatever_their_number_of_images(self) -> None:
        values = {"few": np.array([[1.0, 1.0], [0.0, 0.0]]), "many": np.zeros((2, 100))}
        values["many"][1, :90] = 1
        assert best_setting(values) == 0  # 1.0 + 0.0 against 0.0 + 0.9

    def test_few_images_by_brute_force(self) -> None:
        source = np.random.default_rng(5)
        hits = {task: source.integers(0, 2, (4, 12)).astype(float) for task in "ab"}
        values = {"accuracy": hits, "entropy": {t: source.normal(size=(4, 12)) for t in "ab"}}
        accuracy = [(hits["a"][i].mean() + hits["b"][i].mean()) / 2 for i in range(4)]
        frame = regret_by_images(values, images=(3, 12, 50), draws=6).set_index("proxy")
        assert set(frame["images"]) == {3}  # twelve are all
        for name, row in frame.iterrows():
            losses = []
            for draw in range(6):
                drawn = np.random.default_rng([3, draw])
                order = {task: drawn.permutation(12)[:3] for task in "ab"}
                means = [sum(values[name][t][i, order[t]].mean() for t in "ab") for i in range(4)]
                losses.append(max(accuracy) - accuracy[int(np.argmax(np.round(means, 9)))])
            assert row["mean"] == pytest.approx(np.mean(losses))
            assert row["worst"] == pytest.approx(max(losses))

    def test_scores_that_are_the_same_everywhere_lose_nothing_with_few(self) -> None:
        hits = np.repeat(np.array([[0.0], [1.0], [0.0]]), 30, axis=1)
        frame = regret_by_images({"accuracy": {"a": hits}}, images=(10,), draws=3)
        assert frame["worst"].tolist() == [0.0]
