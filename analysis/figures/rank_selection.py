"""Figures over rank or scale: the score with every pick, and each task's accuracy.

Shares are drawn in percent. Scores that are no shares (such as minus the entropy) keep their unit.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, cast

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures.style import (
    OKABE_ITO,
    REFERENCE,
    add_line,
    layout,
    mark_share,
    percent,
    set_axes,
    share_axis,
    task_colours,
    task_markers,
)
from analysis.metrics import METRICS, metric_of
from analysis.rank_selection.scores import SCORES
from merge_core.suites.data_spec import MetricName

MARK = "#D62728"
METHOD_LOOKS = {
    "cart": ("centred (CART)", OKABE_ITO[0], "solid", "circle"),
    "low_rank_task_arithmetic": ("original (about the base)", OKABE_ITO[3], "dash", "diamond"),
}
MODE_LOOKS = {
    "labels": ("labels", MARK, "star"),
    "inputs": ("inputs only", OKABE_ITO[2], "diamond"),
    "weights": ("weights only", OKABE_ITO[1], "triangle-down"),
    "default": ("the method's default", REFERENCE, "x"),
}
SHARE_OF_RANK = "Rank, share of directions kept (log scale)"
SCALE = "Scaling coefficient λ"
SHARES = ("accuracy", "agreement", "overlap")


def unit(score: str) -> tuple[str, float]:
    """Axis label of a score, and the factor that takes its values there.

    Example:
        >>> unit("accuracy"), unit("entropy")
        (('Accuracy (%)', 100.0), ('Entropy', 1.0))
    """
    title = METRICS[score].label if score in METRICS else SCORES[score].title
    return (f"{title} (%)", 100.0) if score in SHARES else (title, 1.0)


def _words(score: float, value: str) -> str:
    """A score as it is written."""
    return f"{score:.1%}" if value in SHARES else f"{score:.3g}"


def score_curve(
    curves: pd.DataFrame,
    title: str,
    *,
    axis: str = "rank",
    value: str = "accuracy",
    picks: pd.DataFrame | None = None,
    references: Mapping[str, float] | None = None,
    chosen: float | None = None,
) -> go.Figure:
    """A score over rank (at each rank's best scale) or over scale, with its interval.

    Args:
        curves: rows with method, and rank, scale, images, score, expected, expected_low,
            expected_high of :class:`analysis.rank_selection.adaptive.Search`.
        title: the question answered.
        axis: ``rank`` or ``scale``.
        value: what the score is; accuracies and agreements are shares, drawn in percent.
        picks: rows with proxy, title, mode, rank, scale: marked on the first curve at their
            place on the axis; their own scale may be another one.
        references: horizontal lines, such as the experts' mean.
        chosen: marked by a vertical line.
    """
    label, factor = unit(value)
    figure = go.Figure()
    for method, mine in curves.groupby("method", sort=False):
        _add_curve(figure, str(method), mine.sort_values(axis), axis, factor, value)
    if picks is not None and len(curves):
        first = curves[curves["method"] == curves["method"].iloc[0]].sort_values(axis)
        _add_picks(figure, first, picks, axis, factor)
    for name, height in (references or {}).items():
        figure.add_hline(
            y=factor * height,
            line={"color": REFERENCE, "dash": "dot", "width": 1.5},
            annotation={"text": f"{name} {_words(height, value)}", "font": {"size": 11}},
            annotation_position="top left",
        )
    layout(figure, title, x=SHARE_OF_RANK if axis == "rank" else SCALE, y=label, height=460)
    if axis == "rank":
        set_axes(figure, x=share_axis(curves["rank"].unique()))
    if chosen is not None:
        _mark(figure, axis, chosen)
    return figure


def _mark(figure: go.Figure, axis: str, place: float) -> None:
    if axis == "rank":
        mark_share(figure, place)
    else:
        add_line(figure, {"color": REFERENCE, "dash": "dot", "width": 1.5}, x=place)


def _add_curve(
    figure: go.Figure, method: str, mine: pd.DataFrame, axis: str, factor: float, value: str
) -> None:
    """What is expected as a line with its band, what was measured as points."""
    other = (method.replace("_", " "), OKABE_ITO[0], "solid", "circle")
    name, colour, dash, symbol = METHOD_LOOKS.get(method, other)
    x, line, low, high = (
        mine[c].to_numpy() for c in (axis, "expected", "expected_low", "expected_high")
    )
    figure.add_scatter(
        x=np.concatenate([x, x[::-1]]),
        y=factor * np.concatenate([high, low[::-1]]),
        fill="toself",
        fillcolor=colour,
        opacity=0.15,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
    )
    figure.add_scatter(
        x=x,
        y=factor * line,
        mode="lines",
        name=f"{value.replace('_', ' ')} expected, {name}",
        line={"color": colour, "dash": dash, "width": 2.5},
        hoverinfo="skip",
    )
    most = mine["images"].max()
    figure.add_scatter(
        x=x,
        y=factor * mine["score"].to_numpy(),
        mode="markers",
        name=f"measured, {name}",
        marker={
            "symbol": [symbol if n == most else f"{symbol}-open" for n in mine["images"]],
            "color": colour,
            "size": 8,
        },
        text=[
            f"{setting_words(row)}<br>on {row['images']:.0f} inputs a task"
            for row in mine.to_dict("records")
        ],
        hovertemplate="%{y:.3g} at %{text}<extra>" + name + "</extra>",
    )


def _add_picks(
    figure: go.Figure, curve: pd.DataFrame, picks: pd.DataFrame, axis: str, factor: float
) -> None:
    """Marks on the curve, one trace for each mode."""
    place = np.log if axis == "rank" else np.asarray
    # Those that know most are drawn last, on top.
    for mode, (name, colour, symbol) in reversed(MODE_LOOKS.items()):
        mine = picks[picks["mode"] == mode].dropna(subset=[axis])
        if mine.empty:
            continue
        x = mine[axis].to_numpy()
        y = np.interp(place(x), place(curve[axis].to_numpy()), curve["expected"].to_numpy())
        figure.add_scatter(
            x=x,
            y=factor * y,
            mode="markers",
            name=f"picks, {name}",
            marker={
                "symbol": symbol,
                "size": 12,
                "color": colour,
                "line": {"width": 1, "color": "#FFFFFF"},
            },
            text=[f"{row['title']}: {setting_words(row)}" for row in mine.to_dict("records")],
            hovertemplate="%{text}<extra>" + name + "</extra>",
        )


def setting_words(row: Mapping[Hashable, Any]) -> str:
    """Rank and scale in words, those that there are."""
    parts = []
    if not np.isnan(row["rank"]):
        parts.append(f"rank {rank_words(row['rank'])}")
    if not np.isnan(row["scale"]):
        parts.append(f"λ = {row['scale']:.3g}")
    return ", ".join(parts)


def rank_words(value: float) -> str:
    """A share as a percentage, a number of directions above 1 as it is."""
    return percent(value) if value <= 1 else f"{value:g}"


def tasks_over_rank(
    frame: pd.DataFrame, value: str, title: str, *, axis: str = "rank", chosen: float | None = None
) -> go.Figure:
    """Accuracy of each task over rank (or over scale), its best point enlarged.

    Args:
        frame: rows with task, rank, scale and `value` (shares), one per task and place.
        value: ``accuracy`` or another metric, or ``normalised`` (share of the expert's).
        title: the question answered.
        axis: ``rank`` or ``scale``.
        chosen: marked by a vertical line.

    Example:
        >>> frame = pd.DataFrame({"task": "digits", "rank": [0.04, 0.08], "accuracy": [0.6, 0.7]})
        >>> tasks_over_rank(frame.assign(scale=1.0), "accuracy", "Which rank?").data[0].name
        'digits'
    """
    tasks = list(dict.fromkeys(frame["task"]))
    colours, markers = task_colours(tasks), task_markers(tasks)
    figure, metric = go.Figure(), METRICS.get(cast("MetricName", value))
    lower, factor = (False, 100.0) if metric is None else (metric.lower_is_better, metric.factor)
    shown = ".1f" if factor == 100 else ".3f"
    for task in tasks:
        mine = frame[frame["task"] == task].sort_values(axis)
        best = mine[value].to_numpy() == (mine[value].min() if lower else mine[value].max())
        figure.add_scatter(
            x=mine[axis].to_numpy(),
            y=factor * mine[value].to_numpy(),
            mode="lines+markers",
            name=task,
            line={"color": colours[task], "width": 2},
            marker={"symbol": markers[task], "size": np.where(best, 13, 6)},
            text=[setting_words(row) for row in mine.to_dict("records")],
            hovertemplate=f"%{{text}}: %{{y:{shown}}}{' %' if factor == 100 else ''}<extra>"
            + task
            + "</extra>",
        )
    label = f"{metric_of(frame).title} (% of the expert's)" if metric is None else metric.axis
    layout(figure, title, x=SHARE_OF_RANK if axis == "rank" else SCALE, y=label, height=420)
    if axis == "rank":
        set_axes(figure, x=share_axis(frame["rank"].unique()))
    if chosen is not None:
        _mark(figure, axis, chosen)
    return figure
