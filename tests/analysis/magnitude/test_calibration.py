"""Calibration against loops over the definitions and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy

from analysis.averaging.soups import predict_classes
from analysis.magnitude.calibration import (
    BINS,
    MEASURES,
    excess_over_uniform,
    expected_calibration_error,
    measures,
)

SEEDS = st.integers(0, 10**6)


def draw(seed: int, n: int = 60, classes: int = 5, scale: float = 2.0):
    rng = np.random.default_rng(seed)
    return scale * rng.normal(size=(n, classes)), rng.integers(0, classes, n)


def loop_ece(confidence, correct, bins: int) -> float:
    total = 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        inside = [i for i, c in enumerate(confidence) if low < c <= high or (c == 0 and b == 0)]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            mean = sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - mean)
    return total


@given(SEEDS, st.integers(1, 20))
def test_calibration_error_is_the_sum_over_bins(seed: int, bins: int) -> None:
    rng = np.random.default_rng(seed)
    confidence, correct = rng.random(40), rng.random(40) < 0.5
    assert expected_calibration_error(confidence, correct, bins) == pytest.approx(
        loop_ece(confidence, correct, bins), abs=1e-12
    )


def test_bins_are_closed_on_the_right() -> None:
    # 0.5 belongs to the first of two bins, where it meets 0.3; apart they would give 0.4.
    confidence, correct = np.array([0.3, 0.5]), np.array([1.0, 0.0])
    assert expected_calibration_error(confidence, correct, 2) == pytest.approx(0.1)
    assert math.isnan(expected_calibration_error(np.empty(0), np.empty(0)))
    assert expected_calibration_error(np.array([0.0, 1.0]), np.array([0, 1])) == 0


@given(SEEDS)
def test_measures_are_numpys_and_scipys(seed: int) -> None:
    z, labels = draw(seed)
    reference = np.random.default_rng(seed + 1).integers(0, 5, len(z))
    p = softmax(z, axis=1)
    found = measures(labels, logits=torch.from_numpy(z), reference=reference)
    assert tuple(found) == MEASURES
    norm = np.linalg.norm(z, axis=1).mean()
    assert found == pytest.approx(
        {
            "accuracy": (z.argmax(axis=1) == labels).mean(),
            "stability": (z.argmax(axis=1) == reference).mean(),
            "confidence": p.max(axis=1).mean(),
            "entropy": entropy(p, axis=1).mean(),
            "entropy_relative": entropy(p, axis=1, base=5).mean(),
            "ece": loop_ece(p.max(axis=1), z.argmax(axis=1) == labels, BINS),
            "logit_norm": norm,
            "log10_logit_norm": np.log10(norm),
            "non_finite": 0.0,
        },
        abs=1e-12,
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 30.0])
def test_excess_keeps_its_order_where_probabilities_are_all_alike(scale: float) -> None:
    z, _ = draw(0, scale=scale)
    excess = excess_over_uniform(torch.from_numpy(z)).numpy()
    assert (excess.argmax(axis=1) == z.argmax(axis=1)).all()
    assert excess + 0.2 == pytest.approx(softmax(z, axis=1), abs=1e-14)
    # To first order p_k − 1/C = (z_k − mean z)/C.
    if scale < 1e-5:
        first = (z - z.mean(axis=1, keepdims=True)) / 5
        assert excess == pytest.approx(first, rel=1e-5, abs=1e-6 * scale)


@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_counted_and_never_right(broken: float) -> None:
    z, _ = draw(1, n=10)
    labels = z.argmax(axis=1)
    z[:4, 2] = broken
    labels[:4] = 2 if broken > 0 else 0
    whole = measures(labels[4:], logits=torch.from_numpy(z[4:]))
    found = measures(labels, logits=torch.from_numpy(z), reference=np.argmax(z, axis=1))
    assert found["non_finite"] == pytest.approx(0.4)
    assert found["accuracy"] == found["stability"] == pytest.approx(0.6)
    for name in ("confidence", "entropy", "ece", "logit_norm"):
        assert found[name] == pytest.approx(whole[name])
    # Lost before and after is not stable either.
    own = predict_classes(torch.from_numpy(z))
    assert measures(labels, logits=torch.from_numpy(z), reference=own)["stability"] == 0.6
    # Probabilities alone know it too.
    alone = measures(labels, excess=excess_over_uniform(torch.from_numpy(z)))
    assert alone["non_finite"] == pytest.approx(0.4)
    assert math.isnan(alone["logit_norm"])
    none = measures(labels[:4], logits=torch.from_numpy(z[:4]))
    assert none["accuracy"] == 0
    assert math.isnan(none["confidence"])
    assert math.isnan(none["ece"])


def test_norms_of_huge_logits_do_not_overflow() -> None:
    logits = torch.tensor([[3e200, 4e200]], dtype=torch.float64)
    found = measures(np.array([1]), logits=logits)
    assert found["logit_norm"] == pytest.approx(5e200)
    assert found["log10_logit_norm"] == pytest.approx(math.log10(5) + 200)
    assert found["confidence"] == 1
    assert found["entropy"] == 0


def test_one_class_has_no_entropy_and_nothing_is_no_model() -> None:
    found = measures(np.array([0]), logits=torch.zeros(1, 1))
    assert found["entropy_relative"] == 0
    assert found["accuracy"] == 1
    with pytest.raises(ValueError, match="needs logits"):
        measures(np.array([0]))
