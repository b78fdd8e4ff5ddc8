"""Figures of accuracy: the numbers drawn are the numbers of the frame."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from analysis.accuracy import accuracy_frame, mean_accuracy
from analysis.figures.accuracy import MODEL_LOOKS, dots_per_task


def decode(figure: go.Figure) -> go.Figure:
    """The figure as a browser gets it: through JSON, where arrays are bytes in base 64."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict) and "bdata" in value:
            flat = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
            shape = [int(n) for n in str(value.get("shape", flat.size)).split(",")]
            return flat.reshape(shape)
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list) else value

    return go.Figure(plain(json.loads(figure.to_json())))


def models(names: list[str], tasks: tuple[str, ...] = ("digits", "lines")) -> pd.DataFrame:
    source = np.random.default_rng(4)
    parts = [
        accuracy_frame({t: source.random(50) < 0.2 + 0.1 * i for t in tasks}).assign(model=name)
        for i, name in enumerate(names)
    ]
    return pd.concat(parts, ignore_index=True)


def trace_named(figure: go.Figure, name: str) -> go.Scatter:
    (trace,) = [t for t in figure.data if t.name == name]
    return trace


class TestPerTask:
    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_points_and_intervals(self, count: int) -> None:
        names = ["Base", "Experts", "Weight average", "CART", "Something else"][:count]
        frame = models(names)
        figure = decode(dots_per_task(frame, "Which?"))
        assert [trace.name for trace in figure.data] == names
        means = mean_accuracy(frame, by=["model"]).set_index("model")["accuracy"]
        for trace in figure.data:
            mine = frame[frame["model"] == trace.name]
            np.testing.assert_allclose(trace.x[:-1], 100 * mine["accuracy"])
            assert trace.x[-1] == pytest.approx(100 * means[trace.name])
            np.testing.assert_allclose(
                trace.x + trace.error_x.array, [*100 * mine["high"], trace.x[-1]]
            )
            np.testing.assert_allclose(
                trace.x - trace.error_x.arrayminus, [*100 * mine["low"], trace.x[-1]]
            )
            assert list(trace.text) == ["digits", "lines", "mean over tasks"]

    def test_each_point_stands_at_its_tasks_tick(self) -> None:
        figure = decode(dots_per_task(models(["Base", "CART"]), "Which?"))
        ticks = dict(zip(figure.layout.yaxis.ticktext, figure.layout.yaxis.tickvals, strict=True))
        for trace in figure.data:
            for y, text in zip(trace.y, trace.text, strict=True):
                label = "<b>mean</b>" if text == "mean over tasks" else text
                assert abs(y - ticks[label]) < 0.5
                assert all(abs(y - ticks[t]) > 0.5 for t in ticks if t != label)
        assert ticks["digits"] > ticks["lines"] > ticks["<b>mean</b>"]  # first task on top
        assert figure.data[0].y[0] > figure.data[1].y[0]  # first model on top

    def test_looks_are_fixed_and_tell_models_apart(self) -> None:
        figure = dots_per_task(models(["CART", "mine", "Base", "yours"]), "Which?")
        looks = [(t.marker.color, t.marker.symbol) for t in figure.data]
        assert looks[0] == MODEL_LOOKS["CART"]
        assert looks[2] == MODEL_LOOKS["Base"]
        assert looks[1] != looks[3]

    def test_every_interval_is_inside_the_axis(self) -> None:
        frame = models(["Base", "CART"])
        low, high = dots_per_task(frame, "Which?").layout.xaxis.range
        assert low <= 100 * frame["low"].min()
        assert low >= 0
        assert high >= 100
