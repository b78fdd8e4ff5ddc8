"""Figures of a comparison: a dot per method, a radar over tasks, paired differences, costs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures.style import (
    DIVERGING,
    MARKERS,
    OKABE_ITO,
    REFERENCE,
    add_colour_bar,
    layout,
    set_axes,
)
from analysis.metrics import ACCURACY, Metric, metric_of

MOST_ON_RADAR = 6
# Names of methods are broken into two lines of this many letters, which leaves room on a phone.
LETTERS = 26
ROW = 30  # pixels, which hold two lines


def _break_lines(text: str) -> str:
    """A name in two lines that fit a phone; what does not fit is left out."""
    return "<br>".join(textwrap.wrap(text, LETTERS, max_lines=2, placeholder=" …"))


def method_dots(
    summary: pd.DataFrame, title: str, references: dict[str, float] | None = None
) -> go.Figure:
    """Mean accuracy of each method with its interval, best at the top; numbers are positions.

    Args:
        summary: of :func:`analysis.comparison.run.summarise`, or of
            :func:`analysis.comparison.seeds.join_seeds`, which shows seeds as a range.
        title: the question answered.
        references: vertical lines by name, such as the experts' mean (shares).
    """
    metric = metric_of(summary)
    frame = metric.rank(summary)[::-1]
    accuracy = metric.factor * frame[metric.column].to_numpy()
    shown = f"%{{x:{metric.of_hover}}}{metric.ending}"
    figure = go.Figure()
    figure.add_scatter(
        x=accuracy,
        y=frame["label"],
        mode="markers",
        name="mean over tasks",
        marker={"color": OKABE_ITO[0], "size": 10},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": metric.factor * frame["high"].to_numpy() - accuracy,
            "arrayminus": accuracy - metric.factor * frame["low"].to_numpy(),
            "thickness": 1.4,
            "width": 0,
        },
        hovertemplate=f"%{{y}}: {shown}<extra></extra>",
    )
    figure.add_scatter(
        x=metric.factor * frame["worst"].to_numpy(),
        y=frame["label"],
        mode="markers",
        name="worst task",
        text=frame["worst_task"],
        marker={"color": OKABE_ITO[3], "symbol": "line-ns-open", "size": 10},
        hovertemplate=f"%{{y}}, worst task %{{text}}: {shown}<extra></extra>",
    )
    if "least" in frame and (frame["most"] > frame["least"]).any():
        add_seed_ranges(figure, frame[frame["most"] > frame["least"]])
    names = [f"{len(frame) - row}  {label}" for row, label in enumerate(frame["label"])]
    layout(figure, title, x=metric.axis, y="", height=150 + ROW * len(frame))
    figure.layout.margin.t += 14
    set_axes(
        figure,
        y={
            "type": "category",
            "range": [-0.7, len(frame) - 0.3],
            "tickmode": "array",
            "tickvals": frame["label"],
            "ticktext": [_break_lines(name) for name in names],
            "tickfont": {"size": 11},
        },
    )
    for name, value in (references or {}).items():
        figure.add_vline(
            x=metric.factor * value,
            line={"color": REFERENCE, "dash": "dot", "width": 1.5},
            annotation={"text": name, "font": {"size": 11}},
            annotation_position="top",
        )
    return figure


def add_seed_ranges(figure: go.Figure, frame: pd.DataFrame) -> None:
    """From the least to the most accurate seed of each method that has several.

    Args:
        figure: of methods, changed in place.
        frame: with columns label, least and most (shares).
    """
    metric, gap = metric_of(frame), [None] * len(frame)
    ends = zip(metric.factor * frame["least"], metric.factor * frame["most"], gap, strict=True)
    labels = zip(frame["label"], frame["label"], gap, strict=True)
    figure.add_scatter(
        x=[value for ends_of_one in ends for value in ends_of_one],
        y=[label for labels_of_one in labels for label in labels_of_one],
        mode="lines+markers",
        name="from seed to seed",
        line={"color": OKABE_ITO[1], "width": 5},
        marker={"symbol": "line-ns-open", "size": 9, "color": OKABE_ITO[1]},
        opacity=0.8,
        hovertemplate=f"%{{y}}, over seeds: %{{x:{metric.of_hover}}}{metric.ending}<extra></extra>",
    )


def task_radar(frame: pd.DataFrame, labels: Sequence[str], title: str) -> go.Figure:
    """Accuracy over tasks as closed lines, at most six of them.

    Args:
        frame: of :func:`analysis.accuracy.task_frame`.
        labels: the methods drawn.
        title: the question answered.
    """
    metric, figure = metric_of(frame), go.Figure()
    for i, label in enumerate(labels[:MOST_ON_RADAR]):
        mine = frame[frame["label"] == label]
        r, theta = metric.factor * mine[metric.column].to_numpy(), mine["task"].tolist()
        figure.add_scatterpolar(
            r=np.append(r, r[:1]),
            theta=[*theta, *theta[:1]],
            mode="lines+markers",
            name=label,
            line={"color": OKABE_ITO[i % len(OKABE_ITO)], "width": 2},
            marker={"symbol": MARKERS[i % len(MARKERS)], "size": 7},
            hovertemplate=f"{label}, %{{theta}}: %{{r:{metric.of_hover}}}{metric.ending}"
            "<extra></extra>",
        )
    rows = -(-len(labels) // 2)  # of the legend on a phone
    layout(figure, title, x="", y="", height=450 + 20 * rows)
    figure.layout.margin.update(l=62, r=62, t=figure.layout.margin.t + 24, b=40 + 20 * rows)
    drawn = metric.factor * frame[frame["label"].isin(labels)][metric.column]
    axis: dict[str, Any] = {"ticksuffix": metric.ending, "nticks": 5}
    if metric.highest == 1:
        axis["range"] = [max(0.0, float(drawn.min()) - 5 if len(drawn) else 0.0), 100]
    elif len(drawn):  # the smaller the better, as it says: the centre is none at all
        axis["range"] = [0.0, 1.05 * float(drawn.max())]
    figure.update_layout(polar={"bgcolor": "rgba(0,0,0,0)", "radialaxis": axis})
    return figure


def paired_map(
    pairs: pd.DataFrame, order: Sequence[str], title: str, metric: Metric = ACCURACY
) -> go.Figure:
    """Differences row − column in points by place; a dot marks those that are real.

    Red is where the row is the better one, whichever way the metric goes.

    Args:
        pairs: of :func:`analysis.accuracy.paired_differences`.
        order: labels, best first.
        title: the question answered.
        metric: that differs.

    Example:
        >>> columns = ["first", "second", "difference", "real"]
        >>> pairs = pd.DataFrame([["CART", "average", 0.05, True]], columns=columns)
        >>> paired_map(pairs, ["CART", "average"], "Which is better?").data[0].z.tolist()
        [[0.0, 5.0], [-5.0, 0.0]]
    """
    place = {label: i for i, label in enumerate(order)}
    z = np.zeros((len(order), len(order)))
    mark = np.full(z.shape, "", dtype=object)
    for row in pairs.to_dict("records"):
        i, j = place[row["first"]], place[row["second"]]
        gap = metric.factor * row["difference"]
        z[i, j], z[j, i] = gap, -gap
        mark[i, j] = mark[j, i] = "●" if row["real"] else ""
    limit = max(metric.factor / 100, float(np.abs(z).max()))
    figure = go.Figure(
        go.Heatmap(
            z=z,
            x=list(order),
            y=list(order),
            text=mark,
            texttemplate="%{text}",
            textfont={"size": 7},
            colorscale=DIVERGING,
            reversescale=metric.lower_is_better,
            zmin=-limit,
            zmax=limit,
            hovertemplate=f"%{{y}} − %{{x}}: %{{z:{metric.difference_form}}} {metric.points} "
            "%{text}<extra></extra>",
        )
    )
    layout(
        figure,
        title,
        x="Place in the ranking, subtracted",
        y="Place in the ranking",
        height=340 + 14 * len(order),
        legend=False,
    )
    add_colour_bar(figure, f"Difference of mean {metric.noun} ({metric.points})")
    # Each row has its number; columns have as many as fit a phone.
    shown = [label for label, i in place.items() if len(order) <= 12 or i == 0 or i % 5 == 4]
    set_axes(
        figure,
        x={"tickvals": shown, "ticktext": [str(place[label] + 1) for label in shown]},
        y={
            "tickvals": list(order),
            "ticktext": [str(i + 1) for i in range(len(order))],
            "autorange": "reversed",
        },
    )
    set_axes(
        figure,
        x={"type": "category", "tickmode": "array", "tickangle": 0, "showgrid": False},
        y={"type": "category", "tickmode": "array", "showgrid": False},
    )
    return figure


def cost_scatter(summary: pd.DataFrame, quantity: str, title: str) -> go.Figure:
    """Accuracy against what it costs; those that nothing cheaper is better than are named.

    Args:
        summary: of :func:`analysis.comparison.run.summarise`.
        quantity: ``seconds``, ``peak_mb`` or ``storage_mb``.
        title: the question answered.
    """
    names = {
        "seconds": "Time of the processor (s, log scale)",
        "peak_mb": "Peak memory of the merge (MB)",
        "storage_mb": "Storage for all tasks (MB)",
    }
    metric = metric_of(summary)
    frame = summary.dropna(subset=[quantity]).sort_values([quantity, metric.column])
    value = metric.sign * frame[metric.column]
    # Those that nothing cheaper is better than are named; more names would hide each other.
    named = value > value.cummax().shift(fill_value=-np.inf)
    figure = go.Figure()
    figure.add_scatter(
        x=frame[quantity].to_numpy(),
        y=metric.factor * frame[metric.column].to_numpy(),
        mode="markers+text",
        text=[
            _break_lines(label) if own else ""
            for label, own in zip(frame["label"], named, strict=True)
        ],
        textposition=_label_positions(frame, quantity, named),
        textfont={"size": 11},
        cliponaxis=False,
        customdata=frame["label"],
        marker={"color": OKABE_ITO[0], "size": 11},
        hovertemplate=f"%{{customdata}}<br>%{{x:.3g}}, %{{y:{metric.of_hover}}}{metric.ending}"
        "<extra></extra>",
    )
    layout(figure, title, x=names[quantity], y=metric.axis, legend=False)
    if quantity == "seconds":
        set_axes(figure, x={"type": "log", "minorloglabels": "none"})
    return figure


def _label_positions(frame: pd.DataFrame, quantity: str, named: pd.Series) -> list[str]:
    """Where names stand at their points: beside each other where points are near each other."""
    x = frame[quantity].to_numpy(dtype=float)
    x = np.log(x) if quantity == "seconds" else x
    y = frame[metric_of(frame).column].to_numpy(dtype=float)
    places = np.full(len(frame), "top center", dtype=object)
    shown = np.flatnonzero(named)
    near = (np.diff(x[shown]) < 0.15 * np.ptp(x)) & (np.diff(y[shown]) < 0.1 * np.ptp(y))
    places[shown[:-1][near]] = "top left"
    places[shown[1:][near]] = "bottom right"
    places[shown[1:-1][near[:-1] & near[1:]]] = "top center"
    return list(places)
