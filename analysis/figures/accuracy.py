"""Figures of accuracy per task."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures.style import OKABE_ITO, REFERENCE, layout

# Fixed looks of what appears on several pages; anything else takes the next colour and marker.
MODEL_LOOKS = {
    "Base": (REFERENCE, "x"),
    "Experts": (REFERENCE, "diamond-open"),
    "Weight average": (OKABE_ITO[0], "square"),
    "Task Arithmetic": (OKABE_ITO[1], "triangle-up"),
    "CART": (OKABE_ITO[3], "circle"),
}
OTHER_LOOKS = ((OKABE_ITO[3], "circle"), (OKABE_ITO[0], "square"), (OKABE_ITO[2], "triangle-up"))
ACCURACY = "Accuracy (%)"


def dots_per_task(frame: pd.DataFrame, title: str) -> go.Figure:
    """Dot plot: a row per task and one for their mean, a dot with its interval per model.

    Args:
        frame: rows with model, task, accuracy, low, high (shares).
        title: the question answered.

    Example:
        >>> from analysis.accuracy import accuracy_frame
        >>> frame = accuracy_frame({"digits": np.array([True, False])}).assign(model="CART")
        >>> dots_per_task(frame, "How good is it?").data[0].name
        'CART'
    """
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
        accuracy = 100 * mine["accuracy"].to_numpy()
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
