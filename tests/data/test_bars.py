"""The measuring program, on a toy suite."""

from __future__ import annotations

import pytest

import data.bars
from analysis.rank_selection.space import SearchSpace, search_space
from data.build_suite import main
from data.tasks import EIGHT


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("bars") / "suite"
    main(["--plan", "transformer", "--quick", "--output", str(output), "--device", "cpu"])
    return str(output / "suite.yaml")


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
    for task in EIGHT:
        assert text.count(f"| {task.name} | ") == 2
    assert "CART - Weight average, val: " in text
