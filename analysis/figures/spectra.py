"""Figures of spectra: scree, cumulative energy, and the map of layers and tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures.style import (
    CELLS_WITH_TEXT,
    ORIGIN_DASHES,
    ORIGIN_NAMES,
    REFERENCE,
    SEQUENTIAL,
    TRANSPARENT,
    add_colour_bar,
    add_line,
    colour_cell_numbers,
    layout,
    mark_share,
    percent,
    set_axes,
    task_colours,
    task_markers,
    thin_indices,
)
from merge_core.checkpoints.parameter_roles import block_of, matrix_kind

# Column of a spectral summary: its title, unit, and number format in a cell.
SUMMARY_VALUES: dict[str, tuple[str, str, str]] = {
    "frobenius": ("Frobenius norm ‖A‖<sub>F</sub>", "weight units", ".3g"),
    "spectral_norm": ("Spectral norm σ<sub>1</sub>", "weight units", ".3g"),
    "stable_rank": ("Stable rank", "directions", ".1f"),
    "effective_rank": ("Effective rank", "directions", ".1f"),
    "participation_ratio": ("Participation ratio", "directions", ".1f"),
    "top_share": ("Energy in the top 8 %", "share of Σσ²", ".2f"),
    "energy_rank_90": ("Rank for 90 % energy", "directions", ".0f"),
    "noise_rank": ("Rank above the noise edge", "directions", ".0f"),
}

_BOUND_DASHES = {"average": "dot", "base": "dashdot"}
_SHORT_ORIGINS = {"average": "centred", "base": "original"}

# Words that name a container of layers, not a layer.
_CONTAINERS = frozenset(
    {"model", "module", "visual", "vision_model", "text_model", "transformer", "encoder"}
    | {"decoder", "blocks", "block", "layers", "layer", "resblocks", "stages", "h"}
)


def short_name(parameter: str) -> str:
    """A parameter's name for an axis: ``blocks.0.attn.qkv.weight`` is ``0 attention qkv``.

    Numbers of blocks come first. Matrices of attention and MLP are called alike whatever a
    library calls them; of other names the suffix ``weight`` and words for containers go.

    Example:
        >>> short_name("blocks.0.attn.qkv.weight")
        '0 attention qkv'
    """
    kind = matrix_kind(parameter)
    if kind is not None:
        return " ".join(part for part in (".".join(map(str, block_of(parameter))), kind) if part)
    words = parameter.removesuffix("weight").rstrip("._").split(".")
    numbers = [i for i, word in enumerate(words[:-1]) if word.isdigit()]
    split = numbers[-1] + 1 if numbers else 0
    place = [word for word in words[:split] if word not in _CONTAINERS]
    rest = words[split:]
    while not split and len(rest) > 1 and rest[0] in _CONTAINERS and not rest[1].isdigit():
        rest = rest[1:]
    short = " ".join(part for part in (".".join(place), ".".join(rest)) if part)
    return short or parameter


def _part_name(short: str, part: str) -> str:
    """The short name of a part of a fused matrix, as the separate matrix would be called."""
    fused = "attention qkv"
    return short.removesuffix("qkv") + part if short.endswith(fused) else f"{short} {part}"


def short_names(parameters: Iterable[str]) -> dict[str, str]:
    """Short names by parameter; where two would be alike, both stay whole."""
    names = {parameter: short_name(parameter) for parameter in parameters}
    count = Counter(names.values())
    return {p: short if count[short] == 1 else p for p, short in names.items()}


def scree(frame: pd.DataFrame, cuts: pd.DataFrame | None = None, title: str = "") -> go.Figure:
    """Singular values over their index, logarithmic, a colour a task and a dash an origin.

    Args:
        frame: of :func:`analysis.spectral.spectra.spectrum`, one origin or both below one another.
            Zero singular values have no place on a logarithmic axis and are left out.
        cuts: of :func:`analysis.spectral.spectra.cuts`, drawn as dotted lines: one task's bounds,
            or the mean over tasks.
        title: the figure's title.

    Example:
        >>> frame = pd.DataFrame({"index": [1, 2], "share": [0.5, 1.0], "sigma": [2.0, 1.0]})
        >>> scree(frame.assign(task="digits", origin="average")).data[0].y.tolist()
        [2.0, 1.0]
    """
    figure = go.Figure()
    origins = list(dict.fromkeys(frame["origin"]))
    for task, origin, part in _group_by_task(frame):
        seen = part[part["sigma"] > 0]
        figure.add_scatter(
            x=seen["index"].to_numpy(),
            y=seen["sigma"].to_numpy(),
            customdata=seen["share"].to_numpy(),
            name=task,
            legendgroup=task,
            showlegend=origin == origins[0],
            hovertemplate=f"{task}, {ORIGIN_NAMES[origin]}<br>direction %{{x}} "
            "(%{customdata:.1%} of all)<br>σ = %{y:.6g}<extra></extra>",
            **_line(frame, task, origin, len(seen)),
        )
    if len(origins) > 1:
        _explain_dashes(figure, origins)
    layout(
        figure,
        title,
        x="Direction i (count)",
        y="Singular value σ<sub>i</sub> (weight units)",
        height=480,
    )
    set_axes(figure, y={"type": "log", "exponentformat": "power", "dtick": 1})
    if cuts is not None:
        _draw_cuts(figure, cuts, last=int(frame["index"].max()))
    return figure


def _group_by_task(frame: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    for (task, origin), part in frame.groupby(["task", "origin"], sort=False):
        yield str(task), str(origin), part


def _line(frame: pd.DataFrame, task: str, origin: str, points: int) -> dict[str, object]:
    """Line and markers of one task and origin; markers only where colours repeat."""
    tasks = list(dict.fromkeys(frame["task"]))
    return {
        "mode": "lines" if len(tasks) <= 8 and points > 1 else "lines+markers",
        "line": {"color": task_colours(tasks)[task], "dash": ORIGIN_DASHES[origin], "width": 2},
        "marker": {
            "symbol": task_markers(tasks)[task],
            "size": 6,
            "maxdisplayed": 12,
        },
    }


def _explain_dashes(figure: go.Figure, origins: Sequence[str]) -> None:
    for origin in origins:
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="lines",
            name=ORIGIN_NAMES[origin],
            line={"color": REFERENCE, "dash": ORIGIN_DASHES[origin], "width": 2},
        )


def _draw_cuts(figure: go.Figure, cuts: pd.DataFrame, last: int) -> None:
    """Thin lines of both bounds: one label above both, origins told apart in the legend."""
    bounds = (
        ("noise_edge", "noise_rank", "noise edge"),
        ("gavish_donoho", "gavish_donoho_rank", "Gavish-Donoho"),
    )
    means = cuts.groupby("origin", sort=False)[[c for column in bounds for c in column[:2]]].mean()
    note = "" if len(set(cuts["task"])) == 1 else ", mean over tasks"
    # The spectra fall: at the right end there is room above the lines, none between or below.
    highest = ("gavish_donoho", means["gavish_donoho"].idxmax())
    for column, rank, name in bounds:
        for origin, mean in means[means[column] > 0].iterrows():
            here = (column, origin) == highest
            figure.add_scatter(
                x=np.array([1.0, last]),
                y=np.array([mean[column], mean[column]]),
                mode="lines+text",
                text=["", f"Gavish-Donoho,<br>noise edge{note}" if here else ""],
                textposition="top left",
                textfont={"size": 11},
                line={"color": REFERENCE, "dash": _BOUND_DASHES[str(origin)], "width": 1},
                name=f"noise bounds, {_SHORT_ORIGINS[str(origin)]}",
                legendgroup=f"bounds {origin}",
                showlegend=len(means) > 1 and column == "noise_edge",
                hovertemplate=f"{name}, {ORIGIN_NAMES[str(origin)]}{note}<br>σ = %{{y:.6g}}<br>"
                f"{mean[rank]:.3g} directions above it<extra></extra>",
            )


def cumulative_energy(
    frame: pd.DataFrame,
    title: str = "",
    marks: Sequence[float] = (0.9, 0.95, 0.99),
    chosen_share: float | None = None,
) -> go.Figure:
    """Energy kept over the share of directions kept, a colour a task and a dash an origin.

    Args:
        frame: of :func:`analysis.spectral.spectra.spectrum`, one origin or both below one another.
        title: the figure's title.
        marks: shares of the energy drawn as dotted lines.
        chosen_share: share of the directions that the page has chosen.
    """
    figure = go.Figure()
    origins = list(dict.fromkeys(frame["origin"]))
    for task, origin, part in _group_by_task(frame):
        figure.add_scatter(
            x=part["share"].to_numpy(),
            y=part["energy"].to_numpy(),
            customdata=part["index"].to_numpy(),
            name=task,
            legendgroup=task,
            showlegend=origin == origins[0],
            hovertemplate=f"{task}, {ORIGIN_NAMES[origin]}<br>top %{{customdata}} directions "
            "(%{x:.1%})<br>hold %{y:.3%} of the energy<extra></extra>",
            **_line(frame, task, origin, len(part)),
        )
    if len(origins) > 1:
        _explain_dashes(figure, origins)
    layout(figure, title, x="Share of directions kept, k / r (%)", y="Share of energy Σσ² kept (%)")
    set_axes(
        figure,
        x={"range": [0, 1.02], "tickformat": ".0%"},
        y={"range": [0, 1.02], "tickformat": ".0%"},
    )
    figure.layout.margin.r = 40
    for mark in marks:
        add_line(figure, {"color": REFERENCE, "dash": "dot", "width": 1}, y=mark)
        figure.add_annotation(
            x=1,
            xref="paper",
            xanchor="left",
            y=mark,
            # Marks near each other would cover one another's label.
            yanchor={max(marks): "bottom", min(marks): "top"}.get(mark, "middle"),
            text=percent(mark),
            showarrow=False,
            font={"size": 10},
        )
    if chosen_share is not None:
        mark_share(figure, chosen_share)
    return figure


def summary_map(frame: pd.DataFrame, value: str, title: str = "") -> go.Figure:
    """One scalar of the spectrum for every matrix (rows) and task (columns).

    Args:
        frame: of :func:`analysis.spectral.spectra.spectral_summary`, one origin.
        value: a key of :data:`SUMMARY_VALUES`.
        title: the figure's title.

    Returns:
        A heat map under invisible markers: Streamlit reports clicks on markers only. The
        `customdata` of each is [parameter, task].

    Raises:
        KeyError: the value is none that a summary holds.
    """
    label, unit, digits = SUMMARY_VALUES[value]
    table = frame.pivot_table(index=["parameter", "part"], columns="task", values=value, sort=False)
    z = table.to_numpy(dtype=float)
    parameters = [parameter for parameter, _ in table.index]
    names = short_names(parameters)
    rows = [
        names[parameter] if part == "whole" else _part_name(names[parameter], part)
        for parameter, part in table.index
    ]
    tasks = list(table.columns)
    figure = go.Figure(
        go.Heatmap(
            z=z,
            x=tasks,
            y=rows,
            colorscale=SEQUENTIAL,
            xgap=1,
            ygap=1,
            texttemplate=f"%{{z:{digits}}}" if z.size <= CELLS_WITH_TEXT else None,
            hoverinfo="skip",
        )
    )
    cells = [(i, j) for i in range(len(rows)) for j in range(len(tasks)) if np.isfinite(z[i, j])]
    figure.add_scatter(
        x=[tasks[j] for _, j in cells],
        y=[rows[i] for i, _ in cells],
        customdata=[[parameters[i], tasks[j]] for i, j in cells],
        text=[f"{z[i, j]:.6g}" for i, j in cells],
        mode="markers",
        marker={"symbol": "square", "size": 18, "color": TRANSPARENT, "line": {"width": 0}},
        hovertemplate="%{customdata[0]}<br>%{customdata[1]}<br>"
        f"{label}: %{{text}} {unit}<extra></extra>",
    )
    layout(figure, title, x="Task", y="Matrix", height=max(360, 190 + 22 * len(rows)), legend=False)
    add_colour_bar(figure, f"{label} ({unit})")
    colour_cell_numbers(figure)
    # Wherever in a cell the pointer is, the nearest marker is the cell's own.
    figure.update_layout(hoverdistance=-1, clickmode="event+select", dragmode=False)
    set_axes(
        figure,
        x={"type": "category", "showgrid": False},
        y={"type": "category", "autorange": "reversed", "showgrid": False},
    )
    if len(rows) > 40:
        shown = thin_indices(len(rows), 40)
        set_axes(figure, y={"tickmode": "array", "tickvals": [rows[i] for i in shown]})
    return figure
