"""Differences between rules, logit by logit: what explains them, and what they change.

Logit ensemble against feature ensemble differ by a covariance, soup and logit ensemble by the
curvature of the network (:mod:`analysis.averaging.curvature`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.averaging.ensembles import head, rule_logits
from analysis.averaging.soups import Statistics
from analysis.outputs.pool_outputs import PoolEvaluator, PoolSplit


def covariance_term(
    evaluator: PoolEvaluator, members: Sequence[int], split: PoolSplit = "test"
) -> Tensor:
    """(1/N) Σ (W_i − W̄)(φ_i − φ̄), summed as it stands: float64, images x classes.

    It equals logit ensemble − feature ensemble with averaged head. [derived]: expand the mean of
    W_i φ_i + b_i about W̄ and φ̄; both cross terms sum to zero.

    Raises:
        MergeScopeError: unfit members or data.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> covariance_term(PoolEvaluator(load_pool("digits-mlp-shared")), [0, 1]).shape
        torch.Size([500, 10])
    """
    N = len(members)
    weights = [head(evaluator, m)[0] for m in members]
    features = [evaluator.member(m, split).features.double() for m in members]
    mean_weight, mean_feature = sum(weights) / N, sum(features) / N
    terms = zip(features, weights, strict=True)
    return (
        sum(
            ((f - mean_feature) @ (w - mean_weight).T for f, w in terms),
            start=torch.zeros(len(features[0]), len(weights[0]), dtype=torch.float64),
        )
        / N
    )


def covariance_summary(
    evaluator: PoolEvaluator, members: Sequence[int], split: PoolSplit = "test"
) -> pd.DataFrame:
    """How large the covariance term is, what it changes, and whether the identity holds.

    Returns:
        One row: rms (of the term over images and classes), rms_logits (of the logit ensemble),
        ratio (rms/rms_logits), changed (share of predictions in which the two ensembles
        differ), images, non_finite (images left out), deviation (largest |logit ensemble −
        averaged-head ensemble − term|, in logits).

    Raises:
        MergeScopeError: unfit members or data.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> frame = covariance_summary(PoolEvaluator(load_pool("digits-mlp-shared")), [0, 1])
        >>> bool(frame["deviation"][0] < 1e-4 < frame["rms"][0])  # the identity holds
        True
    """
    whole = rule_logits(evaluator, members, "logit_ensemble", split)
    averaged = rule_logits(evaluator, members, "feature_ensemble_averaged_head", split)
    term = covariance_term(evaluator, members, split)
    row = _measure_difference(term, whole, averaged)
    finite = torch.isfinite(whole - averaged - term).all(dim=1)
    left = (whole - averaged - term)[finite]
    row["deviation"] = float(left.abs().max()) if len(left) else np.nan
    return pd.DataFrame([row])


def covariance_frame(
    evaluator: PoolEvaluator,
    members: Sequence[int],
    split: PoolSplit = "test",
    limit: int = 200,
) -> pd.DataFrame:
    """The two ensembles and their covariance term, image by image.

    Args:
        evaluator: of the pool.
        members: member numbers.
        split: which images.
        limit: the number of images (see :func:`sample_indices`).

    Returns:
        One row per image and class: image (its index in the split), class, logit_ensemble,
        averaged_head, measured (their difference), predicted (the covariance term).

    Raises:
        MergeScopeError: unfit members or data.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-mlp-shared"))
        >>> frame = covariance_frame(evaluator, [0, 1], limit=20)
        >>> len(frame), np.allclose(frame["measured"], frame["predicted"], atol=1e-4)
        (200, True)
    """
    whole = rule_logits(evaluator, members, "logit_ensemble", split)
    averaged = rule_logits(evaluator, members, "feature_ensemble_averaged_head", split)
    term = covariance_term(evaluator, members, split)
    indices = sample_indices(len(whole), limit)
    values = {
        "logit_ensemble": whole,
        "averaged_head": averaged,
        "measured": whole - averaged,
        "predicted": term,
    }
    return frame_by_image(indices, {name: value[indices] for name, value in values.items()})


def gap_to_ensemble(
    evaluator: PoolEvaluator,
    members: Sequence[int],
    split: PoolSplit = "test",
    statistics: Statistics = "average",
) -> pd.DataFrame:
    """How far the uniform soup is from the logit ensemble, logit by logit.

    Returns:
        One row: rms (of soup − ensemble over images and classes), rms_logits (of the
        ensemble), ratio, changed (share of predictions that differ), images, non_finite.

    Raises:
        MergeScopeError: unfit members or data.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> near, far = (
        ...     gap_to_ensemble(PoolEvaluator(load_pool(f"digits-mlp-{start}")), [0, 1])["ratio"][0]
        ...     for start in ("shared", "independent")
        ... )
        >>> bool(near < far)
        True
    """
    soup = rule_logits(evaluator, members, "uniform_soup", split, statistics)
    whole = rule_logits(evaluator, members, "logit_ensemble", split)
    return pd.DataFrame([_measure_difference(soup - whole, whole, soup)])


def _measure_difference(
    difference: Tensor, reference: Tensor, other: Tensor
) -> dict[str, float | int]:
    """Size of a difference of logits, and the share of predictions that it changes."""
    finite = (torch.isfinite(reference) & torch.isfinite(other)).all(dim=1)
    difference, size = difference[finite], reference[finite].square().mean().sqrt()
    rms = difference.square().mean().sqrt()
    changed = reference[finite].argmax(dim=1) != other[finite].argmax(dim=1)
    return {
        "rms": float(rms),
        "rms_logits": float(size),
        "ratio": float(rms / size),
        "changed": float(changed.double().mean()),
        "images": len(reference),
        "non_finite": int((~finite).sum()),
    }


def sample_indices(count: int, limit: int) -> Tensor:
    """Sorted indices of at most `limit` of `count` images, the same in every call.

    They are drawn, because the images may be sorted by class.

    Example:
        >>> len(sample_indices(500, 20)), sample_indices(3, 20)
        (20, tensor([0, 1, 2]))
    """
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit]
    return drawn.sort().values


def frame_by_image(indices: Tensor, values: dict[str, Tensor]) -> pd.DataFrame:
    """A row per image and class from tensors images x classes.

    Args:
        indices: the images' indices in their split.
        values: column to tensor.

    Example:
        >>> frame_by_image(torch.tensor([4, 7]), {"logit": torch.zeros(2, 3)}).values.tolist()[-1]
        [7.0, 2.0, 0.0]
    """
    images, classes = next(iter(values.values())).shape
    return pd.DataFrame(
        {
            "image": np.repeat(indices.numpy(), classes),
            "class": np.tile(np.arange(classes), images),
            **{name: value.flatten().numpy() for name, value in values.items()},
        }
    )
