"""The map of rank and scale: what was evaluated, on how many images, and what is tied."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures.rank_selection import (
    MARK,
    MODE_LOOKS,
    SCALE,
    SHARES,
    rank_words,
    setting_words,
    unit,
)
from analysis.figures.style import (
    CELLS_WITH_TEXT,
    SEQUENTIAL,
    TRANSPARENT,
    add_colour_bar,
    layout,
)
from analysis.metrics import ACCURACY, METRICS
from merge_core.suites.data_spec import MetricName

# Colours end this many points below the best: settings that destroy the model would otherwise
# take the whole scale and leave none for the differences that matter.
MAP_SPAN = 15.0
WORST_OVER_BEST = 1.5  # likewise of a metric where less is better
# Pixels between cells that were judged on part of the images: they are drawn smaller.
SMALL_CELL_GAP = 4
MOST_TICKS = 7


def evaluated_map(
    points: pd.DataFrame,
    ranks: Sequence[float],
    scales: Sequence[float],
    title: str,
    *,
    value: str = "accuracy",
    recommended: tuple[float, float] | None = None,
    chosen: tuple[float, float] | None = None,
    picks: pd.DataFrame | None = None,
) -> go.Figure:
    """What was evaluated of the grid: a cell per setting, small where only part of the images ran.

    Settings that were not evaluated stay blank. Those that are statistically tied with the
    recommended one are framed together. Cells have equal size whatever the spacing of the grid.
    A transparent marker per cell carries ``[rank, scale]``: a heat map alone cannot be clicked
    in Streamlit.

    Args:
        points: rows with rank, scale, images, score, low, high, tied; may be empty.
        ranks: the grid's ranks, ascending.
        scales: the grid's scales, ascending.
        title: the question answered.
        value: what the score is.
        recommended: rank and scale, starred; may lie off the grid.
        chosen: rank and scale, ringed.
        picks: rows with proxy, title, mode, rank, scale.

    Example:
        >>> points = pd.DataFrame({"rank": [0.08], "scale": [2.0], "images": [300], "score": [0.7]})
        >>> points = points.assign(low=0.6, high=0.8, tied=True)
        >>> evaluated_map(points, [0.04, 0.08], [1.0, 2.0], "Which setting?").data[0].type
        'heatmap'
    """
    known = points[points["rank"].isin(ranks) & points["scale"].isin(scales)]
    figure = go.Figure()
    layout(figure, title, x="Rank, share of directions kept", y=SCALE, height=460)
    if len(known):
        _add_cells(figure, known, ranks, scales, value)
    told = {
        (r, s): f"{_score(v, value)} on {n:.0f} inputs a task{', tied' if t else ''}"
        for r, s, v, n, t in zip(
            *(known[c] for c in ("rank", "scale", "score", "images", "tied")), strict=True
        )
    }
    _add_overlay(figure, ranks, scales, told)
    if picks is not None:
        _add_picks_to_map(figure, picks.dropna(subset=["rank", "scale"]), ranks, scales)
    edge = {"color": MARK, "width": 1.5}
    star = {"symbol": "star", "size": 17, "color": "#FFFFFF", "line": edge}
    ring = {"symbol": "circle-open", "size": 22, "color": MARK, "line": edge | {"width": 3}}
    for name, cell, marker in (("recommended", recommended, star), ("chosen", chosen, ring)):
        if cell is not None and not np.isnan(cell).any():
            figure.add_scatter(
                x=_cell_positions([cell[0]], ranks, logarithmic=True),
                y=_cell_positions([cell[1]], scales),
                mode="markers",
                name=name,
                hoverinfo="skip",
                marker=marker,
            )
    _space_cells_equally(figure, ranks, scales)
    return figure


def _score(score: float, value: str) -> str:
    return f"{score:.1%}" if value in SHARES else f"{score:.3g}"


def _add_cells(
    figure: go.Figure,
    known: pd.DataFrame,
    ranks: Sequence[float],
    scales: Sequence[float],
    value: str,
) -> None:
    """Cells of what was evaluated, a line around the tied ones, and the scale of colours.

    Cells are in two layers: all images, and part of them (smaller).
    """
    label, factor = unit(value)
    written = "%{z:.1f}" if factor == 100 else "%{z:.2f}"
    at = (
        known["scale"].map({s: j for j, s in enumerate(scales)}).to_numpy(dtype=int),
        known["rank"].map({r: i for i, r in enumerate(ranks)}).to_numpy(dtype=int),
    )
    shape = (len(scales), len(ranks))
    values = np.full(shape, np.nan)
    values[at] = factor * known["score"].to_numpy()
    whole, tied = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    whole[at] = (known["images"] == known["images"].max()).to_numpy()
    tied[at] = known["tied"].to_numpy(dtype=bool)
    for mask, gap in ((whole, 1), (~whole, SMALL_CELL_GAP)):
        figure.add_heatmap(
            z=np.where(mask, values, np.nan),
            x=np.arange(values.shape[1]),
            y=np.arange(values.shape[0]),
            coloraxis="coloraxis",
            xgap=gap,
            ygap=gap,
            texttemplate=written if values.size <= CELLS_WITH_TEXT else "",
            hoverinfo="skip",
            hoverongaps=False,
        )
    _add_outline(figure, tied)
    highest, lowest = float(np.nanmax(values)), float(np.nanmin(values))
    if factor == 100.0:
        lowest = max(lowest, highest - MAP_SPAN)
    better = METRICS.get(cast("MetricName", value), ACCURACY)
    if better.lower_is_better:  # the worst settings would take the whole scale here too
        highest = min(highest, lowest * WORST_OVER_BEST)
    figure.update_layout(
        coloraxis={
            "colorscale": SEQUENTIAL,
            "cmin": lowest,
            "cmax": highest,
            "reversescale": better.lower_is_better,
        }
    )
    add_colour_bar(figure, label)


def _add_outline(figure: go.Figure, tied: np.ndarray) -> None:
    """One line around the tied cells: the sides that they share with cells that are not."""
    padded = np.pad(tied, 1)
    x: list[float | None] = []
    y: list[float | None] = []
    for j, i in np.argwhere(tied):
        for dj, di in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            if not padded[j + 1 + dj, i + 1 + di]:
                if di:
                    x += [i + di / 2, i + di / 2, None]
                    y += [j - 0.5, j + 0.5, None]
                else:
                    x += [i - 0.5, i + 0.5, None]
                    y += [j + dj / 2, j + dj / 2, None]
    if x:
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines",
            name="statistically tied",
            line={"color": MARK, "width": 2.5},
            hoverinfo="skip",
        )


def _add_overlay(
    figure: go.Figure,
    ranks: Sequence[float],
    scales: Sequence[float],
    told: Mapping[tuple[float, float], str],
) -> None:
    """Transparent markers, one a cell, that can be hovered and clicked."""
    cells = [(i, j, r, s) for i, r in enumerate(ranks) for j, s in enumerate(scales)]
    figure.add_scatter(
        x=[i for i, _, _, _ in cells],
        y=[j for _, j, _, _ in cells],
        mode="markers",
        marker={"symbol": "square", "size": 18, "color": TRANSPARENT},
        customdata=[[float(r), float(s)] for _, _, r, s in cells],
        text=[
            f"rank {rank_words(r)}, λ = {s:g}: {told.get((r, s), 'not evaluated')}"
            for _, _, r, s in cells
        ],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
        # Selecting must not fade the others: they are invisible as it is.
        unselected={"marker": {"opacity": 1}},
    )


def _add_picks_to_map(
    figure: go.Figure, picks: pd.DataFrame, ranks: Sequence[float], scales: Sequence[float]
) -> None:
    for mode, mine in picks.groupby("mode", sort=False):
        name, colour, symbol = MODE_LOOKS[str(mode)]
        figure.add_scatter(
            x=_cell_positions(mine["rank"].to_numpy(), ranks, logarithmic=True),
            y=_cell_positions(mine["scale"].to_numpy(), scales),
            mode="markers",
            name=f"picks, {name}",
            marker={
                "symbol": symbol,
                "size": 11,
                "color": colour,
                "line": {"width": 1, "color": "#FFFFFF"},
            },
            text=[f"{row['title']}: {setting_words(row)}" for row in mine.to_dict("records")],
            hovertemplate="%{text}<extra>" + name + "</extra>",
        )


def _cell_positions(
    values: Sequence[float] | np.ndarray, axis: Sequence[float], logarithmic: bool = False
) -> np.ndarray:
    """Positions of values among the equally spaced cells of an axis, clipped to its ends."""
    change = np.log if logarithmic else np.asarray
    return np.interp(change(values), change(np.asarray(axis)), np.arange(len(axis)))


def _space_cells_equally(
    figure: go.Figure, ranks: Sequence[float], scales: Sequence[float]
) -> None:
    """Ticks that name settings, few enough for a phone."""
    for update, values, text in (
        (figure.update_xaxes, ranks, [rank_words(r) for r in ranks]),
        (figure.update_yaxes, scales, [f"{s:g}" for s in scales]),
    ):
        step = math.ceil(len(values) / MOST_TICKS)
        update(
            tickmode="array",
            tickvals=np.arange(len(values))[::step],
            ticktext=text[::step],
            showgrid=False,
            range=[-0.5, len(values) - 0.5],
        )
