"""Figures of linear classifiers: templates as pictures, cosines, blends, weight decay, training."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures.style import (
    DASHES,
    DIVERGING,
    MARKERS,
    OKABE_ITO,
    REFERENCE,
    add_colour_bar,
    add_line,
    colour_cell_numbers,
    layout,
    make_cells_square,
    set_axes,
)
from analysis.patterns.blending import blend
from analysis.patterns.images import NORMALISATIONS, Normalisation, Tiles, normalise, tile_png
from analysis.patterns.templates import COMPARISONS

# Column of a frame: its label with unit, and whether it depends on what is compared.
VALUES = {
    "diagonal": ("Mean cosine, same class", True),
    "off_diagonal": ("Mean cosine, other classes", True),
    "largest": ("Nearest to own class (%)", True),
    "norm": ("Mean norm (weight units)", False),
    "roughness": ("Roughness (Geary's C)", False),
    "val_accuracy": ("Validation accuracy (%)", False),
    "test_accuracy": ("Test accuracy (%)", False),
}
SHARES = ("largest", "val_accuracy", "test_accuracy")
AXES = {"weight_decay": "Weight decay", "epoch": "Epoch"}


def tile_figure(
    blocks: Sequence[Tiles],
    title: str,
    labels: Sequence[str],
    row_names: Sequence[str] = (),
    height: int = 64,
) -> go.Figure:
    """Pictures of tiles below each other, without hover (it would tell colours, not weights).

    Args:
        blocks: pictures of one width in tiles.
        title: the figure's title.
        labels: written above the tiles of each block's first row, block after block.
        row_names: names of the rows of every block.
        height: pixels of a row of tiles, where there is room.
    """
    figure = go.Figure()
    above = blocks[0].tile[0] * (0.3 if any(labels) else 0.0)
    ticks: list[float] = []
    offset = 0.0
    texts = iter(labels)
    for block in blocks:
        figure.add_trace(go.Image(source=block.source, y0=offset, hoverinfo="skip"))
        for column in range(block.columns):
            text = next(texts, "")
            if text:
                figure.add_annotation(
                    x=block.centre(column)[0],
                    y=offset,
                    text=text,
                    yanchor="bottom",
                    yshift=1,
                    showarrow=False,
                    font={"size": 10},
                )
        ticks += [offset + block.centre(row * block.columns)[1] for row in range(block.rows)]
        last = block.centre(block.rows * block.columns - 1)
        bottom = offset + last[1] + block.tile[0] / 2
        offset = bottom + above + block.gap
    rows = sum(block.rows for block in blocks) + (0.3 * len(blocks) if above else 0)
    right = blocks[0].centre(blocks[0].columns - 1)[0] + blocks[0].tile[1] / 2
    layout(figure, title, x="", y="", legend=False)
    figure.layout.height = round(figure.layout.margin.t + 20 + height * rows)
    hidden = {"showgrid": False, "zeroline": False, "ticks": "", "constrain": "domain"}
    figure.update_xaxes(range=[-0.5, right], showticklabels=False, **hidden)
    names = ["<br>".join(textwrap.wrap(name, 14)) for name in row_names] * len(blocks)
    figure.update_yaxes(
        range=[bottom, -above - 0.5],
        scaleanchor="x",
        constraintoward="top",
        tickvals=ticks if names else [],
        ticktext=names,
        tickfont={"size": 11},
        **hidden,
    )
    return figure


def shorten(name: str, most: int = 10) -> str:
    """A name that fits above a tile."""
    return name if len(name) <= most else name[: most - 1].rstrip() + "…"


def title_with_scale(title: str, kind: Normalisation, shared: bool) -> str:
    """A title followed by how intensities are to be read."""
    each = "one scale" if shared else "each on its own scale"
    return f"{title} ({NORMALISATIONS[kind]}, {each})"


def template_grid(
    rows: Mapping[str, np.ndarray],
    names: Sequence[str],
    title: str = "",
    kind: Normalisation = "symmetric",
    shared: bool = False,
    columns: int = 5,
) -> go.Figure:
    """Templates with what they are compared with: a row of images each, a column per class.

    Args:
        rows: what a row shows to signed images, classes x H x W x C, all of one shape.
        names: of the classes shown.
        title: the figure's title; how intensities are to be read is added.
        kind: the normalisation of intensities.
        shared: one scale for all images of a row.
        columns: classes side by side; further ones come below.
    """
    shown = [normalise(images, kind, shared) for images in rows.values()]
    wide = min(columns, len(names))
    blocks, labels = [], []
    for start in range(0, len(names), wide):
        indices: list[int | None] = list(range(start, min(start + wide, len(names))))
        indices += [None] * (wide - len(indices))
        images = [None if p is None else values[p] for values in shown for p in indices]
        blocks.append(tile_png(images, wide))
        labels += ["" if p is None else shorten(names[p]) for p in indices]
    return tile_figure(blocks, title_with_scale(title, kind, shared), labels, list(rows))


def blend_strip(
    A: np.ndarray,
    B: np.ndarray,
    lam: float,
    names: tuple[str, str],
    title: str = "",
    kind: Normalisation = "symmetric",
) -> go.Figure:
    """Two templates, their blend λ·A + (1−λ)·B and their difference A − B.

    Args:
        A: H x W x C.
        B: same shape.
        lam: λ.
        names: of A and B.
        title: the figure's title; how intensities are to be read is added.
        kind: "symmetric" draws all four on one scale, "joint" each on its own.
    """
    images = np.stack([A, B, blend(A, B, lam), A - B])
    shared = kind == "symmetric"
    labels = [shorten(name, 14) for name in names]
    labels += [f"λ = {lam:.2g}", "first − second"]
    tiles = tile_png(list(normalise(images, kind, shared)), 4)
    return tile_figure([tiles], title_with_scale(title, kind, shared), labels, height=110)


def cosine_map(
    frame: pd.DataFrame,
    title: str = "",
    rows: str = "Template of class",
    columns: str = "Mean of class",
) -> go.Figure:
    """Cosines of templates (down) with class means or the like (across), from −1 to 1.

    Args:
        frame: of :func:`analysis.patterns.templates.cosine_frame`.
        title: the figure's title.
        rows: label of the vertical axis.
        columns: label of the horizontal axis.

    Example:
        >>> from analysis.patterns.templates import cosine_frame
        >>> images = np.eye(2).reshape(2, 1, 2, 1)
        >>> cosine_map(cosine_frame(images, images, ["cat", "dog"])).data[0].z.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    names = list(dict.fromkeys(frame["first"]))
    z = frame["cosine"].to_numpy().reshape(len(names), len(names))
    figure = go.Figure(
        go.Heatmap(
            z=z,
            x=names,
            y=names,
            colorscale=DIVERGING,
            zmin=-1,
            zmax=1,
            texttemplate="%{z:.1f}" if len(names) <= 10 else None,
            hovertemplate=f"{rows} %{{y}}<br>{columns} %{{x}}<br>cosine %{{z:.4f}}<extra></extra>",
        )
    )
    layout(figure, title, x=columns, y=rows, height=480, legend=False)
    add_colour_bar(figure, "Cosine (−1 to 1)")
    colour_cell_numbers(figure)
    make_cells_square(figure)
    return figure


def dominance_lines(
    frame: pd.DataFrame,
    x: str,
    value: str,
    title: str = "",
    comparison: str = "centred_means",
) -> go.Figure:
    """A measurement of templates over weight decay or training: mean and range over members.

    Args:
        frame: of :func:`analysis.patterns.templates.decay_frame`, or of its ``training_frame``.
        x: "weight_decay", with a line for each comparison, or "epoch", with one for each decay.
        value: one of :data:`VALUES`.
        title: the figure's title.
        comparison: what templates are compared with along training.
    """
    label, compared = VALUES[value]
    part = frame.assign(decay=[_decay(d) for d in frame["weight_decay"]])
    if not compared:
        part = part.drop_duplicates(["member", "epoch"])
    elif x == "epoch":
        part = part[part["comparison"] == comparison]
        label = f"{label}<br>{COMPARISONS[comparison].split(',')[0]}"
    part = part.sort_values(["weight_decay", "epoch"], kind="stable")
    figure = go.Figure()
    key = "decay" if x == "epoch" else "comparison"
    alone = key == "comparison" and not compared
    groups = [(label, part)] if alone else part.groupby(key, sort=False)
    for index, (group, points) in enumerate(groups):
        name = f"decay {group!s}" if key == "decay" else COMPARISONS.get(str(group), label)
        name = name.replace("_c", "<sub>c</sub>")
        stats = points.groupby("decay" if x == "weight_decay" else "epoch", sort=False)[value].agg(
            ["mean", "min", "max", "size"]
        )
        if value in SHARES:
            stats[["mean", "min", "max"]] *= 100
        _add_band(figure, stats, name, index)
    layout(figure, title, x=f"{AXES[x]}, mean and range over members", y=label, legend=not alone)
    if x == "weight_decay":
        set_axes(figure, x={"type": "category"})
    return figure


def _decay(value: float | None) -> str:
    return "not given" if value is None or np.isnan(value) else f"{value:g}"


def _add_band(figure: go.Figure, stats: pd.DataFrame, name: str, index: int) -> None:
    x = stats.index.to_numpy()
    colour = OKABE_ITO[index % len(OKABE_ITO)]
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    if (stats["size"] > 1).any():
        for edge, fill in (("min", None), ("max", "tonexty")):
            figure.add_scatter(
                x=x,
                y=stats[edge].to_numpy(),
                mode="lines",
                line={"width": 0},
                fill=fill,
                fillcolor=f"rgba({red},{green},{blue},0.2)",
                legendgroup=name,
                showlegend=False,
                hoverinfo="skip",
            )
    figure.add_scatter(
        x=x,
        y=stats["mean"].to_numpy(),
        customdata=stats[["min", "max", "size"]].to_numpy(),
        mode="lines+markers",
        name=name,
        legendgroup=name,
        line={"color": colour, "dash": DASHES[index % len(DASHES)], "width": 2},
        marker={"symbol": MARKERS[index % len(MARKERS)], "size": 7},
        hovertemplate=f"{name}<br>%{{x}}: %{{y:.4g}} (from %{{customdata[0]:.4g}} to "
        "%{customdata[1]:.4g}, %{customdata[2]:.0f} members)<extra></extra>",
    )


def response_lines(
    frame: pd.DataFrame,
    value: str,
    names: tuple[str, str],
    title: str = "",
    chosen: float | None = None,
) -> go.Figure:
    """How images of two classes, and all others, respond along the blend of the two.

    Args:
        frame: of :func:`analysis.patterns.blending.blend_response`.
        value: "logit", or "share_as_a" for the share that is classified as the first class.
        names: of classes a and b.
        title: the figure's title.
        chosen: a λ that is marked.
    """
    a, b = names
    lines = {"a": f"images of {a}", "b": f"images of {b}", "others": "all other images"}
    series = {
        lines[str(key)]: (part["lam"], part[value] * (1 if value == "logit" else 100))
        for key, part in frame.groupby("images", sort=False)
    }
    label = "Mean logit of the blended row" if value == "logit" else f"Classified as {a} (%)"
    return _lines_along_lambda(series, f"λ (1: {a} alone, 0: {b} alone)", label, title, chosen)


def model_response_lines(
    frame: pd.DataFrame,
    value: str,
    class_name: str,
    names: tuple[str, str],
    title: str = "",
    chosen: float | None = None,
) -> go.Figure:
    """Accuracy or logits along the blend of two classifiers.

    Args:
        frame: of :func:`analysis.patterns.blending.model_response`.
        value: "accuracy", or "logit" for the logit of the class looked at.
        class_name: that class.
        names: of the first and the second model.
        title: the figure's title.
        chosen: a λ that is marked.
    """
    if value == "logit":
        columns = {"logit": f"images of {class_name}", "logit_others": "all other images"}
        label, scale = f"Mean logit of {class_name}", 1
    else:
        columns = {"accuracy": "all test images", "class_accuracy": f"images of {class_name}"}
        label, scale = "Test accuracy (%)", 100
    series = {name: (frame["lam"], frame[column] * scale) for column, name in columns.items()}
    return _lines_along_lambda(
        series, f"λ (1: {names[0]} alone, 0: {names[1]} alone)", label, title, chosen
    )


def _lines_along_lambda(
    series: Mapping[str, tuple[pd.Series, pd.Series]],
    x: str,
    y: str,
    title: str,
    chosen: float | None,
) -> go.Figure:
    figure = go.Figure()
    for i, (name, (lam, values)) in enumerate(series.items()):
        figure.add_scatter(
            x=lam.to_numpy(),
            y=values.to_numpy(),
            mode="lines+markers",
            name=name,
            line={"color": OKABE_ITO[i], "dash": DASHES[i], "width": 2},
            marker={"symbol": MARKERS[i], "size": 6},
            hovertemplate=f"{name}<br>λ = %{{x:.3g}}: %{{y:.4g}}<extra></extra>",
        )
    if chosen is not None:
        add_line(figure, {"color": REFERENCE, "dash": "dot", "width": 1.5}, x=chosen)
    return layout(figure, title, x=x, y=y)
