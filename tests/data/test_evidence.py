"""The command that rebuilds the evidence."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analysis.evaluation.evaluator import Evaluator
from analysis.rank_selection.space import search_space
from data import evidence
from data.evidence import CASES, FURTHER, SUBSETS, Case
from merge_core.errors import SuiteError
from merge_core.suites.suite import load_suite
from tests.evaluable import copy_evaluable


def test_cases_are_those_of_the_bundled_suite() -> None:
    tasks = set(load_suite("vision").tasks)
    for name, subset in SUBSETS.items():
        chosen = subset or tuple(tasks)
        assert set(chosen) <= tasks
        assert len(set(chosen)) == len(chosen) == int(name[0])
    assert len(set(CASES)) == len(CASES)
    assert len(set(FURTHER)) == len(FURTHER)
    assert {case.subset for case in CASES if case.method == "cart"} == set(SUBSETS)


def test_a_coarse_case_takes_every_second_step_of_each_axis() -> None:
    whole = search_space("cart", "vision", SUBSETS["4a"])
    coarse = Case("4a", "cart", coarse=True).space("vision")
    assert coarse.ranks == tuple(whole.ranks[i] for i in range(1, 20, 2))
    assert coarse.scales == tuple(whole.scales[i] for i in range(1, 20, 2))
    assert coarse.base == whole.base
    assert Case("4a", "cart").space("vision") == whole


def test_rebuild_writes_both_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    suite = copy_evaluable(tmp_path / "suite")
    cases = (Case("8", "task_arithmetic"),)
    for name in ("EVIDENCE", "EVIDENCE_IMAGES"):
        monkeypatch.setattr(evidence, name, tmp_path / f"{name}.csv")
    monkeypatch.setattr(evidence, "BUNDLED", str(suite.path))
    monkeypatch.setattr(evidence, "CASES", cases)
    monkeypatch.setattr(evidence, "FURTHER", cases)
    space = search_space("task_arithmetic", str(suite.path), None, None, [0.1, 0.4])
    monkeypatch.setattr(Case, "space", lambda self, reference: space)
    evidence.rebuild([str(suite.path)])
    table = pd.read_csv(tmp_path / "EVIDENCE.csv", dtype={"subset": str})
    ((_, measured, few),) = evidence.measure(str(suite.path), cases)
    assert len(table) == 2 * len(measured)
    half = table.iloc[: len(measured)].reset_index(drop=True)
    pd.testing.assert_frame_equal(half, measured, check_dtype=False, rtol=1e-4, atol=1e-6)
    images = pd.read_csv(tmp_path / "EVIDENCE_IMAGES.csv")
    assert list(images) == list(few)
    assert len(images) == 2 * len(few)
    assert "task_arithmetic, 8: best" in capsys.readouterr().out


def test_a_suite_without_these_tasks_is_refused(tmp_path: Path) -> None:
    suite = copy_evaluable(tmp_path / "suite")
    with pytest.raises(SuiteError, match="letters"):
        list(evidence.measure(str(suite.path), [Case("4a", "cart")]))
    assert Evaluator(suite).outputs.forward_images == 0
