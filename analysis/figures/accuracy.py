"""Figures of accuracy: per task, over the number of tasks, over a model's size."""

from __future__ import annotations

from typing import cast

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures.style import DASHES, MARKERS, OKABE_ITO, REFERENCE, add_line, layout, set_axes
from analysis.metrics import ACCURACY, METRICS, metric_of
from merge_core.suites.data_spec import MetricName

# Fixed looks of what appears on several pages; anything else takes the next colour and marker.
MODEL_LOOKS = {
    "Base": (REFERENCE, "x"),
    "Experts": (REFERENCE, "diamond-open"),
    "Weight average": (OKABE_ITO[0], "square"),
    "Task Arithmetic": (OKABE_ITO[1], "triangle-up"),
    "CART": (OKABE_ITO[3], "circle"),
}
OTHER_LOOKS = ((OKABE_ITO[3], "circle"), (OKABE_ITO[0], "square"), (OKABE_ITO[2], "triangle-up"))
OVER = {
    "count": "Tasks merged",
    "parameters": "Parameters of a model",
    "normalised": "Share of the experts' (%)",
}
FURTHER_LOOKS = ((OKABE_ITO[2], "diamond"), (OKABE_ITO[4], "cross"))


def dots_per_task(frame: pd.DataFrame, title: str) -> go.Figure:
    """Dot plot: a row per task and one for their mean, a dot with its interval per model.

    Args:
        frame: rows with model, task, accuracy (or another metric), low, high.
        title: the question answered.

    Example:
        >>> from analysis.accuracy import accuracy_frame
        >>> frame = accuracy_frame({"digits": np.array([True, False])}).assign(model="CART")
        >>> dots_per_task(frame, "How good is it?").data[0].name
        'CART'
    """
    metric = metric_of(frame)
    tasks = list(dict.fromkeys(frame["task"]))
    models = list(dict.fromkeys(frame["model"]))
    place = {task: len(tasks) - i for i, task in enumerate(tasks)}
    others = iter(OTHER_LOOKS * len(models))
    looks = {m: MODEL_LOOKS[m] if m in MODEL_LOOKS else next(others) for m in models}
    # Models of one task stand a little apart, so that their intervals do not cover each other,
    # and nearer to each other than to the next task.
    reach = min(0.24, 0.1 * (len(models) - 1))
    offsets = np.linspace(reach, -reach, len(models))
    figure = go.Figure()
    for offset, model in zip(offsets, models, strict=True):
        mine = frame[frame["model"] == model]
        colour, symbol = looks[model]
        accuracy = metric.factor * mine[metric.column].to_numpy()
        figure.add_scatter(
            x=np.append(accuracy, accuracy.mean()),
            y=np.append([place[task] + offset for task in mine["task"]], offset - 0.15),
            mode="markers",
            name=model,
            text=[*mine["task"], "mean over tasks"],
            marker={"color": colour, "symbol": symbol, "size": 10},
            cliponaxis=False,  # a dot at 100 % is whole
            error_x={
                "type": "data",
                "symmetric": False,
                "array": np.append(metric.factor * mine["high"].to_numpy() - accuracy, 0),
                "arrayminus": np.append(accuracy - metric.factor * mine["low"].to_numpy(), 0),
                "thickness": 1.2,
                "width": 0,
                "color": colour,
            },
            hovertemplate=f"%{{text}}: %{{x:{metric.of_hover}}}{metric.ending}<extra>"
            + model
            + "</extra>",
        )
    add_line(figure, {"color": REFERENCE, "width": 1, "dash": "dot"}, y=0.4)
    layout(figure, title, x=metric.axis, y="", height=110 + 44 * (len(tasks) + 1))
    set_axes(
        figure,
        y={
            "tickmode": "array",
            "tickvals": [*place.values(), -0.15],
            "ticktext": [*place, "<b>mean</b>"],
            "range": [-0.6, len(tasks) + 0.55],
            "showgrid": False,
        },
    )
    if metric.highest == 1:
        lowest = 100 * float(frame["low"].min())
        set_axes(figure, x={"range": [max(0.0, lowest - 3), 101]})
    return figure


def accuracy_over(summary: pd.DataFrame, by: str, value: str, title: str) -> go.Figure:
    """A line per method with the range over subsets as a band.

    Args:
        summary: of :func:`analysis.comparison.scaling.summarise_over`.
        by: its column along the x axis, ``count`` or ``parameters``.
        value: what the mean is of, ``accuracy`` or another metric, or ``normalised``.
        title: the question answered.

    Example:
        >>> from analysis.comparison.scaling import summarise_over
        >>> frame = pd.DataFrame({"method": "CART", "count": [2, 3], "accuracy": [0.7, 0.5]})
        >>> summary = summarise_over(frame, "count", "accuracy")
        >>> accuracy_over(summary, "count", "accuracy", "How?").data[-1].y.tolist()
        [70.0, 50.0]
    """
    figure, metric = go.Figure(), METRICS.get(cast("MetricName", value), ACCURACY)
    form = metric.of_hover
    others = iter(FURTHER_LOOKS * len(summary))
    for place, (method, part) in enumerate(summary.groupby("method", sort=False)):
        named = str(method)
        colour, symbol = MODEL_LOOKS[named] if named in MODEL_LOOKS else next(others)
        part = part.sort_values(by)
        x = part[by].to_numpy()
        low, high = (metric.factor * part[name].to_numpy() for name in ("least", "most"))
        figure.add_scatter(
            x=np.concatenate([x, x[::-1]]),
            y=np.concatenate([high, low[::-1]]),
            mode="lines",
            fill="toself",
            fillcolor=colour,
            opacity=0.12,
            line={"width": 0},
            hoverinfo="skip",
            legendgroup=named,
            showlegend=False,
        )
        figure.add_scatter(
            x=x,
            y=metric.factor * part["mean"].to_numpy(),
            customdata=np.column_stack([low, high, part["subsets"]]),
            mode="lines+markers",
            name=named,
            legendgroup=named,
            line={"color": colour, "dash": DASHES[place % len(DASHES)], "width": 2},
            marker={"symbol": symbol if symbol in MARKERS else "circle", "size": 9},
            hovertemplate=f"{named}<br>%{{x:,}}: %{{y:{form}}}{metric.ending} "
            f"(%{{customdata[0]:{form}}} to %{{customdata[1]:{form}}} "
            "over %{customdata[2]:.0f})<extra></extra>",
        )
    layout(figure, title, x=OVER[by], y=OVER.get(value, metric.axis))
    ticks = sorted(summary[by].unique())
    if by == "parameters":
        texts = [f"{tick / 1e6:.3g} M" for tick in ticks]
        set_axes(figure, x={"type": "log"})
    else:
        texts = [f"{tick:d}" for tick in ticks]
    set_axes(figure, x={"tickmode": "array", "tickvals": ticks, "ticktext": texts})
    return figure
