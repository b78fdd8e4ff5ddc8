"""The covariance identity, and the size of differences between rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.averaging.ensembles import rule_logits
from analysis.averaging.gaps import (
    covariance_frame,
    covariance_summary,
    covariance_term,
    gap_to_ensemble,
    sample_indices,
)
from analysis.outputs.pool_outputs import PoolEvaluator
from tests.pools import ARCHITECTURES, CLASSES, IMAGES, write_pool

MEMBERS = (0, 1, 2)


@pytest.fixture(scope="module")
def evaluators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PoolEvaluator]:
    folder = tmp_path_factory.mktemp("gaps")
    return {f: PoolEvaluator(write_pool(folder / f, f)) for f in ARCHITECTURES}


@pytest.mark.parametrize("family", list(ARCHITECTURES))
def test_the_ensembles_differ_by_the_covariance_of_heads_and_features(
    evaluators: dict[str, PoolEvaluator], family: str
) -> None:
    evaluator = evaluators[family]
    difference = rule_logits(evaluator, MEMBERS, "logit_ensemble", "test") - rule_logits(
        evaluator, MEMBERS, "feature_ensemble_averaged_head", "test"
    )
    term = covariance_term(evaluator, MEMBERS, "test")
    assert term.shape == (IMAGES["test"], CLASSES)
    assert torch.allclose(term, difference, atol=1e-5)
    if family == "linear":  # all members have the same features
        assert float(term.abs().max()) == 0
    else:
        assert float(term.abs().max()) > 1e-2


def test_the_covariance_term_is_its_sum(evaluators: dict[str, PoolEvaluator]) -> None:
    evaluator = evaluators["vit"]
    name = evaluator.network.head_name
    W = np.stack([evaluator.weights(m)[f"{name}.weight"].numpy() for m in MEMBERS]).astype(float)
    phi = np.stack([evaluator.member(m, "val").features.numpy() for m in MEMBERS]).astype(float)
    expected = np.einsum("mcw,miw->ic", W - W.mean(axis=0), phi - phi.mean(axis=0)) / 3
    assert covariance_term(evaluator, MEMBERS, "val").numpy() == pytest.approx(expected, abs=1e-9)


def test_summary_of_the_covariance(evaluators: dict[str, PoolEvaluator]) -> None:
    evaluator = evaluators["mlp"]
    row = covariance_summary(evaluator, MEMBERS, "test").iloc[0]
    whole = rule_logits(evaluator, MEMBERS, "logit_ensemble", "test").numpy()
    averaged = rule_logits(evaluator, MEMBERS, "feature_ensemble_averaged_head", "test").numpy()
    assert row["rms"] == pytest.approx(np.sqrt(np.mean((whole - averaged) ** 2)), rel=1e-5)
    assert row["rms_logits"] == pytest.approx(np.sqrt(np.mean(whole**2)))
    assert row["ratio"] == pytest.approx(row["rms"] / row["rms_logits"])
    assert row["changed"] == np.mean(whole.argmax(axis=1) != averaged.argmax(axis=1))
    assert row["deviation"] < 1e-5
    assert row[["images", "non_finite"]].tolist() == [IMAGES["test"], 0]


def test_summary_of_the_gap(evaluators: dict[str, PoolEvaluator]) -> None:
    evaluator = evaluators["resnet"]
    for statistics in ("average", "reestimate"):
        row = gap_to_ensemble(evaluator, MEMBERS, "test", statistics).iloc[0]
        whole = rule_logits(evaluator, MEMBERS, "logit_ensemble", "test").numpy()
        soup = rule_logits(evaluator, MEMBERS, "uniform_soup", "test", statistics).numpy()
        assert row["rms"] == pytest.approx(np.sqrt(np.mean((soup - whole) ** 2)))
        assert row["changed"] == np.mean(whole.argmax(axis=1) != soup.argmax(axis=1))
    linear = gap_to_ensemble(evaluators["linear"], MEMBERS).iloc[0]
    assert linear["ratio"] < 1e-5
    assert linear["changed"] == 0


def test_images_without_finite_logits_are_left_out_and_counted(tmp_path: Path) -> None:
    """Weights so large that a member overflows on some images only."""

    def loud(number, state):
        return {name: 5e12 * value for name, value in state.items()} if number == 2 else state

    evaluator = PoolEvaluator(write_pool(tmp_path / "p", "mlp", change=loud))
    finite = torch.isfinite(evaluator.member(2, "test").logits).all(dim=1)
    lost = int((~finite).sum())
    assert 0 < lost < IMAGES["test"]
    row = gap_to_ensemble(evaluator, MEMBERS, "test").iloc[0]
    assert row["non_finite"] == lost
    whole = rule_logits(evaluator, MEMBERS, "logit_ensemble", "test")[finite]
    assert row["rms_logits"] == pytest.approx(float(whole.square().mean().sqrt()))
    assert np.isfinite(covariance_summary(evaluator, MEMBERS).iloc[0]["deviation"])


def test_logits_image_by_image(evaluators: dict[str, PoolEvaluator]) -> None:
    evaluator = evaluators["vgg"]
    frame = covariance_frame(evaluator, MEMBERS, "test", limit=7)
    places = sample_indices(IMAGES["test"], 7).tolist()
    assert frame["image"].tolist() == [p for p in places for _ in range(CLASSES)]
    assert frame["class"].tolist() == list(range(CLASSES)) * 7
    whole = rule_logits(evaluator, MEMBERS, "logit_ensemble", "test").numpy()
    for row in frame.itertuples():
        assert row.logit_ensemble == whole[row.image, row[2]]
        assert row.measured == pytest.approx(row.logit_ensemble - row.averaged_head)
        assert row.predicted == pytest.approx(row.measured, abs=1e-5)


@given(st.integers(1, 300), st.integers(1, 300))
def test_samples_are_sorted_different_and_the_same_each_time(count: int, limit: int) -> None:
    places = sample_indices(count, limit).tolist()
    assert len(places) == min(count, limit)
    assert places == sorted(set(places))
    assert 0 <= places[0]
    assert places[-1] < count
    assert places == sample_indices(count, limit).tolist()
