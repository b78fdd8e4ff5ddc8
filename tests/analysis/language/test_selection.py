"""Rank and scale of small trained language models, from 32 texts a task."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from analysis.accuracy import difference, paired_differences
from analysis.comparison.run import run_comparison
from analysis.cross_entropy import linearised
from analysis.evaluation.evaluator import Evaluator
from analysis.metrics import mean_over_tasks
from analysis.outputs.prediction_store import PredictionStore
from analysis.rank_selection.select import SelectionOptions, select_rank
from analysis.rank_selection.space import SearchSpace, search_space
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.suites.suite import Suite, load_suite
from tests.language_models import LLAMA, TASKS, build, trained_suite

SCALES = [0.1, 0.4, 0.8, 2.0]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return load_suite(trained_suite(tmp_path_factory.mktemp("trained")))


@pytest.fixture(scope="module")
def tools(
    suite: Suite, tmp_path_factory: pytest.TempPathFactory
) -> tuple[MergeSession, Evaluator, SearchSpace]:
    folder = tmp_path_factory.mktemp("kept")
    session = MergeSession(suite, None, FactorStore(folder))
    space = search_space("task_arithmetic", str(suite.path), suite.tasks, None, SCALES)
    return session, Evaluator(suite, PredictionStore(folder / "kept.sqlite")), space


def states(suite: Suite) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    base = suite.base
    assert base is not None
    start = {name: base.tensor(name).double() for name in base}
    own = {t: {n: suite.expert(t).tensor(n).double() for n in start} for t in suite.tasks}
    return start, own


def by_hand(suite: Suite, evaluator: Evaluator, scale: float) -> tuple[float, float]:
    """Cross-entropy of θ₀ + λ Σ τ_t and KL to the experts, float64, mean over tasks."""
    start, own = states(suite)
    merged = {n: start[n] + scale * sum(own[t][n] - start[n] for t in own) for n in start}
    model, expert = (build("llama", **LLAMA).double() for _ in range(2))
    model.load_state_dict(merged)
    losses, gaps = [], []
    for task in suite.tasks:
        expert.load_state_dict(own[task])
        loss = gap = count = 0.0
        for each in evaluator.outputs.raw_inputs(task, "val").sequences:
            ids = torch.from_numpy(each.tokens.astype(np.int64))
            with torch.no_grad():
                p, q = (
                    m(input_ids=ids[None]).logits[0, :-1].log_softmax(-1) for m in (model, expert)
                )
            loss -= float(p.gather(1, ids[1:, None]).sum())
            gap += float((q.exp() * (q - p)).sum())
            count += len(ids) - 1
        losses.append(loss / count)
        gaps.append(gap / count)
    return float(np.mean(losses)), float(np.mean(gaps))


@pytest.mark.parametrize("mode", ["labels", "inputs"])
def test_the_lowest_is_recommended(suite: Suite, tools: Any, mode: Any) -> None:
    session, evaluator, space = tools
    found = select_rank(space, session, evaluator, SelectionOptions(mode, full_grid=True))
    expected = [by_hand(suite, evaluator, scale)[mode == "inputs"] for scale in SCALES]
    assert found.scale == SCALES[int(np.argmin(expected))]
    assert 0 < int(np.argmin(expected)) < len(SCALES) - 1  # a best one within
    shown = found.points.sort_values("scale")["score"].to_numpy()
    np.testing.assert_allclose(shown if mode == "labels" else -shown, expected, atol=1e-5)
    assert found.points["low"].lt(found.points["high"]).all()
    assert found.points.loc[found.points["scale"] == found.scale, "tied"].all()
    assert found.report is not None
    assert mean_over_tasks(found.report)["cross_entropy"].iloc[0] > 0
    worst = found.points.loc[found.points["scale"] == SCALES[int(np.argmax(expected))]]
    assert not worst["tied"].any()  # 32 texts a task tell the worst from the best


def test_weights_alone_run_nothing(suite: Suite, tools: Any) -> None:
    session, evaluator, space = tools
    options = SelectionOptions("weights", report=False)
    assert select_rank(space, session, evaluator, options).forward_images == 0


def test_methods_are_ranked_by_lower(suite: Suite, tools: Any) -> None:
    session, evaluator, _ = tools
    found = run_comparison(
        str(suite.path), ["average", "task_arithmetic", "ties"], session, evaluator
    )
    values = found.summary["cross_entropy"].to_numpy()
    assert list(values) == sorted(values)
    worst = found.tasks.loc[found.tasks.groupby("label")["cross_entropy"].idxmax()]
    told = found.summary.set_index("label")["worst_task"]
    assert told[worst["label"]].tolist() == worst["task"].tolist()
    own = found.experts.set_index("task")["cross_entropy"]
    for row in found.summary.to_dict("records"):
        mine = found.tasks[found.tasks["label"] == row["label"]].set_index("task")
        assert row["normalised"] == pytest.approx((own / mine["cross_entropy"]).mean())
    pairs = paired_differences(found.hits)
    for row in pairs.to_dict("records"):
        gap = [found.hits[row["first"]][t] - found.hits[row["second"]][t] for t in TASKS]
        assert row["difference"] == pytest.approx(np.mean([each.mean() for each in gap]))
        assert row["low"] <= row["difference"] <= row["high"]


def test_an_interval_of_equal_texts_leaves_their_lengths_out() -> None:
    tokens = np.array([3.0, 9.0, 6.0])
    weights = tokens / tokens.mean()
    np.testing.assert_allclose(linearised(2.5 * weights, weights), 2.5)


def test_a_difference_of_losses_has_a_welch_interval() -> None:
    from scipy.stats import t

    random = np.random.default_rng(0)
    first, second = ({"a": random.normal(size=30), "b": random.normal(size=20)} for _ in range(2))
    found = difference(first, second)
    gaps = [first[task] - second[task] for task in first]
    parts = np.array([each.var(ddof=1) / len(each) for each in gaps])
    freedom = parts.sum() ** 2 / (parts**2 / [29, 19]).sum()
    half = t.ppf(0.975, freedom) * np.sqrt(parts.sum()) / 2
    centre = np.mean([each.mean() for each in gaps])
    assert found.gap == pytest.approx(centre)
    low, high = min(centre - half, 0), max(centre + half, 0)  # p is on the safe side
    assert found.p > 0.05
    assert (found.low, found.high) == pytest.approx((low, high))
