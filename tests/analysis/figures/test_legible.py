"""Figures that can be read from the last row, in inks that stand out on their pages."""

from __future__ import annotations

import plotly.graph_objects as go
import pytest

from analysis.figures.legible import INK, colour_texts, enlarge

PAGES = {"light": "#FCFCFD", "dark": "#10141C"}  # as .streamlit/config.toml has them


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", PAGES)
def test_axis_texts_stand_out(theme: str) -> None:
    high, low = sorted((luminance(INK[theme]), luminance(PAGES[theme])), reverse=True)
    assert (high + 0.05) / (low + 0.05) >= 4.5


def figure() -> go.Figure:
    drawn = go.Figure(
        [
            go.Scatter(x=[0, 1], y=[1, 2], line={"width": 1, "dash": "dot"}, marker_size=[4, 9]),
            go.Scatter(x=[0, 1], y=[2, 1], mode="lines"),
            go.Heatmap(z=[[1, 2]], textfont_size=8, xaxis="x2", yaxis="y2"),
        ]
    )
    drawn.add_annotation(x=0, y=0, text="here", font_size=11)
    drawn.add_vline(x=0.5, line={"width": 1.5})
    return drawn.update_layout(
        title={"text": "Title", "font": {"size": 15}},
        xaxis={"title": {"text": "x"}},
        xaxis2={"tickfont": {"size": 9}},
        height=400,
        margin={"l": 8, "t": 20},
    )


def test_type_lines_and_markers_grow() -> None:
    before = figure().to_dict()
    large = go.Figure(enlarge(before, 2.0))
    assert before == figure().to_dict()  # left as it was
    layout = large.layout
    assert (layout.title.font.size, layout.annotations[0].font.size) == (30, 22)
    assert (layout.xaxis.tickfont.size, layout.xaxis2.tickfont.size) == (24, 18)
    assert (layout.xaxis.title.font.size, layout.legend.font.size) == (26, 24)
    assert (layout.shapes[0].line.width, layout.margin.l) == (3.0, 16)
    assert [large.data[i].line.width for i in (0, 1)] == [2, 4]
    assert large.data[2].textfont.size == 16
    assert list(large.data[0].marker.size) == pytest.approx([4 * 2**0.5, 9 * 2**0.5])
    assert layout.height > 400
    assert (list(large.data[0].x), layout.xaxis.title.text) == ([0, 1], "x")


def test_texts_of_axes_and_legend_take_the_ink() -> None:
    drawn = go.Figure(colour_texts(figure().to_dict(), INK["dark"]))
    for axis in (drawn.layout.xaxis, drawn.layout.xaxis2):
        assert axis.tickfont.color == axis.title.font.color == INK["dark"]
    assert drawn.layout.legend.font.color == INK["dark"]
    assert drawn.layout.title.font.size == 15
    assert drawn.layout.title.font.color is None
