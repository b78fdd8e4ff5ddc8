"""``mergescope select-rank``: the library's numbers, printed and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.evaluation.evaluator import Evaluator
from analysis.outputs.prediction_store import PredictionStore
from analysis.rank_selection.select import Selection, SelectionOptions, select_rank
from analysis.rank_selection.space import search_space
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import load_recipe
from merge_core.suites.suite import load_suite
from mergescope import terminal
from tests.evaluable import copy_evaluable, edit_document
from tests.mergescope.test_cli import call

AXES = ("--ranks", "0.07,0.26,0.6", "--scales", "0.5,1.5,4")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the command and the library keep what they have run, each in a place of its own."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def folder(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(kept / "command"))
    monkeypatch.setenv("COLUMNS", "160")
    copy_evaluable(tmp_path / "suite")
    return tmp_path / "suite"


def library(folder: Path, kept: Path, mode: Any = "labels", **options: Any) -> Selection:
    """The same from Python, with stores of its own."""
    suite = load_suite(folder)
    space = search_space("cart", str(folder), None, (0.07, 0.26, 0.6), (0.5, 1.5, 4.0))
    evaluator = Evaluator(suite, PredictionStore(kept / "library.sqlite"))
    session = MergeSession(suite, None, FactorStore(kept / "library"))
    return select_rank(space, session, evaluator, SelectionOptions(mode, **options))


@pytest.mark.parametrize("mode", ["labels", "inputs", "weights"])
@pytest.mark.parametrize("full", [False, True])
def test_the_command_says_what_the_library_says(
    folder: Path,
    kept: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    mode: str,
    full: bool,
) -> None:
    csv, recipe = tmp_path / "points.csv", tmp_path / "recipe.yaml"
    arguments = ["select-rank", folder, *AXES, "--mode", mode, "--csv", csv, "--output", recipe]
    arguments += ["--every-proxy"]
    assert call(monkeypatch, *arguments, *(["--full-grid"] if full else [])) == 0
    printed = capsys.readouterr().out
    found = library(folder, kept, mode, full_grid=full, every_proxy=True)
    written, suite = load_recipe(recipe)
    # It names the suite, as what a merge writes does, and not its place.
    assert written.suite == suite.name
    assert written.model_copy(update={"suite": str(folder)}) == found.recipe
    assert suite.root == folder
    assert str(folder) not in recipe.read_text()
    table = pd.read_csv(csv)
    assert list(table) == list(found.points)
    for name in ("rank", "scale", "images", "score", "low", "high"):
        np.testing.assert_allclose(table[name].astype(float), found.points[name])
    assert f"recommended: rank {found.rank:.3g} " in printed
    assert f"scale {found.scale:.3g}\n" in printed
    assert " ".join(found.why.split()) in " ".join(printed.split())
    assert found.accuracy is not None
    assert f"validation: {found.accuracy['accuracy']:.1%} (" in printed
    assert found.report is not None
    assert f"test: {found.report['accuracy'].mean():.1%} (" in printed
    for title in found.picks["title"]:
        assert title[:12] in printed
    assert ("tell apart" in printed) == (mode != "weights")
    assert f"{terminal.size(found.low_rank_bytes or 0)} in factored form" in printed


def test_without_a_report_nothing_is_said_of_the_test_split(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    assert call(monkeypatch, "select-rank", folder, *AXES, "--no-report") == 0
    assert "test: " not in capsys.readouterr().out


def test_a_suite_that_cannot_be_evaluated_is_asked_for_its_weights(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    edit_document(folder, architecture=None)
    assert call(monkeypatch, "select-rank", folder, *AXES) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("recommended: rank ")
    assert "validation: " not in printed
    assert "labels" not in printed


def test_a_method_without_a_rank(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    arguments = ["--method", "task_arithmetic", "--scales", "0.1,0.4", "--tasks", "digits,lines"]
    assert call(monkeypatch, "select-rank", folder, *arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("recommended: scale 0.")
    assert "factored form" not in printed
