"""The measuring program, on a toy suite."""

from __future__ import annotations

import numpy as np
import pytest

import data.bars
from analysis.rank_selection.space import SearchSpace, search_space
from data.bars import Bar
from data.build_suite import main
from data.tasks import EIGHT
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.suites.suite import load_suite


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
    text, met = data.bars.report(toy)
    assert not met  # a toy of two steps
    for model in data.bars.MODELS:
        assert text.count(f"| {model} | ") >= 1
    for task in EIGHT:
        assert text.count(f"| {task.name} | ") == 2
    for bar in data.bars.BARS:
        assert f"| {bar.title} | " in text
    assert "CART - Weight average, val: " in text


@pytest.mark.parametrize(
    ("bar", "value", "signs", "met"),
    [
        (Bar("a", least=4, sign=0), 4.0, False, True),
        (Bar("a", least=4, sign=0), 3.9, False, False),
        (Bar("a", least=4, sign=0), 0.1, True, True),
        (Bar("a", least=4, sign=0), -0.1, True, False),
        (Bar("a", most=0.9, sign=1), 0.95, False, False),
        (Bar("a", most=0.9, sign=1), 0.95, True, True),
        (Bar("a", most=0.9, sign=1), 1.05, True, False),
        (Bar("a", least=0.5, most=4), 4.1, False, False),
        (Bar("a", least=0.5, most=4), 4.1, True, True),
    ],
)
def test_bars_are_bounds_or_signs(bar: Bar, value: float, signs: bool, met: bool) -> None:
    assert bar.is_met(value, signs) is met


def test_interference_is_that_of_the_definition(toy: str) -> None:
    """Against ‖S_i V_iᵀ V_j S_j‖_F by numpy's decompositions of two matrices."""
    session = MergeSession(load_suite(toy), ("digits", "dots", "lines"), FactorStore())
    ratios = []
    for group in session.groups.members:
        if not group.decomposed:
            continue
        experts = group.experts.double().numpy()
        found = []
        for about in (experts.mean(axis=0), group.base.double().numpy()):
            k = max(1, int(0.08 * min(experts.shape[1:])))
            parts = []
            for matrix in experts - about:
                _, s, vt = np.linalg.svd(matrix, full_matrices=False)
                parts.append((s[:k] / np.linalg.norm(s[:k]))[:, None] * vt[:k])
            found.append(
                sum(
                    np.linalg.norm(parts[i] @ parts[j].T)
                    for i in range(3)
                    for j in range(3)
                    if i != j
                )
            )
        ratios.append(found)
    centred, original = np.array(ratios).T
    whole, lower = data.bars._interference(session)
    assert whole == pytest.approx(centred.sum() / original.sum(), rel=1e-4)
    assert lower == (centred < original).mean()
