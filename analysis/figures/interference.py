"""Figures of interference: maps of task pairs, curves over the rank, and the trade-off."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures.spectra import short_name, short_names
from analysis.figures.style import (
    CELLS_WITH_TEXT,
    DIVERGING,
    OKABE_ITO,
    ORIGIN_COLOURS,
    ORIGIN_DASHES,
    ORIGIN_MARKERS,
    ORIGIN_NAMES,
    REFERENCE,
    SEQUENTIAL,
    add_colour_bar,
    add_line,
    colour_cell_numbers,
    layout,
    make_cells_square,
    mark_share,
    percent,
    set_axes,
    share_axis,
)

# Column of a frame: its label with unit.
VALUES = {
    "cosine": "Cosine (−1 to 1)",
    "interference": "Interference I(k) (sum over pairs)",
    "overlap": "Overlap of two tasks (0 to 1)",
    "interference_normalised": "Mean interference of a pair (0 to 1)",
    "reconstruction": "Reconstruction error R(k) (squared weight units)",
    "reconstruction_share": "Reconstruction error, share of Σσ² lost (0 to 1)",
    "angle": "Mean principal angle (degrees)",
    "update_norm": "Norm of the update ‖Σ SVD<sub>k</sub>‖<sub>F</sub> (weight units)",
}


def pair_map(
    frame: pd.DataFrame,
    value: str,
    title: str = "",
    diverging: bool = False,
    zmin: float | None = None,
    zmax: float | None = None,
) -> go.Figure:
    """A T x T map of task pairs with the values in its cells.

    Args:
        frame: one row per ordered pair, with columns first, second and `value`.
        value: the column drawn.
        title: the figure's title.
        diverging: signed values, white at zero; the colour range is then symmetric.
        zmin: lower end of the colour range; by default 0, or minus the largest magnitude.
        zmax: upper end of the colour range; by default the largest value or magnitude.

    Example:
        >>> frame = pd.DataFrame({"first": list("aabb"), "second": list("abab")})
        >>> pair_map(frame.assign(cosine=[1, 0.5, 0.5, 1]), "cosine").data[0].z.tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    table = frame.pivot_table(index="first", columns="second", values=value, sort=False)
    tasks = list(table.index)
    z = table[tasks].to_numpy(dtype=float)
    top = float(np.nanmax(np.abs(z))) or 1.0
    label = "Interference I<sub>ij</sub>(k) (0 to 1)" if value == "interference" else VALUES[value]
    figure = go.Figure(
        go.Heatmap(
            z=z,
            x=tasks,
            y=tasks,
            colorscale=DIVERGING if diverging else SEQUENTIAL,
            zmin=zmin if zmin is not None else (-top if diverging else 0.0),
            zmax=zmax if zmax is not None else top,
            xgap=1,
            ygap=1,
            texttemplate=("%{z:.0f}" if top > 10 else "%{z:.2f}")
            if z.size <= CELLS_WITH_TEXT
            else None,
            hovertemplate=f"%{{y}} with %{{x}}<br>{label}: %{{z:.6g}}<extra></extra>",
        )
    )
    layout(figure, title, x="Task", y="Task", height=480, legend=False)
    add_colour_bar(figure, label)
    colour_cell_numbers(figure)
    make_cells_square(figure)
    return figure


def _curves(frame: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Parameter ("" for a mean over layers), origin and points of each curve, by share."""
    keyed = frame if "parameter" in frame else frame.assign(parameter="")
    for (parameter, origin), part in keyed.groupby(["parameter", "origin"], sort=False):
        yield str(parameter), str(origin), part.sort_values("share")


def _hover_head(parameter: str, origin: str, part: pd.DataFrame) -> tuple[str, np.ndarray]:
    """First lines of a hover text, and the customdata they need: share and rank."""
    where = f"{short_name(parameter)}, " if parameter else ""
    if "k" in part:
        data = part[["share", "k"]].to_numpy(dtype=float)
        rank = "k = %{customdata[1]:.0f} (%{customdata[0]:.3%} of the directions)"
    else:
        data = part[["share"]].to_numpy(dtype=float)
        rank = "%{customdata[0]:.3%} of the directions"
    return f"{where}{ORIGIN_NAMES[origin]}<br>{rank}<br>", data


def curves_over_rank(
    frame: pd.DataFrame, value: str, title: str = "", chosen_share: float | None = None
) -> go.Figure:
    """A quantity over the share of directions kept, centred against original.

    Args:
        frame: of :func:`analysis.spectral.interference.interference_over_rank` (a curve a matrix)
            or :func:`analysis.spectral.interference.mean_over_layers`, one origin or both.
        value: the column drawn.
        title: the figure's title.
        chosen_share: share of the directions that the page has chosen.
    """
    figure = go.Figure()
    curves = list(_curves(frame))
    named: set[str] = set()
    for parameter, origin, part in curves:
        head, data = _hover_head(parameter, origin, part)
        figure.add_scatter(
            x=part["share"].to_numpy(),
            y=part[value].to_numpy(),
            customdata=data,
            mode="lines+markers",
            name=ORIGIN_NAMES[origin],
            legendgroup=origin,
            showlegend=origin not in named,
            opacity=1.0 if len(curves) <= 2 else 0.6,
            line={"color": ORIGIN_COLOURS[origin], "dash": ORIGIN_DASHES[origin], "width": 2},
            marker={"symbol": ORIGIN_MARKERS[origin], "size": 7},
            hovertemplate=f"{head}{VALUES[value]}: %{{y:.6g}}<extra></extra>",
        )
        named.add(origin)
        if value == "overlap" and len(curves) <= 2:
            add_random_level(figure, origin, part)
    layout(figure, title, x="Share of directions kept, k / r (%, log scale)", y=VALUES[value])
    set_axes(figure, x=share_axis(frame["share"].to_numpy()), y={"rangemode": "tozero"})
    if chosen_share is not None:
        mark_share(figure, chosen_share)
    return figure


def add_random_level(figure: go.Figure, origin: str, part: pd.DataFrame) -> None:
    """The overlap that directions turned at random would have, as a thin line."""
    figure.add_scatter(
        x=part["share"].to_numpy(),
        y=part["random"].to_numpy(),
        mode="lines",
        name=f"random directions, {ORIGIN_NAMES[origin]}",
        line={"color": ORIGIN_COLOURS[origin], "dash": "dot", "width": 1.5},
        hovertemplate="random directions: %{y:.6g}<extra></extra>",
    )


def _uncrowded_labels(x: np.ndarray, y: np.ndarray, gap: float = 0.15) -> set[int]:
    """Indices of points on a curve, in the unit square, whose labels do not cover each other."""
    chosen: list[int] = []
    for i in range(len(x)):
        if all(np.hypot(x[i] - x[j], y[i] - y[j]) >= gap for j in chosen):
            chosen.append(i)
    return set(chosen)


def trade_off(frame: pd.DataFrame, title: str = "", chosen_share: float | None = None) -> go.Figure:
    """Interference against reconstruction error, the rank along the curve.

    Down and to the left is better: little lost and little in each other's way.

    Args:
        frame: of :func:`analysis.spectral.interference.interference_over_rank` (a curve a matrix)
            or :func:`analysis.spectral.interference.mean_over_layers`, one origin or both.
        title: the figure's title.
        chosen_share: share of the directions that the page has chosen; the nearest computed
            point of each curve gets a ring.
    """
    figure = go.Figure()
    named: set[str] = set()
    for parameter, origin, part in _curves(frame):
        x = part["reconstruction_share"].to_numpy()
        y = part["interference_normalised"].to_numpy()
        shares = part["share"].to_numpy()
        ranks = [f"k={k}" for k in part["k"]] if "k" in part else [percent(s) for s in shares]
        labelled = _uncrowded_labels(x / max(float(x.max()), 1e-12), y / max(float(y.max()), 1e-12))
        head, data = _hover_head(parameter, origin, part)
        hover = f"{head}lost: %{{x:.4%}} of the energy<br>interference: %{{y:.6g}}<extra></extra>"
        style = {"color": ORIGIN_COLOURS[origin], "dash": ORIGIN_DASHES[origin], "width": 2}
        figure.add_scatter(
            x=x,
            y=y,
            customdata=data,
            mode="lines+markers+text",
            text=[rank if i in labelled else "" for i, rank in enumerate(ranks)],
            textposition="top right" if origin == "average" else "bottom right",
            textfont={"size": 11},
            cliponaxis=False,
            name=ORIGIN_NAMES[origin],
            legendgroup=origin,
            showlegend=origin not in named,
            line=style,
            marker={"symbol": ORIGIN_MARKERS[origin], "size": 7},
            hovertemplate=hover,
        )
        named.add(origin)
        if chosen_share is not None:
            nearest = int(np.argmin(np.abs(np.log(shares / chosen_share))))
            figure.add_scatter(
                x=x[[nearest]],
                y=y[[nearest]],
                customdata=data[[nearest]],
                mode="markers",
                name=f"chosen: {percent(shares[nearest])}",
                legendgroup=origin,
                showlegend=False,
                marker={
                    "symbol": "circle-open",
                    "size": 17,
                    "color": ORIGIN_COLOURS[origin],
                    "line": {"width": 3},
                },
                hovertemplate="chosen<br>" + hover,
            )
    layout(
        figure,
        title,
        x="Energy lost, R(k) / Σσ² (%)",
        y=VALUES["interference_normalised"],
    )
    set_axes(figure, x={"tickformat": ".0%"}, y={"rangemode": "tozero"})
    return figure


def centring_map(frame: pd.DataFrame, title: str = "") -> go.Figure:
    """Interference about the average against interference about the base, a point a matrix.

    Below the diagonal centring lowers it. Filled points are those of which that is expected.

    Args:
        frame: of :func:`analysis.spectral.centring.centring_frame`.
        title: the figure's title.
    """
    figure = go.Figure()
    top = 1.08 * float(frame[["original", "centred"]].to_numpy().max()) or 1.0
    figure.add_scatter(
        x=[0, top],
        y=[0, top],
        mode="lines",
        name="no change",
        line={"color": REFERENCE, "dash": "dot", "width": 1.5},
        hoverinfo="skip",
    )
    _add_expected(figure, frame, "original", "centred")
    layout(figure, title, x="Interference about the base (0 to 1)", y="About the average (0 to 1)")
    set_axes(figure, x={"range": [0, top]}, y={"range": [0, top]})
    return figure


def centring_condition(frame: pd.DataFrame, title: str = "") -> go.Figure:
    """What centring does to interference, over how much the leading directions have in common.

    Args:
        frame: of :func:`analysis.spectral.centring.centring_frame`.
        title: the figure's title.
    """
    figure = go.Figure()
    _add_expected(figure, frame, "common", "ratio")
    layout(
        figure,
        title,
        x="Common share of the leading directions",
        y="Interference, centred / original",
    )
    needed = float(frame["needed"].iloc[0])
    low, high = (float(x) for x in frame["common"].agg(["min", "max"]))
    figure.add_vline(
        needed,
        line={"color": REFERENCE, "dash": "dash", "width": 1.5},
        annotation={"text": f"1/T = {needed:.1%}", "font": {"size": 12}},
        annotation_position="top left" if 2 * needed > high else "top right",
    )
    add_line(figure, {"color": REFERENCE, "dash": "dot", "width": 1.5}, y=1)
    set_axes(
        figure,
        x={"tickformat": ".0%", "range": [min(low, 0) - 0.02, max(high, needed) * 1.15]},
        y={"rangemode": "tozero"},
    )
    return figure


def _add_expected(figure: go.Figure, frame: pd.DataFrame, x: str, y: str) -> None:
    """Points of matrices in which centring is expected to lower interference, and of others."""
    names = short_names(frame["parameter"])
    above = frame["common"] > frame["needed"]
    for expected, name, colour, symbol in (
        (True, "common share above 1/T: expected to fall", ORIGIN_COLOURS["average"], "circle"),
        (False, "below 1/T: expected not to", ORIGIN_COLOURS["base"], "diamond-open"),
    ):
        part = frame[above == expected]
        if part.empty:
            continue
        figure.add_scatter(
            x=part[x].to_numpy(),
            y=part[y].to_numpy(),
            customdata=part[["common", "original", "centred"]].to_numpy(),
            text=[names[parameter] for parameter in part["parameter"]],
            mode="markers",
            name=name,
            marker={"color": colour, "symbol": symbol, "size": 10, "line": {"width": 1.5}},
            hovertemplate="%{text}<br>common share %{customdata[0]:.1%}<br>interference "
            "%{customdata[1]:.3f} → %{customdata[2]:.3f}<extra></extra>",
        )


def conflict_bars(frame: pd.DataFrame, title: str = "") -> go.Figure:
    """Per parameter: the magnitude that cancels in the sum, and the entries with both signs.

    Args:
        frame: of :func:`analysis.spectral.interference.sign_conflict`.
        title: the figure's title.
    """
    names = short_names(frame["parameter"])
    labels = [names[parameter] for parameter in frame["parameter"]]
    figure = go.Figure()
    for column, name, colour in (
        ("conflict", "magnitude that cancels", OKABE_ITO[0]),
        ("opposed", "entries with both signs", OKABE_ITO[5]),
    ):
        figure.add_bar(
            y=labels,
            x=100 * frame[column].to_numpy(),
            name=name,
            orientation="h",
            marker={"color": colour},
            hovertemplate="%{y}: %{x:.1f} %<extra>" + name + "</extra>",
        )
    layout(figure, title, x="Share (%)", y="Matrix", height=140 + 34 * len(labels))
    figure.layout.barmode = "group"
    set_axes(
        figure,
        x={"range": [0, 100]},
        y={"type": "category", "autorange": "reversed", "showgrid": False},
    )
    return figure
