"""Accuracy per task and over tasks, its intervals, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

CONFIDENCE = 0.95

Hits = Mapping[str, np.ndarray]


def wilson_interval(correct: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % Wilson score interval of a proportion.

    Args:
        correct: successes, any shape.
        images: trials, same shape, at least 1.

    Returns:
        Lower and upper bounds in [0, 1].

    Source: Wilson, JASA 22 (1927), 209.

    Example:
        >>> low, high = wilson_interval(np.array([8]), np.array([10]))
        >>> low.round(3).tolist(), high.round(3).tolist()
        ([0.49], [0.943])
    """
    z = norm.ppf(0.5 + CONFIDENCE / 2)
    p = correct / images
    centre = (p + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z / (1 + z**2 / images) * np.sqrt(p * (1 - p) / images + z**2 / (4 * images**2))
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def accuracy_frame(correct: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Per-task accuracy from per-image hits.

    Args:
        correct: task to a boolean vector, one entry per image.

    Returns:
        Columns task, correct, images, accuracy, low, high (shares; Wilson 95 %).

    Example:
        >>> frame = accuracy_frame({"digits": np.array([True, True, False, True])})
        >>> frame[["task", "correct", "images", "accuracy"]].values.tolist()
        [['digits', 3, 4, 0.75]]
    """
    frame = pd.DataFrame(
        {
            "task": list(correct),
            "correct": [int(hits.sum()) for hits in correct.values()],
            "images": [len(hits) for hits in correct.values()],
        }
    )
    frame["accuracy"] = frame["correct"] / frame["images"]
    frame["low"], frame["high"] = wilson_interval(
        frame["correct"].to_numpy(), frame["images"].to_numpy()
    )
    return frame


def task_frame(hits: Mapping[str, Hits]) -> pd.DataFrame:
    """Accuracy of each label on each task.

    Returns:
        Columns label and those of :func:`accuracy_frame`.

    Example:
        >>> hits = {"mean": {"digits": np.array([True, False]), "dots": np.array([True, True])}}
        >>> task_frame(hits)[["label", "task", "accuracy"]].values.tolist()
        [['mean', 'digits', 0.5], ['mean', 'dots', 1.0]]
    """
    parts = [accuracy_frame(each).assign(label=label) for label, each in hits.items()]
    return pd.concat(parts, ignore_index=True)


def mean_accuracy(frame: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """The mean over tasks, every task counting alike, with a 95 % normal interval.

    The tasks' images are independent samples, so the variance of the mean is
    Σ p_t (1 − p_t) / n_t / T². It speaks of these T tasks, not of other ones.

    Args:
        frame: of :func:`accuracy_frame`, possibly with further columns.
        by: columns that tell the settings apart.

    Returns:
        Columns `by`, accuracy, low, high, one row per setting.

    Example:
        >>> hits = {"digits": np.array([True, False]), "dots": np.array([True, True])}
        >>> mean_accuracy(accuracy_frame(hits))["accuracy"].tolist()
        [0.75]
    """
    work = frame.assign(
        variance=frame["accuracy"] * (1 - frame["accuracy"]) / frame["images"], tasks=1
    )
    keys: list[Any] = list(by) or [np.zeros(len(work), dtype=int)]
    grouped = work.groupby(keys, sort=False, dropna=False)
    result = grouped.agg(
        accuracy=("accuracy", "mean"), variance=("variance", "sum"), tasks=("tasks", "sum")
    ).reset_index(drop=not by)
    half = norm.ppf(0.5 + CONFIDENCE / 2) * np.sqrt(result["variance"]) / result["tasks"]
    result["low"] = (result["accuracy"] - half).clip(0, 1)
    result["high"] = (result["accuracy"] + half).clip(0, 1)
    return result.drop(columns=["variance", "tasks"])


def difference(first: Hits, second: Hits) -> tuple[float, float]:
    """Mean over tasks of first − second accuracy, and its standard error, from the same images.

    The per-image differences of a task are independent draws of one variable in {−1, 0, 1}, so
    the variance of the mean over T tasks is Σ_t var_t / n_t / T².

    Args:
        first: task to booleans, one per image.
        second: the same tasks and images.

    Returns:
        The difference and its standard error, as shares.

    Example:
        >>> right = np.array([True, True, True, True])
        >>> difference({"digits": right}, {"digits": np.array([True, False, True, True])})
        (0.25, 0.25)
    """
    gaps = [first[task].astype(float) - second[task].astype(float) for task in first]
    variance = sum(gap.var(ddof=1) / len(gap) if len(gap) > 1 else 0.0 for gap in gaps)
    return float(np.mean([gap.mean() for gap in gaps])), math.sqrt(variance) / len(gaps)


def paired_differences(hits: Mapping[str, Hits]) -> pd.DataFrame:
    """All pairwise differences, and which of them are real.

    A difference counts as real if its z-test stays below 5 % after Holm's correction for the
    number of pairs.

    Returns:
        One row per unordered pair: first, second, difference (shares), low, high (95 %, of this
        pair alone), p, real.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979), 65.

    Example:
        >>> all_right, half = np.full(50, True), np.arange(50) % 2 == 0
        >>> pairs = paired_differences({"CART": {"digits": all_right}, "average": {"digits": half}})
        >>> pairs[["first", "second", "difference", "real"]].values.tolist()
        [['CART', 'average', 0.5, True]]
    """
    z = norm.ppf(0.5 + CONFIDENCE / 2)
    rows = []
    for first, second in combinations(hits, 2):
        gap, error = difference(hits[first], hits[second])
        p = 2 * norm.sf(abs(gap) / error) if error > 0 else float(gap == 0)
        rows.append((first, second, gap, gap - z * error, gap + z * error, p))
    columns = ["first", "second", "difference", "low", "high", "p"]
    frame = pd.DataFrame(rows, columns=columns)
    order = np.argsort(frame["p"].to_numpy(), kind="stable")
    steps = (len(frame) - np.arange(len(frame))) * frame["p"].to_numpy()[order]
    adjusted = np.empty(len(frame))
    adjusted[order] = np.maximum.accumulate(steps)
    return frame.assign(real=adjusted < 1 - CONFIDENCE)


def differences_to(pairs: pd.DataFrame, best: str) -> pd.DataFrame:
    """Differences to one label that are real, from all paired differences.

    Args:
        pairs: of :func:`paired_differences`.
        best: the label.

    Returns:
        Columns label, difference (of the label − best, shares), low, high, p; largest first.

    Example:
        >>> columns = ["first", "second", "difference", "low", "high", "p", "real"]
        >>> pairs = pd.DataFrame([["best", "other", 0.5, 0.25, 0.75, 0.001, True]], columns=columns)
        >>> differences_to(pairs, "best")[["label", "difference"]].values.tolist()
        [['other', -0.5]]
    """
    first = pairs[(pairs["first"] == best) & pairs["real"]]
    second = pairs[(pairs["second"] == best) & pairs["real"]]
    frame = pd.concat(
        [
            second.rename(columns={"first": "label"}),
            first.assign(
                label=first["second"],
                difference=-first["difference"],
                low=-first["high"],
                high=-first["low"],
            ),
        ]
    )
    columns = ["label", "difference", "low", "high", "p"]
    return frame[columns].sort_values("difference", ascending=False).reset_index(drop=True)


def spread_over_seeds(summary: pd.DataFrame, repeated: Mapping[str, str | None]) -> pd.DataFrame:
    """How far a method's accuracy depends on its seed.

    Args:
        summary: one row per label, with columns label and accuracy.
        repeated: label to the title under which its seeds are one, or None.

    Returns:
        One row per title: title, seeds (number of them), accuracy (mean over seeds of the mean
        over tasks), spread (standard deviation over seeds with n − 1; NaN of one seed), least,
        most.

    Example:
        >>> frame = pd.DataFrame({"label": ["a 0", "a 1", "b"], "accuracy": [0.5, 0.75, 0.9]})
        >>> spread_over_seeds(frame, {"a 0": "a", "a 1": "a", "b": None})["accuracy"].tolist()
        [0.625]
    """
    return (
        summary.assign(title=summary["label"].map(dict(repeated)))
        .dropna(subset=["title"])
        .groupby("title", sort=False)["accuracy"]
        .agg(seeds="size", accuracy="mean", spread="std", least="min", most="max")
        .reset_index()
    )
