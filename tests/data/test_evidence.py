"""The command that rebuilds the evidence."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analysis.evaluation.evaluator import Evaluator
from analysis.rank_selection.evidence import shipped
from analysis.rank_selection.space import SearchSpace, search_space
from data import evidence, suite_plans
from data.evidence import CASES, GRIDS, SETS, Case
from data.tasks import TASKS as TASKS_OF_PLANS
from merge_core.errors import SuiteError
from merge_core.suites.suite import Suite, load_suite
from tests.evaluable import TASKS, copy_evaluable


def test_sets_are_those_of_the_plans() -> None:
    plans = {plan.name: plan for plan, _ in suite_plans.PLANS.values()}
    assert set(SETS) == set(CASES) == set(shipped.KINDS)
    for name, sets in SETS.items():
        for label, chosen in sets.items():
            assert len(set(chosen)) == len(chosen)
            if name in plans:
                tasks = {task.name for task in TASKS_OF_PLANS}
                assert set(chosen) <= tasks | set(plans[name].presets)
            if len(chosen) > 1:
                assert len(chosen) == int("".join(filter(str.isdigit, label)))
        cases = CASES[name]
        assert len(set(cases)) == len(cases)
        assert {case.subset for case in cases if case.method == "cart"} <= set(sets)
        assert all(case.subset in sets for case in cases)


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """An evaluable suite that the evidence knows, with a cache and tables of its own."""
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    suite = copy_evaluable(tmp_path / "suite")
    monkeypatch.setattr(evidence, "SETS", {suite.name: {"all": TASKS, "two": TASKS[:2]}})
    for name in ("EVIDENCE", "EVIDENCE_IMAGES"):
        monkeypatch.setattr(evidence, name, tmp_path / f"{name}.csv")
    monkeypatch.setattr(shipped, "EVIDENCE", tmp_path / "EVIDENCE.csv")
    return suite


def test_grids_of_a_case(suite: Suite) -> None:
    whole = search_space("cart", str(suite.path), TASKS[:2])
    assert Case("two", "cart").space(suite) == whole
    second = Case("two", "cart", "every second").space(suite)
    assert second.ranks == tuple(whole.ranks[i] for i in range(1, 20, 2))
    assert second.scales == tuple(whole.scales[i] for i in range(1, 20, 2))
    few = Case("two", "cart", "few").space(suite)
    assert (few.ranks, few.scales) == GRIDS["few"]
    assert few.base == second.base == whole.base
    # A method without a rank has scales of its own size.
    sums = Case("two", "task_arithmetic", "few").space(suite)
    assert sums.ranks == ()
    assert max(sums.scales) == max(search_space("task_arithmetic", "vision").scales)


def test_rows_of_other_suites_stay(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = (Case("all", "task_arithmetic"), Case("two", "cart", brief=True))
    monkeypatch.setattr(evidence, "CASES", {suite.name: cases})
    monkeypatch.setattr(Case, "space", small_space)
    evidence.rebuild([str(suite.path)])
    table = pd.read_csv(evidence.EVIDENCE, dtype={"subset": str})
    assert list(dict.fromkeys(table["subset"])) == ["all", "two"]
    for case, measured, few in evidence.measure(str(suite.path), cases):
        mine = table[table["subset"] == case.subset].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, measured, check_dtype=False, rtol=1e-4, atol=1e-6)
        images = pd.read_csv(evidence.EVIDENCE_IMAGES)
        assert list(images) == list(few)
    assert "task_arithmetic, all: best" in capsys.readouterr().out
    # Other suites' rows stay as they are, and one's own are not doubled.
    other = table.assign(suite="elsewhere")
    pd.concat([other, table]).to_csv(evidence.EVIDENCE, index=False)
    evidence.rebuild([str(suite.path)])
    again = pd.read_csv(evidence.EVIDENCE, dtype={"subset": str})
    pd.testing.assert_frame_equal(
        again[again["suite"] == "elsewhere"].reset_index(drop=True), other.reset_index(drop=True)
    )
    assert len(again) == 2 * len(table)


def small_space(case: Case, suite: Suite) -> SearchSpace:
    """The settings of a case, few of them."""
    tasks = TASKS[:2] if case.subset == "two" else TASKS
    if case.method == "cart":
        return search_space("cart", str(suite.path), tasks, [0.2, 0.8], [0.5, 1.0])
    return search_space(case.method, str(suite.path), tasks, None, [0.1, 0.4])


def test_rules_are_measured_again_alone(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = (Case("all", "task_arithmetic"), Case("two", "task_arithmetic"))
    monkeypatch.setattr(evidence, "CASES", {suite.name: cases})
    monkeypatch.setattr(Case, "space", small_space)
    monkeypatch.setattr(evidence, "CASES", {suite.name: cases[:1]})
    evidence.rebuild([str(suite.path)])
    before = pd.read_csv(evidence.EVIDENCE, dtype={"subset": str})
    stale = before.assign(scale=before["scale"].where(before["mode"] != "weights", 0.9))
    stale.to_csv(evidence.EVIDENCE, index=False)
    monkeypatch.setattr(evidence, "CASES", {suite.name: cases})  # the second was never measured
    evidence.remeasure_rules([str(suite.path)])
    after = pd.read_csv(evidence.EVIDENCE, dtype={"subset": str})
    key = ["mode", "proxy", "search"]
    pd.testing.assert_frame_equal(
        after.sort_values(key, ignore_index=True)[list(before)],
        before.sort_values(key, ignore_index=True),
        check_dtype=False,
    )


def test_a_suite_without_these_tasks_is_refused(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "SETS", {suite.name: {"4a": ("digits", "unheard_of")}})
    with pytest.raises(SuiteError, match="unheard_of"):
        list(evidence.measure(str(suite.path), [Case("4a", "cart")]))
    assert Evaluator(load_suite(str(suite.path))).outputs.forward_images == 0
