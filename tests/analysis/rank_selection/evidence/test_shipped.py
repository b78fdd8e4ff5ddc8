"""What follows from regret tables, by hand, and the tables that are shipped."""

from __future__ import annotations

import pandas as pd
import pytest

import data.evidence
from analysis.rank_selection.evidence.shipped import (
    EVIDENCE,
    EVIDENCE_IMAGES,
    TIED,
    evidence,
    evidence_images,
    held_out,
    kind_of,
    recommend_proxy,
    summary,
    tasks_effect,
)
from analysis.rank_selection.input_proxies import INPUT_PROXIES
from merge_core.errors import RecipeError


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

    def test_one_row_per_case_by_number_of_tasks(self) -> None:
        own = {"subset": ["8", "2", "8", "2"], "tasks": [8, 2, 8, 2], "proxy": ["a", "a", "b", "b"]}
        best = {key: [0.1, 0.2, 0.1, 0.2] for key in ["best_rank", "best_scale", "best", *TIED]}
        frame = tasks_effect(rows(**own, **best))
        assert frame["tasks"].tolist() == [2, 8]
        assert frame["best_rank"].tolist() == [0.2, 0.1]


class TestHeldOut:
    """Chosen on the other suites, counted on the one left out."""

    TABLE = rows(
        suite=["s", "s", "t", "t", "u", "u"],
        proxy=["a", "b"] * 3,
        regret=[0.0, 0.1, 0.05, 0.02, 0.04, 0.03],
    )

    def test_no_suite_chooses_its_own_rule(self) -> None:
        frame = held_out("inputs", "cart", self.TABLE).set_index("suite")
        # Worst over t and u: b. Over s and u: a (0.04 against 0.1). Over s and t: a.
        assert frame["proxy"].to_dict() == {"s": "b", "t": "a", "u": "a"}
        assert frame["mean"].to_dict() == {"s": 0.1, "t": 0.05, "u": 0.04}
        assert recommend_proxy("inputs", table=self.TABLE) == "a"

    def test_a_rule_that_was_not_measured_there_is_not_taken(self) -> None:
        table = self.TABLE.drop(index=[1])
        frame = held_out("inputs", "cart", table).set_index("suite")
        assert frame["proxy"].to_dict() == {"s": "a", "t": "a", "u": "a"}

    def test_one_suite_has_no_others(self) -> None:
        assert held_out("inputs", "cart", self.TABLE.iloc[:2]).empty


class TestShipped:
    def test_covers_the_cases(self) -> None:
        table = evidence()
        for suite, own in table.groupby("suite"):
            found = set(zip(own["subset"], own["method"], strict=True))
            cases = data.evidence.CASES[str(suite)]
            assert found <= {(case.subset, case.method) for case in cases}
            assert kind_of(str(suite)) != suite
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

    def test_the_files_are_small(self) -> None:
        assert EVIDENCE.stat().st_size + EVIDENCE_IMAGES.stat().st_size < 1_000_000
