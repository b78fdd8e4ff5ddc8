"""The measuring program, on a toy suite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import data.bars
from analysis.evaluation.evaluator import Evaluator
from analysis.outputs.prediction_store import PredictionStore
from analysis.rank_selection.space import SearchSpace, search_space
from data.build_suite import main
from data.tasks import TASKS
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.suites.suite import load_suite


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("bars") / "suite"
    main(["--quick", "--output", str(output), "--device", "cpu"])
    return str(output / "suite.yaml")


def test_gap_is_the_difference_of_paired_means(toy: str, tmp_path: Path) -> None:
    suite = load_suite(toy)
    session = MergeSession(suite, None, FactorStore())
    evaluator = Evaluator(suite, PredictionStore(tmp_path / "predictions.sqlite"))
    average, far = (
        make_recipe(
            {"suite": toy, "tasks": session.groups.tasks, "method": method, "parameters": chosen}
        )
        for method, chosen in (("average", {}), ("cart", {"rank": 0.1, "scale": 10.0}))
    )
    frames = [evaluator.recipe(recipe, session) for recipe in (far, average)]
    expected = np.mean(frames[0]["accuracy"] - frames[1]["accuracy"])
    mean, half = data.bars.gap(far, average, session, evaluator, "val")
    assert mean == pytest.approx(expected)
    assert half > 0  # the scale is so large that some answers change
    assert data.bars.gap(average, far, session, evaluator, "val") == pytest.approx((-mean, half))
    assert data.bars.gap(average, average, session, evaluator, "val") == (0, 0)


def test_report_has_a_row_for_every_model_and_task(
    toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(method: str, suite: str, tasks: tuple[str, ...]) -> SearchSpace:
        ranks = [0.5] if method == "cart" else None
        return search_space(method, suite, tasks, ranks, [1.0])

    monkeypatch.setattr(data.bars, "search_space", small)
    text = data.bars.report(toy)
    for model in data.bars.MODELS:
        assert text.count(f"| {model} | ") >= 1
    for task in TASKS:
        assert text.count(f"| {task.name} | ") == 2
    assert "CART - Weight average, val: " in text
