"""Blends of linear classifiers: λ·W_a + (1−λ)·W_b of two classes, or of two models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from analysis.networks.stateless import State
from analysis.outputs.pool_outputs import PoolEvaluator
from analysis.patterns.templates import image_shape
from merge_core.errors import PoolError


def blend(A: np.ndarray, B: np.ndarray, lam: float) -> np.ndarray:
    """λ·A + (1−λ)·B of two templates, or of two sets of them.

    Source: arXiv:2411.09263, section 3 (there λ = ½).

    Example:
        >>> blend(np.array([1.0, 0.0]), np.array([0.0, 1.0]), 0.75).tolist()
        [0.75, 0.25]
    """
    return lam * A + (1 - lam) * B


def blend_response(
    evaluator: PoolEvaluator, weights: State, a: int, b: int, lams: Sequence[float]
) -> pd.DataFrame:
    """How test images respond to a blend of two classes of one model.

    The blended row λ·W_a + (1−λ)·W_b, with the biases blended alike, takes the place of row a
    (row b stays). An image counts as a only where its blended logit is above all others, so at
    λ = 0, where rows a and b are the same, none does.

    Args:
        evaluator: of a pool of linear classifiers.
        weights: of one of them.
        a: class whose row is replaced.
        b: class that is blended in.
        lams: values of λ.

    Returns:
        One row per λ and group of test images: lam, images ("a", "b" or "others"), count, logit
        (mean of the blended row; [derived] linear in λ), share_as_a (NaN and NaN for a group
        without images).

    Raises:
        PoolError: another architecture, missing data, unfit weights, an unknown class, a = b.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-linear"))
        >>> frame = blend_response(evaluator, evaluator.weights(0), a=0, b=1, lams=[0.0, 1.0])
        >>> frame[frame["lam"] == 0]["share_as_a"].tolist()
        [0.0, 0.0, 0.0]
    """
    image_shape(evaluator)
    logits = evaluator.run(weights, "test", torch.float64).logits.numpy()
    if a == b or not (0 <= a < logits.shape[1] and 0 <= b < logits.shape[1]):
        raise PoolError(f"Choose two different classes from 0 to {logits.shape[1] - 1} to blend.")
    labels = evaluator.labels("test")
    groups = {"a": labels == a, "b": labels == b, "others": (labels != a) & (labels != b)}
    rivals = np.delete(logits, a, axis=1).max(axis=1)
    rows = []
    for lam in lams:
        blended = blend(logits[:, a], logits[:, b], lam)
        for name, chosen in groups.items():
            count = int(chosen.sum())
            logit = float(blended[chosen].mean()) if count else float("nan")
            share = float((blended > rivals)[chosen].mean()) if count else float("nan")
            rows.append((float(lam), name, count, logit, share))
    return pd.DataFrame(rows, columns=["lam", "images", "count", "logit", "share_as_a"])


def model_response(
    evaluator: PoolEvaluator, first: State, second: State, label: int, lams: Sequence[float]
) -> pd.DataFrame:
    """How test images respond to a blend of two whole classifiers, λ·first + (1−λ)·second.

    Args:
        evaluator: of a pool of linear classifiers.
        first: weights of one of them.
        second: weights of another.
        label: the class whose template is looked at.
        lams: values of λ.

    Returns:
        One row per λ: lam, accuracy (of all test images), class_accuracy (of those of `label`),
        logit (mean logit of `label` on its images), logit_others (on all other images; both
        [derived] linear in λ, as logits of a linear model are linear in its weights).

    Raises:
        PoolError: another architecture, missing data, unfit weights, a class without images.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-linear"))
        >>> first, second = evaluator.weights(0), evaluator.weights(1)
        >>> model_response(evaluator, first, second, label=3, lams=[0.0, 0.5, 1.0])["lam"].tolist()
        [0.0, 0.5, 1.0]
    """
    image_shape(evaluator)
    labels = evaluator.labels("test")
    own = labels == label
    if not own.any():
        raise PoolError(f"The test images hold no class {label}; choose another class.")
    one, two = (evaluator.run(w, "test", torch.float64).logits.numpy() for w in (first, second))
    rows = []
    for lam in lams:
        logits = blend(one, two, lam)
        correct = logits.argmax(axis=1) == labels
        rows.append(
            {
                "lam": float(lam),
                "accuracy": float(correct.mean()),
                "class_accuracy": float(correct[own].mean()),
                "logit": float(logits[own, label].mean()),
                "logit_others": float(logits[~own, label].mean()),
            }
        )
    return pd.DataFrame(rows)
