"""What models are measured by: a column of frames, which way is better, and how it is said."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.accuracy import mean_accuracy
from analysis.cross_entropy import mean_cross_entropy
from merge_core.suites.data_spec import MetricName


@dataclass(frozen=True)
class Metric:
    """A number by which models are told apart on a task.

    Attributes:
        column: of frames.
        measure: what is measured of each input, by its name in the store.
        title: as shown.
        unit: in brackets after the title; empty for shares.
        lower_is_better: which way is better.
        factor: by what values and differences are multiplied where they are shown.
        points: the unit of differences as they are shown.
        form: of a value, for :func:`format`.
        difference_form: of a difference, multiplied by `factor`.
        highest: that it can be.
        mean_over_tasks: from a frame of tasks, and the columns that tell settings apart, to the
            mean with its interval.
        counts: columns of a frame of tasks that say of how many inputs.
        tick_form: of axes, in d3's language.
        hint: what is added to the title of a table.
    """

    column: MetricName
    measure: str
    title: str
    unit: str
    lower_is_better: bool
    factor: float
    points: str
    form: str
    difference_form: str
    highest: float
    mean_over_tasks: Callable[[pd.DataFrame, Sequence[str]], pd.DataFrame]
    counts: tuple[str, ...]
    tick_form: str
    hint: str = ""

    @property
    def label(self) -> str:
        """The title with its unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def axis(self) -> str:
        """The title on an axis, with the unit of what is drawn."""
        words = f"{self.title} ({self.unit or '%'})"
        return f"{words}, lower is better" if self.lower_is_better else words

    @property
    def of_hover(self) -> str:
        """How a drawn value is written in plotly's hover texts, without its name."""
        return ".3f" if self.unit else ".1f"

    @property
    def ending(self) -> str:
        """What stands after a drawn value."""
        return "" if self.unit else " %"

    @property
    def noun(self) -> str:
        """The title within a sentence."""
        return self.title[0].lower() + self.title[1:]

    @property
    def sign(self) -> int:
        """1 where more is better, else −1."""
        return -1 if self.lower_is_better else 1

    @property
    def best_word(self) -> str:
        """``highest`` or ``lowest``."""
        return "lowest" if self.lower_is_better else "highest"

    @property
    def rule(self) -> str:
        """The score that a search chooses by where labels may be read."""
        return self.column

    def show(self, value: float) -> str:
        """A value; nothing for NaN."""
        return "" if math.isnan(value) else format(value, self.form)

    def show_interval(self, low: float, high: float) -> str:
        """An interval in the same unit; in words where one input tells none."""
        if math.isnan(low) or math.isnan(high):
            return "unknown: one input"
        plain = self.form.replace("%", "f")
        return f"{format(self.factor * low, plain)} to {format(self.factor * high, plain)}"

    def show_difference(self, gap: float) -> str:
        """A difference, in `points`, with its sign."""
        return format(self.factor * gap, self.difference_form)

    def best(self, values: Any) -> int:
        """The place of the best of several values, the first of several alike.

        Example:
            >>> ACCURACY.best([0.5, 0.75]), CROSS_ENTROPY.best([0.5, 0.75])
            (1, 0)
        """
        return int(np.argmax(self.sign * np.asarray(values, dtype=float)))

    def rank(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The rows of a frame, the best first."""
        return frame.sort_values(
            self.column, ascending=self.lower_is_better, kind="stable", na_position="last"
        )

    def tell(self, frame: pd.DataFrame, first: Sequence[str]) -> pd.DataFrame:
        """The columns of a frame that are told: those given, the metric, its interval and counts.

        Of a cross-entropy the perplexity, exp of it, stands beside it.
        """
        told = frame[[*first, self.column, "low", "high", *self.counts]]
        if self is CROSS_ENTROPY:
            place = len(first) + 3
            told = told.rename(columns={"images": "texts"})
            told.insert(place, "perplexity", np.exp(told[self.column]))
        return told

    def relative(self, values: Any, reference: Any) -> Any:
        """Values as a share of a reference: 1 where they are alike, less where they are worse."""
        return reference / values if self.lower_is_better else values / reference


ACCURACY = Metric(
    column="accuracy",
    measure="classes",
    title="Accuracy",
    unit="",
    lower_is_better=False,
    factor=100,
    points="points",
    form=".1%",
    difference_form="+.1f",
    highest=1.0,
    mean_over_tasks=mean_accuracy,
    counts=("correct", "images"),
    tick_form=".0%",
)
CROSS_ENTROPY = Metric(
    column="cross_entropy",
    measure="cross_entropy",
    title="Cross-entropy",
    unit="nats per token",
    lower_is_better=True,
    factor=1,
    points="nats per token",
    form=".3f",
    difference_form="+.3f",
    highest=math.inf,
    mean_over_tasks=mean_cross_entropy,
    counts=("tokens", "images"),
    tick_form=".2~f",
    hint="; lower is better",
)
METRICS: dict[MetricName, Metric] = {each.column: each for each in (ACCURACY, CROSS_ENTROPY)}


def metric_of(frame: pd.DataFrame | pd.Series) -> Metric:
    """The metric that a frame, or a row of one, is about: the one whose column it has.

    Raises:
        KeyError: it has none.

    Example:
        >>> metric_of(pd.DataFrame({"task": ["news"], "cross_entropy": [2.5]})).label
        'Cross-entropy (nats per token)'
    """
    names = frame.index if isinstance(frame, pd.Series) else frame.columns
    for metric in METRICS.values():
        if metric.column in names:
            return metric
    raise KeyError("accuracy or cross_entropy")


def mean_over_tasks(frame: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """The mean over tasks of what a frame is about (see :attr:`Metric.mean_over_tasks`).

    Example:
        >>> from analysis.accuracy import accuracy_frame
        >>> frame = accuracy_frame({"a": np.array([True, False]), "b": np.array([True, True])})
        >>> mean_over_tasks(frame)["accuracy"].tolist()
        [0.75]
    """
    return metric_of(frame).mean_over_tasks(frame, by)
