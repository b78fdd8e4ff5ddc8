"""A matrix as it is built up: an expert from its change, a merge from all changes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.figures.style import DIVERGING, REFERENCE, layout, percent

PLACES = {"average": (1, 1), "change": (1, 2), "expert": (1, 3), "sum": (2, 2), "merge": (2, 3)}
OPENED = 4  # directions shown at first: few enough to see them, enough to see more than one
QUANTILE = 0.99  # of the sizes of entries, beyond which colours do not grow
STEP_MS = 900


def build_up_figure(
    frame: pd.DataFrame, task: str, tasks: int, scale: float, title: str = ""
) -> go.Figure:
    """Average + a task's change = its expert, and average + λ · all changes = a merge.

    A slider takes the changes' first k directions, in the browser alone.

    Args:
        frame: of :func:`analysis.spectral.build_up.build_up`.
        task: whose change it is.
        tasks: how many experts there are.
        scale: λ of the merge.
        title: the figure's title.

    Example:
        >>> from analysis.spectral.build_up import build_up
        >>> from merge_core.task_vectors import TensorGroup
        >>> suite = load_suite("vision").restrict(["digits", "dots"])
        >>> group = TensorGroup(suite, suite.tasks, "blocks.0.attn.proj.weight", FactorStore())
        >>> figure = build_up_figure(build_up(group, "digits", side=4), "digits", 2, 1.0)
        >>> [frame.name for frame in figure.frames]
        ['1', '2', '4', '8', '16', '32', '64', '256']
    """
    counts = [int(k) for k in np.unique(frame.loc[frame["part"] == "change", "k"])]
    pictures = {
        (part, k): cells.pivot(index="row", columns="column", values="value").to_numpy()
        for part, steps in (("average", [0]), ("change", counts), ("sum", counts))
        for k in steps
        for cells in [frame[(frame["part"] == part) & (frame["k"] == k)]]
    }
    energies = frame[frame["part"] == "change"].groupby("k")["energy"].first()
    average = pictures["average", 0]
    weights = _limit(average)
    changes = _limit(pictures["change", counts[-1]])

    def traces(k: int) -> dict[str, go.Heatmap]:
        change, total = pictures["change", k], scale * pictures["sum", k]
        values = {"change": change, "expert": average + change}
        values |= {"sum": total, "merge": average + total}
        return {
            part: _map(cells, changes if part in ("change", "sum") else weights)
            for part, cells in values.items()
        }

    figure = make_subplots(2, 3, horizontal_spacing=0.09, vertical_spacing=0.2)
    opened = min(counts, key=lambda k: abs(k - OPENED))
    for place in (PLACES["average"], (2, 1)):
        figure.add_trace(_map(average, weights), *place)
    first = traces(opened)
    for part, trace in first.items():
        figure.add_trace(trace, *PLACES[part])
    layout(figure, title, x="", y="", height=560, legend=False)
    figure.update_layout(margin={"l": 8, "r": 8, "t": figure.layout.margin.t + 34, "b": 92})
    figure.update_xaxes(visible=False, constrain="domain")
    for axis, anchor in zip(figure.select_yaxes(), figure.select_xaxes(), strict=True):
        axis.update(
            visible=False,
            autorange="reversed",
            scaleanchor=anchor.plotly_name.replace("axis", ""),
            constrain="domain",
        )
    _write_names(figure, task, tasks, scale, f"{float(f'{weights / changes:.2g}'):,g} x magnified")
    figure.frames = [
        go.Frame(data=list(traces(k).values()), traces=[2, 3, 4, 5], name=str(k)) for k in counts
    ]
    figure.update_layout(
        sliders=[_slider(counts, energies, counts.index(opened))], updatemenus=[_play(counts)]
    )
    return figure


def _write_names(figure: go.Figure, task: str, tasks: int, scale: float, strength: str) -> None:
    """A name above each picture, and signs between them."""
    names = {
        (1, 1): "average<br>of the experts",
        (1, 2): f"change of {task},<br>{strength}",
        (1, 3): f"the expert<br>{task}",
        (2, 1): "average<br>of the experts",
        (2, 2): f"{scale:g} x {tasks} changes,<br>{strength}",
        (2, 3): "the merge",
    }
    for (row, column), name in names.items():
        _write(figure, row, column, name)
    for row in (1, 2):
        for column, sign in ((1, "+"), (2, "=")):
            _write(figure, row, column, sign, beside=True)


def _limit(cells: np.ndarray) -> float:
    return float(np.quantile(np.abs(cells), QUANTILE)) or 1.0


def _map(cells: np.ndarray, limit: float) -> go.Heatmap:
    return go.Heatmap(
        z=cells.astype(np.float32),
        zmin=-limit,
        zmax=limit,
        colorscale=DIVERGING,
        showscale=False,
        hovertemplate="%{z:.3g}<extra></extra>",
    )


def _write(figure: go.Figure, row: int, column: int, text: str, beside: bool = False) -> None:
    """A name above a picture, or a sign to the right of it."""
    number = 3 * (row - 1) + column
    axis = "" if number == 1 else str(number)
    where = (
        {"x": 1.15, "y": 0.5, "font": {"size": 22}, "xanchor": "center", "yanchor": "middle"}
        if beside
        else {"x": 0.5, "y": 1.02, "font": {"size": 12}, "xanchor": "center", "yanchor": "bottom"}
    )
    figure.add_annotation(
        text=text, xref=f"x{axis} domain", yref=f"y{axis} domain", showarrow=False, **where
    )


def _slider(counts: list[int], energies: pd.Series, active: int) -> dict[str, object]:
    jump = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}}
    return {
        "active": active,
        "steps": [
            {
                "label": f"{k} · {percent(round(float(energies[k]), 2))}",
                "method": "animate",
                "args": [[str(k)], {**jump, "transition": {"duration": 0}}],
            }
            for k in counts
        ],
        "currentvalue": {
            "prefix": "directions of each change, and their energy: ",
            "font": {"size": 13},
        },
        "x": 0.18,
        "len": 0.8,
        "xanchor": "left",
        "y": -0.03,
        "yanchor": "top",
        "pad": {"t": 4, "b": 4},
        "bordercolor": REFERENCE,
        "transition": {"duration": 0},
    }


def _play(counts: list[int]) -> dict[str, object]:
    timing = {"frame": {"duration": STEP_MS, "redraw": True}, "transition": {"duration": 0}}
    return {
        "type": "buttons",
        "showactive": False,
        "x": 0,
        "xanchor": "left",
        "y": -0.08,
        "yanchor": "top",
        "pad": {"t": 10},
        "buttons": [
            {"label": "▶ Play", "method": "animate", "args": [[str(k) for k in counts], timing]}
        ],
    }
