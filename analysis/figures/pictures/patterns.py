"""Figures of deeper networks: first filters, their components, kernel norms, positions, heads."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures.pictures.templates import tile_figure, title_with_scale
from analysis.figures.spectra import short_names
from analysis.figures.style import (
    DASHES,
    DIVERGING,
    OKABE_ITO,
    SEQUENTIAL,
    add_colour_bar,
    layout,
    percent,
    set_axes,
    thin_indices,
)
from analysis.patterns.filters import Components
from analysis.patterns.images import Normalisation, block_means, normalise, stitch, tile_png

# Most cells along a side of a heat map, and cells of a layer in the map of norms.
CELLS = 256
QUANTILES = 64


def kernel_grid(
    filters: np.ndarray,
    title: str = "",
    kind: Normalisation = "symmetric",
    shared: bool = False,
    columns: int = 8,
    most: int = 64,
) -> go.Figure:
    """First filters as pictures, in the order of their channels.

    Args:
        filters: K x kh x kw x C with C = 1 or 3, signed weights.
        title: the figure's title; how intensities are to be read is added.
        kind: the normalisation of intensities.
        shared: one scale for all filters.
        columns: filters side by side.
        most: no more than these, the first ones; said in the title.

    Example:
        >>> kernel_grid(np.random.default_rng(0).normal(size=(8, 7, 7, 3))).data[0].type
        'image'
    """
    shown = list(normalise(filters, kind, shared)[:most])
    if len(filters) > most:
        title = f"{title} [first {most} of {len(filters)}]".strip()
    tiles = tile_png(shown, min(columns, len(shown)))
    return tile_figure([tiles], title_with_scale(title, kind, shared), [], height=62)


def components_grid(
    components: Components,
    title: str = "",
    kind: Normalisation = "symmetric",
    columns: int = 7,
    most: int = 28,
) -> go.Figure:
    """Principal components of filters, each with the share that it explains.

    Args:
        components: of :func:`analysis.patterns.filters.filter_components`.
        title: the figure's title; how intensities are to be read is added.
        kind: the normalisation of intensities.
        columns: components side by side.
        most: no more than these.
    """
    shown: list[np.ndarray | None] = list(normalise(components.filters[:most], kind))
    labels = [percent(float(share)) for share in components.explained[:most]]
    wide = min(columns, len(shown))
    lines = [shown[start : start + wide] for start in range(0, len(shown), wide)]
    blocks = [tile_png(line + [None] * (wide - len(line)), wide) for line in lines]
    return tile_figure(blocks, title_with_scale(title, kind, False), labels, height=80)


def kernel_norm_map(frame: pd.DataFrame, title: str = "") -> go.Figure:
    """The norms of every layer's filters, strongest filter first.

    Args:
        frame: of :func:`analysis.patterns.filters.kernel_norms`.
        title: the figure's title.
    """
    names = short_names(dict.fromkeys(frame["layer"]))
    places = np.linspace(0, 1, QUANTILES)
    z = np.stack(
        [
            np.quantile(part["rms"].to_numpy(), 1 - places)
            for _, part in frame.groupby("layer", sort=False)
        ]
    )
    labels = np.asarray(list(names.values()), dtype=object)
    chosen = thin_indices(len(z), CELLS)
    figure = go.Figure(
        go.Heatmap(
            z=z[chosen],
            x=100 * places,
            y=labels[chosen],
            colorscale=SEQUENTIAL,
            zmin=0,
            zmax=float(z.max()) or 1.0,
            hovertemplate="%{y}<br>exceeded by %{x:.0f} % of the filters: %{z:.4g}<extra></extra>",
        )
    )
    height = min(900, 200 + 18 * len(chosen))
    layout(figure, title, x="Filters, strongest first (%)", y="", height=height, legend=False)
    add_colour_bar(figure, "Root mean square weight")
    set_axes(figure, x={"showgrid": False})
    # The end of a long name says most, and the whole of it would fill a phone.
    short = [name if len(name) <= 18 else f"…{name[-17:]}" for name in labels]
    set_axes(
        figure,
        y={
            "type": "category",
            "autorange": "reversed",
            "showgrid": False,
            "tickvals": labels[chosen],
            "ticktext": [short[index] for index in chosen],
            "tickfont": {"size": 10},
        },
    )
    return figure


def position_grid(similarity: np.ndarray, title: str = "") -> go.Figure:
    """For every position a map of its embedding's cosine with all others, placed where it is.

    Positions are left out, evenly, where there are too many for one heat map.

    Args:
        similarity: rows x columns x rows x columns, of
            :func:`analysis.patterns.filters.position_similarity`.
        title: the figure's title.
    """
    rows, columns = similarity.shape[:2]
    down = thin_indices(rows, max(1, (CELLS + 1) // (rows + 1)))
    across = thin_indices(columns, max(1, (CELLS + 1) // (columns + 1)))
    chosen = similarity[np.ix_(down, across)].reshape(-1, rows, columns)
    figure = _map(stitch(chosen, len(across)), 1.0, "Cosine (−1 to 1)", title)
    for axis, places, size in (("x", across, columns), ("y", down, rows)):
        shown = thin_indices(len(places), 7)
        figure.update_layout(
            {
                f"{axis}axis": {
                    "tickvals": shown * (size + 1) + (size - 1) / 2,
                    "ticktext": [str(index + 1) for index in places[shown]],
                    "title": {"text": "Column of patches" if axis == "x" else "Row of patches"},
                }
            }
        )
    return figure


def head_maps(forms: np.ndarray, title: str = "") -> go.Figure:
    """The bilinear form of each attention head, all on one scale.

    Large forms are reduced by the mean of blocks, which the title then says.

    Args:
        forms: heads x width x width, of :func:`analysis.patterns.filters.query_key`.
        title: the figure's title.
    """
    heads, width, _ = forms.shape
    columns = math.ceil(math.sqrt(heads))
    # A fifth of a tile between tiles holds the head's name.
    cells = min(128, width, int(CELLS / (1.2 * columns)))
    gap = max(1, cells // 5)
    if cells < width:
        title = f"{title} [means of blocks, {width} to {cells}]".strip()
    maps = np.stack([block_means(form, cells) for form in forms])
    limit = float(np.quantile(np.abs(maps), 0.995)) or 1.0
    label = f"B<sub>h</sub>, colours end at ±{limit:.2g} (99.5 % of |B|)"
    figure = _map(stitch(maps, columns, gap), limit, label, title)
    for head in range(heads):
        row, column = divmod(head, columns)
        figure.add_annotation(
            x=column * (cells + gap) + (cells - 1) / 2,
            y=row * (cells + gap) - 0.5,
            text=f"head {head}",
            yanchor="bottom",
            showarrow=False,
            font={"size": 10},
        )
    set_axes(
        figure,
        x={"showticklabels": False, "ticks": ""},
        y={
            "showticklabels": False,
            "ticks": "",
            "autorange": None,
            "range": [math.ceil(heads / columns) * (cells + gap) - gap - 0.5, -gap - 0.5],
        },
    )
    return figure


def _map(z: np.ndarray, limit: float, label: str, title: str) -> go.Figure:
    figure = go.Figure(
        go.Heatmap(
            z=z.astype(np.float32),
            colorscale=DIVERGING,
            zmin=-limit,
            zmax=limit,
            hoverongaps=False,
            hovertemplate="%{z:.4g}<extra></extra>",
        )
    )
    layout(figure, title, x="", y="", height=450, legend=False)
    add_colour_bar(figure, label)
    set_axes(
        figure,
        x={"showgrid": False, "constrain": "domain"},
        y={
            "showgrid": False,
            "autorange": "reversed",
            "scaleanchor": "x",
            "constrain": "domain",
            "constraintoward": "top",
        },
    )
    return figure


def head_spectrum(frame: pd.DataFrame, title: str = "") -> go.Figure:
    """Singular values of each head's form; the legend says how symmetric it is.

    Args:
        frame: of :func:`analysis.patterns.filters.head_spectrum`.
        title: the figure's title.
    """
    figure = go.Figure()
    for head, part in frame.groupby("head"):
        number = int(str(head))
        share = percent(round(float(part["symmetric_share"].iloc[0]), 2))
        sigma = part["sigma"].to_numpy()
        figure.add_scatter(
            x=part["index"].to_numpy(),
            y=np.where(sigma > 0, sigma, np.nan),
            mode="lines",
            name=f"{number}: {share} symmetric",
            line={
                "color": OKABE_ITO[number % 7],
                "dash": DASHES[number // 7 % len(DASHES)],
                "width": 2,
            },
            hovertemplate=f"head {number}<br>σ<sub>%{{x}}</sub> = %{{y:.4g}}<extra></extra>",
        )
    layout(figure, title, x="Direction", y="Singular value of B<sub>h</sub> (log scale)")
    set_axes(figure, y={"type": "log", "exponentformat": "power", "minorloglabels": "none"})
    return figure
