"""Figures of what centring does: each layer is drawn once, at its values."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures.interference import centring_condition, centring_map

FRAME = pd.DataFrame(
    {
        "parameter": ["a.weight", "b.weight", "c.weight"],
        "original": [0.2, 0.4, 0.0],
        "centred": [0.3, 0.1, 0.0],
        "ratio": [1.5, 0.25, np.nan],
        "common": [0.05, 0.4, 0.0],
        "needed": 0.125,
    }
)


def points(figure: go.Figure, x: str, y: str) -> None:
    """The points of both expectations are the frame's, apart."""
    drawn = [trace for trace in figure.data if trace.mode == "markers"]
    assert [len(trace.x) for trace in drawn] == [1, 2]
    above, below = FRAME.iloc[[1]], FRAME.iloc[[0, 2]]
    for trace, part in zip(drawn, (above, below), strict=True):
        assert np.array_equal(np.asarray(trace.x, float), part[x])
        assert np.array_equal(np.asarray(trace.y, float), part[y], equal_nan=True)


def test_layers_stand_above_or_below_the_line_of_no_change() -> None:
    figure = centring_map(FRAME)
    points(figure, "original", "centred")
    line = next(trace for trace in figure.data if trace.mode == "lines")
    assert tuple(line.x) == tuple(line.y)
    assert figure.layout.xaxis.range == figure.layout.yaxis.range
    assert figure.layout.xaxis.range[1] > 0.4


def test_the_bound_is_marked() -> None:
    figure = centring_condition(FRAME)
    points(figure, "common", "ratio")
    assert figure.layout.shapes[0].x0 == 0.125
    assert "12.5%" in figure.layout.annotations[0].text


def test_a_suite_of_one_kind_is_drawn() -> None:
    alone = FRAME.iloc[[2]]
    for draw in (centring_map, centring_condition):
        (trace,) = [trace for trace in draw(alone).data if trace.mode == "markers"]
        assert len(trace.x) == 1
