"""Regret by brute force on a tiny suite, and the evidence that is shipped."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import data.evidence
from analysis.evaluation.evaluator import Evaluator
from analysis.rank_selection.input_proxies import INPUT_PROXIES
from analysis.rank_selection.regret import (
    best_setting,
    evidence,
    evidence_images,
    grid_scores,
    recommend_proxy,
    regret_by_images,
    regret_table,
    summary,
    tasks_effect,
)
from analysis.rank_selection.scores import image_scores
from analysis.rank_selection.space import SearchSpace, search_space
from merge_core.errors import Cancelled, RecipeError
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
        assert found["default"] == {("default", "rule")}
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


def rows(**columns: list) -> pd.DataFrame:
    """A regret table by hand; what is not given is alike in all rows."""
    count = len(next(iter(columns.values())))
    usual = {
        "suite": "s",
        "subset": "8",
        "method": "cart",
        "mode": "inputs",
        "search": "rule",
        "images": 0,
        "test_regret": 0.0,
        "test_low": -0.1,
    }
    return pd.DataFrame({**{k: [v] * count for k, v in usual.items()}, **columns})


class TestSummary:
    TABLE = rows(
        subset=["8", "4", "8", "4", "8"],
        proxy=["a", "a", "b", "b", "c"],
        regret=[0.01, 0.03, 0.015, 0.015, 0.0],
        test_regret=[0.02, -0.04, 0.0, 0.01, 0.5],
        test_low=[0.001, -0.1, -0.1, -0.1, 0.4],
        images=[10, 20, 5, 5, 5],
    )

    def test_by_hand(self) -> None:
        frame = summary(self.TABLE).set_index("proxy")
        assert list(frame.index) == ["c", "b", "a"]
        columns = ["cases", "mean", "worst", "test_mean", "test_worst", "lost", "images"]
        assert frame.loc["a", columns].tolist() == pytest.approx(
            [2, 0.02, 0.03, -0.01, 0.02, 0.5, 15]
        )
        assert frame.loc["b", columns].tolist() == pytest.approx(
            [2, 0.015, 0.015, 0.005, 0.01, 0, 5]
        )

    def test_only_proxies_measured_in_every_case_are_recommended(self) -> None:
        assert recommend_proxy("inputs", table=self.TABLE) == "b"

    def test_the_worst_case_decides_and_then_the_mean(self) -> None:
        names = {"subset": ["8", "4"] * 2, "proxy": ["a", "a", "b", "b"]}
        table = rows(**names, regret=[0.0, 0.5, 0.3, 0.3])
        assert recommend_proxy("inputs", table=table) == "b"
        table = rows(**names, regret=[0.3, 0.5, 0.5, 0.2])
        assert recommend_proxy("inputs", table=table) == "b"

    def test_the_test_split_has_no_part(self) -> None:
        table = rows(proxy=["a", "b"], regret=[0.1, 0.2], test_regret=[0.5, 0.0])
        assert recommend_proxy("inputs", table=table) == "a"

    def test_picks_from_the_full_grid_do_not_count(self) -> None:
        table = rows(
            proxy=["a", "a", "b", "b"],
            search=["grid", "adaptive"] * 2,
            regret=[0.0, 0.3, 0.2, 0.2],
        )
        assert recommend_proxy("inputs", table=table) == "b"

    def test_by_method(self) -> None:
        table = rows(
            method=["cart", "cart", "iso_c", "iso_c"],
            proxy=["a", "b"] * 2,
            regret=[0.1, 0.0, 0.0, 0.3],
        )
        assert recommend_proxy("inputs", "cart", table) == "b"
        assert recommend_proxy("inputs", "iso_c", table) == "a"
        assert recommend_proxy("inputs", table=table) == "a"

    def test_no_evidence_is_said(self) -> None:
        table = rows(proxy=["a"], regret=[0.1])
        with pytest.raises(RecipeError, match=r"mode 'weights'.*every method"):
            recommend_proxy("weights", table=table)
        with pytest.raises(RecipeError, match="measured for tsv_m"):
            recommend_proxy("inputs", "tsv_m", table)

    def test_one_row_per_case_by_number_of_tasks(
        self, tables: tuple[pd.DataFrame, pd.DataFrame]
    ) -> None:
        table = pd.concat([tables[0], tables[0].assign(subset="two", tasks=2)])
        frame = tasks_effect(table)
        assert frame["tasks"].tolist() == [2, 3]
        assert frame["subset"].tolist() == ["two", "all"]
        assert len(set(frame["best"])) == 1


class TestShipped:
    def test_covers_the_cases(self) -> None:
        table = evidence()
        bundled = table[table["suite"] == "vision"]
        found = set(zip(bundled["subset"], bundled["method"], strict=True))
        assert found == {(case.subset, case.method) for case in data.evidence.CASES}
        assert set(table["mode"]) == {"default", "weights", "inputs", "labels"}

    def test_numbers_fit_each_other(self) -> None:
        table = evidence()
        close = {"abs": 2e-4}  # of five digits written
        assert table["regret"].tolist() == pytest.approx(
            (table["best"] - table["accuracy"]).tolist(), **close
        )
        assert table["test_regret"].tolist() == pytest.approx(
            (table["test_best"] - table["test_accuracy"]).tolist(), **close
        )
        for prefix in ("", "test_"):
            assert (table[f"{prefix}low"] <= table[f"{prefix}regret"]).all()
            assert (table[f"{prefix}regret"] <= table[f"{prefix}high"]).all()
        grid = table[table["search"] == "grid"]
        assert (grid["regret"] >= -1e-9).all()
        assert (table["tied_rank_low"].isna() == table["best_rank"].isna()).all()

    def test_every_mode_has_a_default(self) -> None:
        assert recommend_proxy("inputs") in INPUT_PROXIES
        assert recommend_proxy("labels") == "accuracy"
        for method in ("cart", "task_arithmetic"):
            weights = evidence().query("mode == 'weights'")
            assert recommend_proxy("weights", method) in set(weights["proxy"])

    def test_few_images_lose_more(self) -> None:
        frame = evidence_images().query("proxy == 'agreement'")
        means = frame.groupby("images")["mean"].mean()
        assert means.is_monotonic_decreasing

    def test_a_copy_is_given(self) -> None:
        table = evidence()
        table["regret"] = 0.5
        assert not (evidence()["regret"] == 0.5).all()
