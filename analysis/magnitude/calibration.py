"""How far a classifier's confidence can be trusted, and what else its logits say.

Everything is float64. Images with a logit that is not finite are never predicted: they count as
wrong, and every mean over images leaves them out.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from analysis.averaging.soups import UNDECIDED
from analysis.averaging.soups import predict_classes as predicted_classes

BINS = 15
# What :func:`measures` gives, in its order.
MEASURES = (
    "accuracy",
    "stability",
    "confidence",
    "entropy",
    "entropy_relative",
    "ece",
    "logit_norm",
    "log10_logit_norm",
    "non_finite",
)


def excess_over_uniform(logits: Tensor) -> Tensor:
    """p_k − 1/C for the softmax p, exact to relative precision where all p_k are near 1/C.

    With e_k = expm1(z_k − max z): p_k = (1 + e_k)/(C + Σe), so that
    p_k − 1/C = (C·e_k − Σe) / (C·(C + Σe)) [derived]. Logits of 1e-20 still have a largest
    entry here, which their probabilities, all 1/C in float64, have not.

    Args:
        logits: N x C.

    Returns:
        float64, N x C; NaN in rows with logits that are not finite.

    Example:
        >>> excess = excess_over_uniform(torch.tensor([[1e-20, -1e-20]]))
        >>> bool(excess[0, 0] > 0 > excess[0, 1])
        True
    """
    z = logits.double()
    z = torch.where(z.isfinite().all(dim=1, keepdim=True), z, math.nan)
    e = torch.expm1(z - z.amax(dim=1, keepdim=True))
    total = e.sum(dim=1, keepdim=True)
    classes = z.shape[1]
    return (classes * e - total) / (classes * (classes + total))


def measures(
    labels: np.ndarray,
    *,
    logits: Tensor | None = None,
    excess: Tensor | None = None,
    reference: np.ndarray | None = None,
) -> dict[str, float]:
    """What a model's outputs say about its predictions; give logits, or probabilities alone.

    Args:
        labels: int64, N.
        logits: N x C.
        excess: N x C, probabilities minus 1/C, as of :func:`excess_over_uniform`; by default
            those of the logits.
        reference: N predictions to compare with; by default the model's own.

    Returns:
        accuracy (share), stability (share of predictions that equal the reference), confidence
        (mean of the largest probability), entropy (mean, nats), entropy_relative (divided by
        log C), ece (:func:`expected_calibration_error`), logit_norm (mean L2 norm of the
        logits; NaN without logits), log10_logit_norm (its logarithm), non_finite (share of
        images with outputs that are not finite: wrong and not stable, and outside all means,
        which are NaN where no image is left).

    Raises:
        ValueError: neither logits nor probabilities.

    Example:
        >>> found = measures(np.array([0, 1]), logits=torch.tensor([[9.0, 0.0], [9.0, 0.0]]))
        >>> found["accuracy"], round(found["confidence"], 2), round(found["ece"], 2)
        (0.5, 1.0, 0.5)
    """
    if excess is None:
        if logits is None:
            raise ValueError("measures needs logits or probabilities")
        excess = excess_over_uniform(logits)
    scores = excess if logits is None else logits
    predicted = predicted_classes(scores)
    finite = predicted != UNDECIDED
    correct = predicted == labels
    same = finite if reference is None else finite & (predicted == reference)
    kept = torch.from_numpy(finite)
    classes = excess.shape[1]
    p = (excess[kept] + 1 / classes).clamp(0, 1).numpy()
    confidence = p.max(axis=1)
    entropy = _mean(np.where(p > 0, -p * np.log(np.where(p > 0, p, 1)), 0).sum(axis=1))
    norm = math.nan if logits is None else _mean(_norms(logits[kept].double()))
    return {
        "accuracy": float(correct.mean()),
        "stability": float(same.mean()),
        "confidence": _mean(confidence),
        "entropy": entropy,
        "entropy_relative": entropy / math.log(classes) if classes > 1 else 0.0,
        "ece": expected_calibration_error(confidence, correct[finite]),
        "logit_norm": norm,
        "log10_logit_norm": math.log10(norm) if norm > 0 else math.nan,
        "non_finite": float(1 - finite.mean()),
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _norms(logits: Tensor) -> np.ndarray:
    """L2 norms of rows, without squaring what would overflow."""
    largest = logits.abs().amax(dim=1).clamp(min=1e-300)
    return ((logits / largest[:, None]).norm(dim=1) * largest).numpy()


def _bin_of(confidence: np.ndarray, bins: int) -> np.ndarray:
    """Number of the bin ((b)/bins, (b+1)/bins] of each confidence; 0 falls into the first."""
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="left")


def expected_calibration_error(
    confidence: np.ndarray, correct: np.ndarray, bins: int = BINS
) -> float:
    """Σ_b (n_b/n)·|accuracy of bin b − mean confidence of bin b|, bins of equal width.

    Args:
        confidence: the probability of the predicted class, N, in [0, 1].
        correct: whether the prediction is right, N.
        bins: how many.

    Returns:
        In [0, 1]; NaN for no images.

    Source: Guo et al., arXiv:1706.04599, equation 3 (15 bins, closed on the right).

    Example:
        >>> confidence = np.array([0.9, 0.9, 0.9, 0.9])
        >>> round(expected_calibration_error(confidence, np.array([True, True, True, False])), 2)
        0.15
    """
    if len(confidence) == 0:
        return math.nan
    gap = np.asarray(correct, dtype=float) - confidence
    sums = np.bincount(_bin_of(confidence, bins), weights=gap, minlength=bins)
    return float(np.abs(sums).sum() / len(gap))
