"""Figures of how alike models are: maps of pairs, and similarity over depth."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures.ensembles import BAND
from analysis.figures.style import (
    CELLS_WITH_TEXT,
    OKABE_ITO,
    SEQUENTIAL,
    add_colour_bar,
    colour_cell_numbers,
    layout,
    make_cells_square,
    set_axes,
)


def agreement_map(frame: pd.DataFrame, value: str = "agreement", title: str = "") -> go.Figure:
    """A map of pairs of models.

    Args:
        frame: of :func:`analysis.averaging.ensembles.agreement`.
        value: ``agreement`` or ``error_overlap``.
        title: the figure's title.

    Example:
        >>> frame = pd.DataFrame({"first": list("aabb"), "second": list("abab")})
        >>> agreement_map(frame.assign(agreement=[1, 0.5, 0.5, 1])).data[0].z.tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    label = {
        "agreement": "Equal predictions (share)",
        "error_overlap": "Errors in common (share)",
    }[value]
    table = frame.pivot(index="first", columns="second", values=value)
    order = list(dict.fromkeys(frame["first"]))
    # Short, as long names would leave the map no room on a phone.
    names = [str(name).removeprefix("member ").split()[-1] for name in order]
    z = table.loc[order, order].to_numpy(dtype=float)
    shown = np.isfinite(z)
    low = float(z[shown].min()) if shown.any() else 0.0
    figure = go.Figure(
        go.Heatmap(
            z=z,
            x=names,
            y=names,
            colorscale=SEQUENTIAL,
            # From a round value on: members of one start agree in nearly everything.
            zmin=max(0.0, np.floor(10 * min(low, 0.99)) / 10),
            zmax=1,
            xgap=1,
            ygap=1,
            texttemplate="%{z:.2f}" if z.size <= CELLS_WITH_TEXT else None,
            hovertemplate=f"%{{y}}, %{{x}}<br>{label}: %{{z:.3f}}<extra></extra>",
        )
    )
    axis = "Member (number), soup, ensemble"
    layout(figure, title, x=axis, y=axis, height=500, legend=False)
    add_colour_bar(figure, label)
    colour_cell_numbers(figure)
    make_cells_square(figure)
    return figure


def cka_layers(frame: pd.DataFrame, title: str = "") -> go.Figure:
    """Similarity over depth: the mean over pairs of members, and the lowest to highest pair.

    Args:
        frame: of :func:`analysis.averaging.similarity.mean_cka`.
        title: the figure's title.
    """
    frame = frame.sort_values("depth")
    layers = list(frame["layer"])
    figure = go.Figure()
    figure.add_scatter(
        x=[*layers, *layers[::-1]],
        y=np.concatenate([frame["highest"].to_numpy(), frame["lowest"].to_numpy()[::-1]]),
        fill="toself",
        fillcolor=BAND,
        line={"width": 0},
        mode="lines",
        name="lowest to highest pair",
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=layers,
        y=frame["mean"].to_numpy(),
        mode="lines+markers",
        name="mean over pairs",
        line={"color": OKABE_ITO[0], "width": 2},
        marker={"size": 8},
        customdata=frame[["lowest", "highest"]].to_numpy(),
        hovertemplate="%{x}: %{y:.3f}<br>pairs from %{customdata[0]:.3f} to "
        "%{customdata[1]:.3f}<extra></extra>",
    )
    layout(figure, title, x="Layer, from input to output", y="Linear CKA (0 to 1)")
    set_axes(figure, x={"type": "category"}, y={"range": [0, 1.02]})
    return figure
