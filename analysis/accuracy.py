"""Accuracy per task and over tasks, its intervals, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import ndtri, stdtrit

from analysis.cross_entropy import linearised
from analysis.sign_flips import fewest_images, two_sided

CONFIDENCE = 0.95
Z = float(ndtri(0.5 + CONFIDENCE / 2))

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
    p = correct / images
    centre = (p + Z**2 / (2 * images)) / (1 + Z**2 / images)
    half = Z / (1 + Z**2 / images) * np.sqrt(p * (1 - p) / images + Z**2 / (4 * images**2))
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


def task_frame(
    hits: Mapping[str, Hits], frame: Callable[[Hits], pd.DataFrame] = accuracy_frame
) -> pd.DataFrame:
    """Accuracy, or another metric, of each label on each task.

    Args:
        hits: label to task to what is known of its images.
        frame: gives a row per task from what is known of its images.

    Returns:
        Columns label and those of `frame`.

    Example:
        >>> hits = {"mean": {"digits": np.array([True, False]), "dots": np.array([True, True])}}
        >>> task_frame(hits)[["label", "task", "accuracy"]].values.tolist()
        [['mean', 'digits', 0.5], ['mean', 'dots', 1.0]]
    """
    parts = [frame(each).assign(label=label) for label, each in hits.items()]
    return pd.concat(parts, ignore_index=True)


def mean_accuracy(frame: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """The mean over tasks, every task counting alike, with a 95 % interval.

    The tasks' images are independent samples. The interval is taken after z²/2 successes and as
    many failures were added, shared among the T tasks (of a single task Agresti and Coull's), with
    Student's quantile at as many degrees of freedom as there are images, these included: it then
    covers from one image on. It speaks of these T tasks, not of other ones.

    Args:
        frame: of :func:`accuracy_frame`, possibly with further columns.
        by: columns that tell the settings apart.

    Returns:
        Columns `by`, accuracy, low, high, one row per setting.

    Source: Price and Bonett, Computational Statistics & Data Analysis 45 (2004), 449.

    Example:
        >>> hits = {"digits": np.array([True, False]), "dots": np.array([True, True])}
        >>> mean_accuracy(accuracy_frame(hits))["accuracy"].tolist()
        [0.75]
    """
    keys: list[Any] = list(by) or [np.zeros(len(frame), dtype=int)]
    grouped = frame.groupby(keys, sort=False, dropna=False)
    T = grouped["accuracy"].transform("size")
    p, variance = _shrunk(frame["accuracy"], frame["images"], T)
    work = frame.assign(centre=p, variance=variance, tasks=1)
    result = (
        work.groupby(keys, sort=False, dropna=False)
        .agg(
            accuracy=("accuracy", "mean"),
            centre=("centre", "mean"),
            variance=("variance", "sum"),
            images=("images", "sum"),
            tasks=("tasks", "sum"),
        )
        .reset_index(drop=not by)
    )
    half = _quantile(result["images"]) * np.sqrt(result["variance"]) / result["tasks"]
    result["low"] = np.minimum(result["centre"] - half, result["accuracy"]).clip(0, 1)
    result["high"] = np.maximum(result["centre"] + half, result["accuracy"]).clip(0, 1)
    return result.drop(columns=["centre", "variance", "images", "tasks"])


def _quantile(images: Any) -> Any:
    """How many standard errors an interval reaches, of so many images and those added."""
    return stdtrit(images + Z**2, 0.5 + CONFIDENCE / 2)


def _shrunk(share: Any, images: Any, T: Any) -> tuple[Any, Any]:
    """Shares of T tasks after z²/2 successes and failures in all were added, and their variance."""
    more = images + Z**2 / T
    p = (share * images + Z**2 / (2 * T)) / more
    return p, p * (1 - p) / more


def mean_interval(
    scores: Hits, weights: Mapping[str, np.ndarray] | None = None
) -> tuple[float, float]:
    """The 95 % interval of the mean over tasks of a score of every image.

    Of hits that of :func:`mean_accuracy`, of other scores Student's with Welch and Satterthwaite's
    degrees of freedom; NaN where a task has a single image, which tells no variance.

    Args:
        scores: task to one number per image.
        weights: where scores are contributions of unlike images: their weights (see
            :func:`analysis.cross_entropy.linearised`).

    Source: Welch, Biometrika 34 (1947), 28.

    Example:
        >>> low, high = mean_interval({"digits": np.array([0.5, 1.5, 1.0, 1.0])})
        >>> round(low, 2), round(high, 2)
        (0.35, 1.65)
    """
    values = [np.asarray(each, dtype=float) for each in scores.values()]
    T, images = len(values), np.array([len(each) for each in values])
    means = np.array([each.mean() for each in values])
    if all(np.isin(each, (0, 1)).all() for each in values):
        p, variances = _shrunk(means, images, T)
        half = _quantile(images.sum()) * math.sqrt(variances.sum()) / T
        low, high = min(p.mean() - half, means.mean()), max(p.mean() + half, means.mean())
        return max(0.0, float(low)), min(1.0, float(high))
    if weights is not None:
        values = [linearised(x, weights[task]) for task, x in zip(scores, values, strict=True)]
    return _student(values)


def _student(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """Of the mean over tasks of each task's mean; NaN where one has a single number."""
    T, images = len(values), np.array([len(each) for each in values])
    means = np.array([each.mean() for each in values])
    if images.min() < 2:
        return math.nan, math.nan
    variances = np.array([each.var(ddof=1) for each in values]) / images
    freedom = variances.sum() ** 2 / max(np.sum(variances**2 / (images - 1)), 1e-300)
    half = float(stdtrit(max(freedom, 1.0), 0.5 + CONFIDENCE / 2)) * math.sqrt(variances.sum())
    return float(means.mean() - half / T), float(means.mean() + half / T)


class Difference(NamedTuple):
    """A difference of two means over tasks, of accuracies or other scores, on the same images.

    Attributes:
        gap: first − second, mean over tasks, as a share (of other scores in their unit).
        low, high: its 95 % interval.
        p: of the exact test that the two are equal, two-sided.
    """

    gap: float
    low: float
    high: float
    p: float


def difference(first: Hits, second: Hits) -> Difference:
    """Mean over tasks of first − second accuracy, from the same images.

    The test draws signs at random (:func:`analysis.sign_flips.two_sided`). The interval is the
    normal one after one image for and one against each of the two were added, shared among the
    tasks (Bonett and Price's for one task), with E d² for the variance of a difference d: within a
    task of few images its variance about a mean of its own cannot be told. Zero lies inside
    exactly where p is 5 % or more.

    Other scores than hits have the same test; their interval is Student's of the paired
    differences, with Welch and Satterthwaite's degrees of freedom (without bounds where a task has
    a single image).

    Args:
        first: task to booleans, or to scores, one per image.
        second: the same tasks and images.

    Source: Bonett and Price, Journal of Educational and Behavioral Statistics 37 (2012), 479; of
    other scores Welch, Biometrika 34 (1947), 28.

    Example:
        >>> right = np.array([True, True, True, True])
        >>> found = difference({"digits": right}, {"digits": np.array([True, False, True, True])})
        >>> found.gap, found.p, found.low < 0 < found.high
        (0.25, 1.0, True)
    """
    gaps = [first[task].astype(float) - second[task].astype(float) for task in first]
    if any(np.asarray(each).dtype != bool for each in first.values()):
        return _difference_of_scores(gaps)
    T = len(gaps)
    sizes = np.array([len(gap) for gap in gaps])
    images, unequal = sizes + 2 / T, np.array([np.count_nonzero(gap) for gap in gaps]) + 2 / T
    centre = float(np.mean([gap.sum() for gap in gaps] / images))
    half = float(_quantile(sizes.sum()) * math.sqrt(np.sum(unequal / images**2)) / T)
    gap, p = float(np.mean([each.mean() for each in gaps])), two_sided(gaps)
    low, high = max(-1.0, min(centre - half, gap)), min(1.0, max(centre + half, gap))
    return Difference(gap, *_as_tested(gap, low, high, p), p)


def _difference_of_scores(gaps: Sequence[np.ndarray]) -> Difference:
    gap, p = float(np.mean([each.mean() for each in gaps])), two_sided(gaps)
    low, high = _student([each.astype(float) for each in gaps])
    if math.isnan(low):
        low, high = -math.inf, math.inf
    return Difference(gap, *_as_tested(gap, low, high, p), p)


def _as_tested(gap: float, low: float, high: float, p: float) -> tuple[float, float]:
    """An interval in which zero lies exactly where the test does not find a difference."""
    if p >= 1 - CONFIDENCE:
        return min(low, 0.0), max(high, 0.0)
    if gap > 0:
        return max(low, np.nextafter(0.0, 1.0)), high
    return low, min(high, np.nextafter(0.0, -1.0))


def paired_differences(hits: Mapping[str, Hits]) -> pd.DataFrame:
    """All pairwise differences, and which of them are real.

    A difference counts as real if its exact test stays below 5 % after Holm's correction for the
    number of pairs: with m pairs two methods must differ on
    :func:`analysis.sign_flips.fewest_images` of them at least.

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
    rows = [
        (first, second, *difference(hits[first], hits[second]))
        for first, second in combinations(hits, 2)
    ]
    columns = ["first", "second", "difference", "low", "high", "p"]
    frame = pd.DataFrame(rows, columns=columns)
    order = np.argsort(frame["p"].to_numpy(), kind="stable")
    steps = (len(frame) - np.arange(len(frame))) * frame["p"].to_numpy()[order]
    adjusted = np.empty(len(frame))
    adjusted[order] = np.maximum.accumulate(steps)
    return frame.assign(real=adjusted < 1 - CONFIDENCE)


def words_for_few_images(hits: Mapping[str, Hits]) -> str:
    """How many images two labels must differ on before a difference can count, in a sentence.

    Args:
        hits: label to task to booleans.

    Example:
        >>> words_for_few_images({"a": {"t": np.full(4, True)}, "b": {"t": np.full(4, False)}})
        'Two methods must differ on at least 6 inputs before ...; these are 4, too few ...'
    """
    pairs = len(hits) * (len(hits) - 1) // 2
    exact = all(each.dtype == bool for each in next(iter(hits.values())).values())
    least = fewest_images(1 - CONFIDENCE, max(1, pairs), exact)
    images = sum(len(each) for each in next(iter(hits.values())).values())
    few = f"; these are {images}, too few to compare anything" if images < least else ""
    return (
        f"Two methods must differ on at least {least} inputs before a difference can count as "
        f"real among {pairs} pair{'' if pairs == 1 else 's'}{few}."
    )


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


def spread_over_seeds(
    summary: pd.DataFrame, repeated: Mapping[str, str | None], column: str = "accuracy"
) -> pd.DataFrame:
    """How far a method's accuracy depends on its seed.

    Args:
        summary: one row per label, with columns label and accuracy.
        repeated: label to the title under which its seeds are one, or None.
        column: of the metric, where it is not the accuracy.

    Returns:
        One row per title: title, seeds (number of them), accuracy (mean over seeds of the mean
        over tasks), spread (standard deviation over seeds with n − 1; NaN of one seed), least,
        most.

    Example:
        >>> frame = pd.DataFrame({"label": ["a 0", "a 1", "b"], "accuracy": [0.5, 0.75, 0.9]})
        >>> spread_over_seeds(frame, {"a 0": "a", "a 1": "a", "b": None})["accuracy"].tolist()
        [0.625]
    """
    frame: pd.DataFrame = (
        summary.assign(title=summary["label"].map(dict(repeated)))
        .dropna(subset=["title"])
        .groupby("title", sort=False)[column]
        .agg(seeds="size", mean="mean", spread="std", least="min", most="max")
        .reset_index()
    )
    return frame.rename(columns={"mean": column})
