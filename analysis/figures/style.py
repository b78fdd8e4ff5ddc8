"""One look for all figures: colours, dashes, names of origins, layout.

Backgrounds are transparent and texts have no colour, so that the page's theme, light or dark,
supplies both; reference lines are a grey that shows on either.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale, unlabel_rgb

# Okabe and Ito's palette, safe for colour-blind readers; its black vanishes on a dark page and
# is grey here, and its yellow, faint on a light one, comes last.
OKABE_ITO = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#999999",
    "#F0E442",
)
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SEQUENTIAL = "Cividis"
DIVERGING = "RdBu_r"
REFERENCE = "#888888"
TRANSPARENT = "rgba(0,0,0,0)"

AXIS = re.compile(r"[xy]axis\d*")

# Above this many cells the numbers in a map no longer fit.
CELLS_WITH_TEXT = 120
# Relative luminance (WCAG) up to which white reads better on a colour than black.
DARK = 0.18
BAR_HEIGHT = 48

ORIGIN_NAMES = {
    "average": "about the average (centred)",
    "base": "about the base (original)",
}
ORIGIN_COLOURS = {"average": OKABE_ITO[0], "base": OKABE_ITO[3]}
ORIGIN_DASHES = {"average": "solid", "base": "dash"}
ORIGIN_MARKERS = {"average": "circle", "base": "diamond"}


def task_colours(tasks: Iterable[str]) -> dict[str, str]:
    """A colour for each task, by its place; beyond eight tasks colours repeat."""
    return {task: OKABE_ITO[i % len(OKABE_ITO)] for i, task in enumerate(dict.fromkeys(tasks))}


def task_markers(tasks: Iterable[str]) -> dict[str, str]:
    """A marker for each task, another one for each round of :func:`task_colours`."""
    names = dict.fromkeys(tasks)
    return {t: MARKERS[i // len(OKABE_ITO) % len(MARKERS)] for i, t in enumerate(names)}


def percent(share: float) -> str:
    """A share as people read it: 0.08 is ``8 %``, 0.125 is ``12.5 %``.

    Example:
        >>> percent(0.08), percent(0.125)
        ('8 %', '12.5 %')
    """
    return f"{100 * share:.3g} %"


def thin_indices(count: int, most: int) -> np.ndarray:
    """At most `most` of the indices 0..count−1, evenly spread, both ends among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def share_axis(shares: Sequence[float] | np.ndarray) -> dict[str, object]:
    """Settings of a logarithmic axis of shares with ticks at shares that were computed."""
    values = np.unique(np.asarray(shares, dtype=float))
    # The computed shares nearest to even steps on the log axis, few enough for a phone.
    wanted = np.linspace(np.log(values[0]), np.log(values[-1]), min(len(values), 6))
    places = np.unique([np.argmin(np.abs(np.log(values) - w)) for w in wanted])
    ticks = values[places]
    return {
        "type": "log",
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": [percent(t) for t in ticks],
    }


def layout(
    figure: go.Figure, title: str, *, x: str, y: str, height: int = 420, legend: bool = True
) -> go.Figure:
    """Give a figure its title, axis labels, margins and a legend below the plot.

    Args:
        figure: changed in place.
        title: the question that the figure answers; broken into lines that fit a phone.
        x: label of the x axis, with unit.
        y: label of the y axis, with unit.
        height: pixels.
        legend: whether to show one.

    Returns:
        The same figure.
    """
    lines = textwrap.wrap(title, 44)
    settings = {
        "title": {
            "text": "<br>".join(lines),
            "font": {"size": 15},
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "yref": "container",
            "y": 1,
            "yanchor": "top",
            # Plotly hangs a title by its last line but one: room for those above it.
            "pad": {"t": 8 + 12 * (len(lines) - 1), "l": 8},
        },
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 16 + 22 * len(lines), "b": 8},
        "paper_bgcolor": TRANSPARENT,
        "plot_bgcolor": TRANSPARENT,
        "hovermode": "closest",
        "showlegend": legend,
        "legend": {
            "orientation": "h",
            "xref": "container",  # a phone has no width to leave below the axis labels
            "x": 0,
            "xanchor": "left",
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "bgcolor": TRANSPARENT,
        },
    }
    axis = {"automargin": True, "zeroline": False}
    set_layout(figure, settings, {"title": {"text": x}, **axis}, {"title": {"text": y}, **axis})
    return figure


def set_layout(
    figure: go.Figure,
    settings: Mapping[str, Any],
    x: Mapping[str, Any],
    y: Mapping[str, Any],
) -> None:
    """Change a figure's layout and all of its axes, in one go.

    Plotly's own updates look every setting up by itself, which takes ten times as long. Its
    default template is set anew, as in every new figure.

    Args:
        figure: changed in place.
        settings: of the layout, nested as Plotly writes them.
        x, y: of every x axis, and of every y axis.
    """
    known = figure.layout.to_plotly_json()
    known.pop("template", None)
    _merge(known, settings)
    for first, axis in (("xaxis", x), ("yaxis", y)):
        for name in {first, *(each for each in known if AXIS.fullmatch(each))}:
            if name.startswith(first):
                _merge(known.setdefault(name, {}), axis)
    figure.layout = known


def set_axes(
    figure: go.Figure, x: Mapping[str, Any] | None = None, y: Mapping[str, Any] | None = None
) -> None:
    """Change all of a figure's axes, as :func:`set_layout` does.

    Args:
        figure: changed in place.
        x, y: of every x axis, and of every y axis.
    """
    set_layout(figure, {}, x or {}, y or {})


def _merge(known: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Take nested changes over."""
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(known.get(name), dict):
            _merge(known[name], value)
        else:
            known[name] = dict(value) if isinstance(value, Mapping) else value


def add_colour_bar(figure: go.Figure, label: str) -> None:
    """A colour bar between title and plot, so that a phone's width is left to the map.

    Args:
        figure: with heat maps, after :func:`layout`; changed in place.
        label: what the colours are, with unit.
    """
    bar = {
        "title": {"text": label, "side": "top", "font": {"size": 12}},
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "xpad": 0,
        "y": 0.999,  # from 1 on Plotly moves the figure's title out of sight
        "yanchor": "bottom",
        "thickness": 10,
        "nticks": 6,
        "exponentformat": "power",
    }
    if any(trace.coloraxis for trace in figure.select_traces({"type": "heatmap"})):
        figure.layout.coloraxis.colorbar = bar
    else:
        figure.update_traces(colorbar=bar, selector={"type": "heatmap"})
    figure.layout.margin.t += BAR_HEIGHT


def colour_cell_numbers(figure: go.Figure) -> None:
    """White numbers on a heat map's dark cells, black ones on its light cells.

    Plotly's own choice is a grey that is faint on middling colours. Numbers of one trace have
    one colour, so the light cells are drawn a second time.

    Args:
        figure: with one heat map with numbers or without; changed in place.
    """
    (heat,) = figure.select_traces({"type": "heatmap"})
    z = np.asarray(heat.z, dtype=float)
    known = np.isfinite(z)
    if not heat.texttemplate or not known.any():
        return
    low = float(z[known].min() if heat.zmin is None else heat.zmin)
    high = float(z[known].max() if heat.zmax is None else heat.zmax)
    places = np.clip((z[known] - low) / ((high - low) or 1.0), 0, 1)
    colours = sample_colorscale([list(stop) for stop in heat.colorscale], places.tolist())
    rgb = np.asarray([unlabel_rgb(colour) for colour in colours]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    light = np.full(z.shape, False)
    light[known] = linear @ [0.2126, 0.7152, 0.0722] > DARK
    heat.update(zmin=low, zmax=high, textfont_color="#FFFFFF")
    figure.add_trace(heat)
    figure.data[-1].update(
        z=np.where(light, z, np.nan),
        textfont_color="#000000",
        showscale=False,
        hoverinfo="skip",
        hovertemplate=None,
    )


def make_cells_square(figure: go.Figure) -> None:
    """A map of pairs: as many rows as columns, the first row on top, cells as wide as high."""
    axis = {"type": "category", "showgrid": False, "constrain": "domain"}
    # Under the colour bar, where a phone's width makes it small.
    below = {"autorange": "reversed", "scaleanchor": "x", "constraintoward": "top"}
    set_axes(figure, axis, axis | below)


def add_line(
    figure: go.Figure, look: Mapping[str, Any], x: float | None = None, y: float | None = None
) -> None:
    """A line across the plot, at a place of its x axis or of its y axis.

    As Plotly's ``add_vline`` and ``add_hline`` draw it, which take ten times as long.

    Args:
        figure: with one plot; changed in place.
        look: colour, dash and width.
        x, y: one of the two.
    """
    if y is None:
        place = {"x0": x, "x1": x, "xref": "x", "y0": 0, "y1": 1, "yref": "y domain"}
    else:
        place = {"x0": 0, "x1": 1, "xref": "x domain", "y0": y, "y1": y, "yref": "y"}
    figure.layout.shapes = (*figure.layout.shapes, {"type": "line", **place, "line": dict(look)})


def mark_share(figure: go.Figure, share: float, name: str = "chosen") -> None:
    """A dotted vertical line at a share of directions, on a linear or log x axis."""
    if figure.layout.margin.t is not None:
        figure.layout.margin.t += 12  # the label stands between the title and the plot
    add_line(figure, {"color": REFERENCE, "dash": "dot", "width": 1.5}, x=share)
    # Annotations of log axes are placed in powers of ten, shapes are not.
    logarithmic = figure.layout.xaxis.type == "log"
    figure.add_annotation(
        x=np.log10(share) if logarithmic else share,
        y=1,
        yref="paper",
        yanchor="bottom",
        text=f"{name}: {percent(share)}",
        showarrow=False,
        font={"size": 11},
    )
