"""Figures as they can be read: ink that stands out, and, for the last row of a room, larger type.

A figure has no colours of its own for its texts, since it is drawn on light and on dark pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TYPE = 12  # what Plotly takes where a figure says nothing
LINE = 2
MARKER = 6
HIGHER = 1.3
_FONTS = ("font", "tickfont", "textfont")
_DRAWN = ("scatter", "scattergl")
_NO_LOOKS = ("x", "y", "z", "customdata", "text", "template")  # numbers and names, often many
# 7.6 to 1 on the light page and 9.9 to 1 on the dark one, where 4.5 to 1 is asked of small type.
INK = {"light": "#4A5264", "dark": "#B8C0CF"}


def enlarge(spec: Mapping[str, Any], factor: float = 1.6) -> dict[str, Any]:
    """A figure with larger type, lines and markers, and more room for them.

    Args:
        spec: a figure's data and layout, as ``go.Figure.to_dict`` gives them; left as it is.
        factor: of type and of the width of lines. Markers grow by its root, as they are areas.

    Example:
        >>> spec = {"data": [{"type": "scatter"}], "layout": {"height": 400}}
        >>> large = enlarge(spec, 1.5)
        >>> large["layout"]["font"], large["data"][0]["line"], large["layout"]["height"]
        ({'size': 18.0}, {'width': 3.0}, 520.0)
    """
    layout = _say(spec.get("layout", {}), {"size": TYPE}, {"size": TYPE + 1})
    data = [_with_sizes(trace) for trace in spec.get("data", [])]
    larger: dict[str, Any] = _grow({**spec, "data": data, "layout": layout}, factor)
    if height := layout.get("height"):
        larger["layout"]["height"] = HIGHER * height
    if margin := layout.get("margin"):
        larger["layout"]["margin"] = {
            side: factor * room if side in "lrtb" else room for side, room in margin.items()
        }
    return larger


def colour_texts(spec: Mapping[str, Any], ink: str) -> dict[str, Any]:
    """A figure whose axes and legend are written in a colour.

    Args:
        spec: a figure's data and layout; left as it is.
        ink: a colour of :data:`INK`.

    Example:
        >>> colour_texts({"data": [], "layout": {}}, "#4A5264")["layout"]["xaxis"]["tickfont"]
        {'color': '#4A5264'}
    """
    colour = {"color": ink}
    return {**spec, "layout": _say(spec.get("layout", {}), colour, colour)}


def _say(
    layout: Mapping[str, Any], small: Mapping[str, Any], titles: Mapping[str, Any]
) -> dict[str, Any]:
    """A layout that says what the page's theme would decide: fonts of axes, legend and hover."""
    said = dict(layout)
    axes = [name for name in said if name.startswith(("xaxis", "yaxis"))]
    for name in axes or ("xaxis", "yaxis"):
        said[name] = _join({"tickfont": small, "title": {"font": titles}}, said.get(name, {}))
    said["legend"] = _join({"font": small}, said.get("legend", {}))
    said["font"] = _join(small, said.get("font", {}))
    return said


def _with_sizes(trace: Mapping[str, Any]) -> dict[str, Any]:
    if trace.get("type", "scatter") not in _DRAWN:
        return dict(trace)
    return _join({"line": {"width": LINE}, "marker": {"size": MARKER}}, trace)


def _join(usual: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """What is said, and what is usual where nothing is said."""
    joined = {**usual, **said}
    for name, value in usual.items():
        if isinstance(value, Mapping) and isinstance(joined[name], Mapping):
            joined[name] = _join(value, joined[name])
    return joined


def _grow(part: Any, factor: float, name: str = "") -> Any:
    """A part in which every size of type, width of a line and size of a marker is larger."""
    if isinstance(part, list | tuple):
        return [_grow(item, factor, name) for item in part]
    if not isinstance(part, Mapping):
        return part
    factors = {"width": {"line": factor}, "size": dict.fromkeys(_FONTS, factor)}
    factors["size"]["marker"] = factor**0.5
    grown = {}
    for key, value in part.items():
        times = factors.get(key, {}).get(name)
        # Numbers and names, which may be many, are no part of the looks.
        looks = key not in ("x", "y", "z", "customdata", "text", "template")
        grown[key] = (
            _times(value, times) if times else _grow(value, factor, key) if looks else value
        )
    return grown


def _times(value: Any, factor: float) -> Any:
    """A number, or each of several; what is written in another form stays."""
    if isinstance(value, int | float):
        return factor * value
    return [factor * each for each in value] if isinstance(value, list | tuple) else value
