"""Figures of accuracy: per task, over rank, and over rank and scale."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures.style import (
    CELLS_WITH_TEXT,
    OKABE_ITO,
    REFERENCE,
    SEQUENTIAL,
    TRANSPARENT,
    layout,
    mark_share,
    percent,
    share_axis,
    task_colours,
    task_markers,
)

# Fixed looks of what appears on several pages; anything else takes the next colour and marker.
MODEL_LOOKS = {
    "Base": (REFERENCE, "x"),
    "Experts": (REFERENCE, "diamond-open"),
    "Weight average": (OKABE_ITO[0], "square"),
    "Task Arithmetic": (OKABE_ITO[1], "triangle-up"),
    "CART": (OKABE_ITO[3], "circle"),
}
OTHER_LOOKS = ((OKABE_ITO[3], "circle"), (OKABE_ITO[0], "square"), (OKABE_ITO[2], "triangle-up"))
METHOD_LOOKS = {
    "cart": ("centred (CART)", OKABE_ITO[0], "solid", "circle"),
    "low_rank_task_arithmetic": ("original (about the base)", OKABE_ITO[3], "dash", "diamond"),
}
ACCURACY = "accuracy, %"
# Colours of the map end so many points below the best: settings that destroy the model would
# otherwise take the whole scale and leave none for the differences that matter.
MAP_SPAN = 15.0
MARK = "#D62728"


def per_task(frame: pd.DataFrame, title: str) -> go.Figure:
    """Dot plot: a row per task and one for their mean, a dot with its interval per model.

    Args:
        frame: rows with model, task, accuracy, low, high (shares).
        title: the question answered.
    """
    tasks = list(dict.fromkeys(frame["task"]))
    models = list(dict.fromkeys(frame["model"]))
    place = {task: len(tasks) - i for i, task in enumerate(tasks)}
    others = iter(OTHER_LOOKS * len(models))
    looks = {m: MODEL_LOOKS[m] if m in MODEL_LOOKS else next(others) for m in models}
    # Models of one task stand a little apart, so that their intervals do not cover each other.
    offsets = np.linspace(0.24, -0.24, len(models)) if len(models) > 1 else np.zeros(1)
    figure = go.Figure()
    for offset, model in zip(offsets, models, strict=True):
        mine = frame[frame["model"] == model]
        colour, symbol = looks[model]
        accuracy = 100 * mine["accuracy"].to_numpy()
        figure.add_scatter(
            x=np.append(accuracy, accuracy.mean()),
            y=np.append([place[task] + offset for task in mine["task"]], offset - 0.15),
            mode="markers",
            name=model,
            text=[*mine["task"], "mean over tasks"],
            marker={"color": colour, "symbol": symbol, "size": 10},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": np.append(100 * mine["high"].to_numpy() - accuracy, 0),
                "arrayminus": np.append(accuracy - 100 * mine["low"].to_numpy(), 0),
                "thickness": 1.2,
                "width": 0,
                "color": colour,
            },
            hovertemplate="%{text}: %{x:.1f} %<extra>" + model + "</extra>",
        )
    figure.add_hline(y=0.4, line={"color": REFERENCE, "width": 1, "dash": "dot"})
    layout(figure, title, x=ACCURACY, y="", height=110 + 44 * (len(tasks) + 1))
    figure.update_yaxes(
        tickmode="array",
        tickvals=[*place.values(), -0.15],
        ticktext=[*place, "<b>mean</b>"],
        range=[-0.6, len(tasks) + 0.55],
        showgrid=False,
    )
    lowest = 100 * float(frame["low"].min())
    figure.update_xaxes(range=[max(0.0, lowest - 3), 101])
    return figure


def accuracy_over_rank(
    frame: pd.DataFrame, title: str, references: Mapping[str, float], chosen_rank: float
) -> go.Figure:
    """Mean accuracy over rank with its interval, one line per kind of task vector.

    Args:
        frame: rows with method, rank, scale, accuracy, low, high; one scale per method.
        title: the question answered.
        references: horizontal lines, such as the experts' mean (shares).
        chosen_rank: marked by a vertical line.
    """
    figure = go.Figure()
    for method, mine in frame.groupby("method", sort=False):
        mine = mine.sort_values("rank")
        name, colour, dash, symbol = METHOD_LOOKS[str(method)]
        rank = mine["rank"].to_numpy()
        figure.add_scatter(
            x=np.concatenate([rank, rank[::-1]]),
            y=100 * np.concatenate([mine["high"].to_numpy(), mine["low"].to_numpy()[::-1]]),
            fill="toself",
            fillcolor=colour,
            opacity=0.15,
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            showlegend=False,
        )
        scale = float(mine["scale"].iloc[0])
        figure.add_scatter(
            x=rank,
            y=100 * mine["accuracy"].to_numpy(),
            mode="lines+markers",
            name=f"{name}, λ = {scale:g}",
            line={"color": colour, "dash": dash, "width": 2.5},
            marker={"symbol": symbol, "size": 8},
            text=[percent(value) for value in rank],
            hovertemplate="rank %{text}: %{y:.1f} %<extra>" + name + "</extra>",
        )
    for name, value in references.items():
        figure.add_hline(
            y=100 * value,
            line={"color": REFERENCE, "dash": "dot", "width": 1.5},
            annotation={"text": f"{name} {value:.1%}", "font": {"size": 11}},
            annotation_position="top left",
        )
    layout(figure, title, x="rank, share of directions kept (log scale)", y=ACCURACY, height=460)
    figure.update_xaxes(**share_axis(frame["rank"].unique()))
    mark_share(figure, chosen_rank)
    return figure


def rank_scale_map(
    frame: pd.DataFrame, title: str, chosen: tuple[float, float], best: tuple[float, float]
) -> go.Figure:
    """Mean accuracy over rank (across) and scale (up), with the chosen and the best point.

    Cells are drawn at equal size whatever the spacing of the grid. A transparent marker per cell
    carries ``[rank, scale]``, because a heat map alone cannot be clicked in Streamlit.

    Args:
        frame: rows with rank, scale, accuracy, low, high of one method.
        title: the question answered.
        chosen: rank and scale, ringed.
        best: rank and scale, starred.
    """
    table = frame.pivot(index="scale", columns="rank", values="accuracy").sort_index()
    ranks, scales = table.columns.to_numpy(), table.index.to_numpy()
    values = 100 * table.to_numpy()
    figure = go.Figure(
        go.Heatmap(
            z=values,
            zmin=max(float(np.nanmin(values)), float(np.nanmax(values)) - MAP_SPAN),
            zmax=float(np.nanmax(values)),
            x=np.arange(len(ranks)),
            y=np.arange(len(scales)),
            colorscale=SEQUENTIAL,
            colorbar={
                "title": {
                    "text": f"mean accuracy, % (colours end {MAP_SPAN:g} points below the best)",
                    "side": "right",
                },
                "thickness": 12,
            },
            texttemplate="%{z:.1f}" if values.size <= CELLS_WITH_TEXT else "",
            hoverinfo="skip",
        )
    )
    at = {
        (r, s): (i, j) for i, r in enumerate(ranks.tolist()) for j, s in enumerate(scales.tolist())
    }
    cells = list(at)
    figure.add_scatter(
        x=[at[cell][0] for cell in cells],
        y=[at[cell][1] for cell in cells],
        mode="markers",
        marker={"symbol": "square", "size": 26, "color": TRANSPARENT},
        customdata=[list(cell) for cell in cells],
        text=[
            f"rank {percent(r)}, λ = {s:g}: {values[at[r, s][1], at[r, s][0]]:.1f} %"
            for r, s in cells
        ],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
        # Selecting must not fade the others: they are invisible as it is.
        unselected={"marker": {"opacity": 1}},
    )
    for name, cell, symbol, size in (
        ("best", best, "star", 15),
        ("chosen", chosen, "circle-open", 28),
    ):
        if cell in at:
            figure.add_scatter(
                x=[at[cell][0]],
                y=[at[cell][1]],
                mode="markers",
                name=name,
                hoverinfo="skip",
                marker={
                    "symbol": symbol,
                    "size": size,
                    "color": MARK if name == "chosen" else "#FFFFFF",
                    "line": {"width": 3 if name == "chosen" else 1, "color": MARK},
                },
            )
    layout(figure, title, x="rank, share of directions kept", y="scaling coefficient λ", height=460)
    figure.update_xaxes(
        tickmode="array",
        tickvals=np.arange(len(ranks)),
        ticktext=[percent(rank) for rank in ranks],
        showgrid=False,
    )
    figure.update_yaxes(
        tickmode="array",
        tickvals=np.arange(len(scales)),
        ticktext=[f"{scale:g}" for scale in scales],
        showgrid=False,
    )
    return figure


def tasks_over_rank(frame: pd.DataFrame, value: str, title: str, chosen_rank: float) -> go.Figure:
    """Accuracy of each task over rank.

    Args:
        frame: rows with task, rank and `value` (shares) at one scale of one method.
        value: ``accuracy``, or ``normalised`` (share of the expert's).
        title: the question answered.
        chosen_rank: marked by a vertical line.
    """
    tasks = list(dict.fromkeys(frame["task"]))
    colours, markers = task_colours(tasks), task_markers(tasks)
    figure = go.Figure()
    for task in tasks:
        mine = frame[frame["task"] == task].sort_values("rank")
        figure.add_scatter(
            x=mine["rank"].to_numpy(),
            y=100 * mine[value].to_numpy(),
            mode="lines+markers",
            name=task,
            line={"color": colours[task], "width": 2},
            marker={"symbol": markers[task], "size": 7},
            text=[percent(rank) for rank in mine["rank"]],
            hovertemplate="rank %{text}: %{y:.1f} %<extra>" + task + "</extra>",
        )
    label = ACCURACY if value == "accuracy" else "accuracy, % of the expert's"
    layout(figure, title, x="rank, share of directions kept (log scale)", y=label, height=420)
    figure.update_xaxes(**share_axis(frame["rank"].unique()))
    mark_share(figure, chosen_rank)
    return figure
