"""Cross-entropy per task and over tasks, in nats per token, and its intervals.

The units are texts, or blocks of them. A task's cross-entropy is that of all its tokens together,
Σ_i n_i l_i / Σ_i n_i with n_i tokens and l_i nats per token of unit i: the mean over units of the
contributions x_i = w_i l_i with weights w_i = n_i / mean(n).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

CONFIDENCE = 0.95
UPPER = 0.5 + CONFIDENCE / 2


def linearised(contributions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Numbers with the mean of contributions, and with the variance that this ratio has.

    Long texts contribute much and short ones little, which is no uncertainty of nats per token:
    x̄ + x_i − w_i x̄ leaves it out.

    Args:
        contributions: x, of N units.
        weights: w, of mean 1.

    Source: Cochran, Sampling Techniques (1977), chapter 6 (the ratio estimator).

    Example:
        >>> linearised(np.array([2.0, 4.0]), np.array([2 / 3, 4 / 3])).tolist()
        [3.0, 3.0]
    """
    mean = contributions.mean()
    return np.asarray(mean + contributions - weights * mean)


def cross_entropy_frame(
    contributions: Mapping[str, np.ndarray], tokens: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """Per-task cross-entropy from every unit's contribution.

    Args:
        contributions: task to x, one number per unit.
        tokens: task to the numbers of scored tokens of the same units.

    Returns:
        Columns task, tokens, images (units), cross_entropy, low, high (nats per token; Student's
        95 % interval over units, NaN of a single one), error (its standard error).

    Example:
        >>> frame = cross_entropy_frame({"news": np.array([2.0, 4.0])}, {"news": np.array([5, 5])})
        >>> frame[["task", "tokens", "images", "cross_entropy"]].values.tolist()
        [['news', 10, 2, 3.0]]
    """
    rows = []
    for task, values in contributions.items():
        count, weights = len(values), tokens[task] / tokens[task].mean()
        spread = linearised(values, weights).std(ddof=1) if count > 1 else np.nan
        rows.append(
            {
                "task": task,
                "tokens": int(tokens[task].sum()),
                "images": count,
                "cross_entropy": float(values.mean()),
                "error": float(spread / np.sqrt(count)),
            }
        )
    frame = pd.DataFrame(rows)
    half = stdtrit(np.maximum(frame["images"] - 1, 1), UPPER) * frame["error"]
    frame.insert(4, "low", (frame["cross_entropy"] - half).clip(lower=0))
    frame.insert(5, "high", frame["cross_entropy"] + half)
    return frame


def mean_cross_entropy(frame: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """The mean over tasks, every task counting alike, with a 95 % interval.

    Student's, with Welch and Satterthwaite's degrees of freedom; NaN where a task has a single
    unit, which tells no variance. It speaks of these tasks, not of other ones.

    Args:
        frame: of :func:`cross_entropy_frame`, possibly with further columns.
        by: columns that tell the settings apart.

    Returns:
        Columns `by`, cross_entropy, low, high, one row per setting.

    Source: Welch, Biometrika 34 (1947), 28.

    Example:
        >>> values, tokens = np.array([2.0, 4.0]), np.array([5, 5])
        >>> frame = cross_entropy_frame({"a": values, "b": values + 1}, {"a": tokens, "b": tokens})
        >>> mean_cross_entropy(frame)["cross_entropy"].tolist()
        [3.5]
    """
    keys: list[Any] = list(by) or [np.zeros(len(frame), dtype=int)]
    variance = frame["error"] ** 2
    work = frame.assign(
        variance=variance, freedom=variance**2 / (frame["images"] - 1).clip(lower=1), tasks=1
    )
    result = (
        work.groupby(keys, sort=False, dropna=False)
        .agg(
            cross_entropy=("cross_entropy", "mean"),
            variance=("variance", lambda each: each.sum(skipna=False)),
            freedom=("freedom", lambda each: each.sum(skipna=False)),
            tasks=("tasks", "sum"),
        )
        .reset_index(drop=not by)
    )
    freedom = (result["variance"] ** 2 / result["freedom"].clip(lower=1e-300)).clip(lower=1)
    half = stdtrit(freedom, UPPER) * np.sqrt(result["variance"]) / result["tasks"]
    result["low"] = (result["cross_entropy"] - half).clip(lower=0)
    result["high"] = result["cross_entropy"] + half
    return result.drop(columns=["variance", "freedom", "tasks"])
