"""Figures of a comparison: a dot per method, a radar over tasks, paired differences, costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures.style import DIVERGING, MARKERS, OKABE_ITO, REFERENCE, layout

MOST_ON_RADAR = 6


def method_dots(
    summary: pd.DataFrame, title: str, references: dict[str, float] | None = None
) -> go.Figure:
    """Mean accuracy of each method with its interval, best at the top.

    Args:
        summary: of :func:`analysis.compare.summary`.
        title: the question answered.
        references: vertical lines by name, such as the experts' mean (shares).
    """
    frame = summary.sort_values("accuracy")
    accuracy = 100 * frame["accuracy"].to_numpy()
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
            "array": 100 * frame["high"].to_numpy() - accuracy,
            "arrayminus": accuracy - 100 * frame["low"].to_numpy(),
            "thickness": 1.4,
            "width": 0,
        },
        hovertemplate="%{y}: %{x:.1f} %<extra></extra>",
    )
    figure.add_scatter(
        x=100 * frame["worst"].to_numpy(),
        y=frame["label"],
        mode="markers",
        name="worst task",
        text=frame["worst_task"],
        marker={"color": OKABE_ITO[3], "symbol": "line-ns-open", "size": 10},
        hovertemplate="%{y}, worst task %{text}: %{x:.1f} %<extra></extra>",
    )
    layout(figure, title, x="Accuracy (%)", y="", height=130 + 26 * len(frame))
    figure.update_yaxes(type="category")
    figure.layout.margin.t += 14
    for name, value in (references or {}).items():
        figure.add_vline(
            x=100 * value,
            line={"color": REFERENCE, "dash": "dot", "width": 1.5},
            annotation={"text": name, "font": {"size": 11}},
            annotation_position="top",
        )
    return figure


def task_radar(frame: pd.DataFrame, labels: Sequence[str], title: str) -> go.Figure:
    """Accuracy over tasks as closed lines, at most six of them.

    Args:
        frame: of :func:`analysis.compare.task_frame`.
        labels: the methods drawn.
        title: the question answered.
    """
    figure = go.Figure()
    for i, label in enumerate(labels[:MOST_ON_RADAR]):
        mine = frame[frame["label"] == label]
        r, theta = 100 * mine["accuracy"].to_numpy(), mine["task"].tolist()
        figure.add_scatterpolar(
            r=np.append(r, r[:1]),
            theta=[*theta, *theta[:1]],
            mode="lines+markers",
            name=label,
            line={"color": OKABE_ITO[i % len(OKABE_ITO)], "width": 2},
            marker={"symbol": MARKERS[i % len(MARKERS)], "size": 7},
            hovertemplate=f"{label}, %{{theta}}: %{{r:.1f}} %<extra></extra>",
        )
    layout(figure, title, x="", y="", height=460)
    low = 100 * float(frame["accuracy"].min())
    figure.update_layout(
        polar={
            "bgcolor": "rgba(0,0,0,0)",
            "radialaxis": {"range": [max(0.0, low - 5), 100], "ticksuffix": " %", "nticks": 5},
        }
    )
    return figure


def paired_map(pairs: pd.DataFrame, order: Sequence[str], title: str) -> go.Figure:
    """Differences row − column in points; a dot marks those that are real.

    Args:
        pairs: of :func:`analysis.compare.paired`.
        order: labels, best first.
        title: the question answered.
    """
    place = {label: i for i, label in enumerate(order)}
    z = np.zeros((len(order), len(order)))
    mark = np.full(z.shape, "", dtype=object)
    for row in pairs.to_dict("records"):
        i, j = place[row["first"]], place[row["second"]]
        z[i, j], z[j, i] = 100 * row["difference"], -100 * row["difference"]
        mark[i, j] = mark[j, i] = "●" if row["real"] else ""
    limit = max(1.0, float(np.abs(z).max()))
    figure = go.Figure(
        go.Heatmap(
            z=z,
            x=list(order),
            y=list(order),
            text=mark,
            texttemplate="%{text}",
            colorscale=DIVERGING,
            zmin=-limit,
            zmax=limit,
            hovertemplate="%{y} − %{x}: %{z:+.1f} points %{text}<extra></extra>",
            colorbar={"title": {"text": "Points", "side": "right"}, "thickness": 12},
        )
    )
    layout(figure, title, x="", y="", height=200 + 24 * len(order), legend=False)
    figure.update_xaxes(type="category", tickangle=-90, showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure


def cost_scatter(summary: pd.DataFrame, quantity: str, title: str) -> go.Figure:
    """Accuracy against what it costs.

    Args:
        summary: of :func:`analysis.compare.summary`.
        quantity: ``seconds``, ``peak_mb`` or ``storage_mb``.
        title: the question answered.
    """
    names = {
        "seconds": "Time to merge (s, log scale)",
        "peak_mb": "Peak memory of the merge (MB)",
        "storage_mb": "Storage for all tasks (MB)",
    }
    frame = summary.dropna(subset=[quantity])
    figure = go.Figure()
    figure.add_scatter(
        x=frame[quantity].to_numpy(),
        y=100 * frame["accuracy"].to_numpy(),
        mode="markers",
        text=frame["label"],
        marker={"color": OKABE_ITO[0], "size": 11},
        hovertemplate="%{text}<br>%{x:.3g}, %{y:.1f} %<extra></extra>",
    )
    layout(figure, title, x=names[quantity], y="Accuracy (%)", legend=False)
    if quantity == "seconds":
        figure.update_xaxes(type="log")
    return figure
