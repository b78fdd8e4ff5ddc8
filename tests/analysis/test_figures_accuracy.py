"""Figures of accuracy: the numbers drawn are the numbers of the frame."""

from __future__ import annotations

import base64
import json
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from analysis.evaluation import accuracy_frame, mean_accuracy
from analysis.figures.accuracy import (
    MAP_SPAN,
    MODEL_LOOKS,
    accuracy_over_rank,
    per_task,
    rank_scale_map,
    tasks_over_rank,
)

RANKS, SCALES = (0.04, 0.08, 1.0), (0.5, 2.0)


def decoded(figure: go.Figure) -> go.Figure:
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


def swept(ranks: tuple[float, ...] = RANKS, scales: tuple[float, ...] = SCALES) -> pd.DataFrame:
    cells = list(product(ranks, scales))
    frame = pd.DataFrame(cells, columns=["rank", "scale"])
    frame["accuracy"] = [0.9 - 0.07 * i for i in range(len(cells))]
    # Shuffled, so that a figure that trusts the order of rows is wrong.
    frame = frame.assign(low=frame["accuracy"] - 0.03, high=frame["accuracy"] + 0.02)
    return frame.assign(method="cart").sample(frac=1, random_state=1)


def named(figure: go.Figure, name: str) -> go.Scatter:
    (trace,) = [t for t in figure.data if t.name == name]
    return trace


class TestPerTask:
    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_points_and_intervals(self, count: int) -> None:
        names = ["Base", "Experts", "Weight average", "CART", "Something else"][:count]
        frame = models(names)
        figure = decoded(per_task(frame, "Which?"))
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
        figure = decoded(per_task(models(["Base", "CART"]), "Which?"))
        ticks = dict(zip(figure.layout.yaxis.ticktext, figure.layout.yaxis.tickvals, strict=True))
        for trace in figure.data:
            for y, text in zip(trace.y, trace.text, strict=True):
                label = "<b>mean</b>" if text == "mean over tasks" else text
                assert abs(y - ticks[label]) < 0.5
                assert all(abs(y - ticks[t]) > 0.5 for t in ticks if t != label)
        assert ticks["digits"] > ticks["lines"] > ticks["<b>mean</b>"]  # first task on top
        assert figure.data[0].y[0] > figure.data[1].y[0]  # first model on top

    def test_looks_are_fixed_and_tell_models_apart(self) -> None:
        figure = per_task(models(["CART", "mine", "Base", "yours"]), "Which?")
        looks = [(t.marker.color, t.marker.symbol) for t in figure.data]
        assert looks[0] == MODEL_LOOKS["CART"]
        assert looks[2] == MODEL_LOOKS["Base"]
        assert looks[1] != looks[3]

    def test_every_interval_is_inside_the_axis(self) -> None:
        frame = models(["Base", "CART"])
        low, high = per_task(frame, "Which?").layout.xaxis.range
        assert low <= 100 * frame["low"].min()
        assert low >= 0
        assert high >= 100


class TestOverRank:
    @pytest.mark.parametrize("ranks", [RANKS, (0.08,)])
    def test_lines_bands_and_references(self, ranks: tuple[float, ...]) -> None:
        frame = swept(ranks, (2.0,))
        other = frame.assign(method="low_rank_task_arithmetic", scale=0.3, accuracy=0.3)
        both = pd.concat([frame, other])
        figure = decoded(accuracy_over_rank(both, "Best?", {"experts": 0.95}, 0.08))
        ordered = frame.sort_values("rank")
        line = named(figure, "centred (CART), λ = 2")
        np.testing.assert_allclose(line.x, ordered["rank"])
        np.testing.assert_allclose(line.y, 100 * ordered["accuracy"])
        assert list(line.text) == [f"{100 * rank:.3g} %" for rank in sorted(ranks)]
        original = named(figure, "original (about the base), λ = 0.3")
        np.testing.assert_allclose(original.y, 30)
        band = figure.data[0]
        n = len(ranks)
        np.testing.assert_allclose(band.y[:n], 100 * ordered["high"])
        np.testing.assert_allclose(band.y[n:][::-1], 100 * ordered["low"])
        np.testing.assert_allclose(band.x, [*ordered["rank"], *ordered["rank"][::-1]])
        lines = [(shape.x0, shape.y0) for shape in figure.layout.shapes]
        assert any(y == 95 for _, y in lines)
        assert any(x == 0.08 for x, _ in lines)
        texts = [a.text for a in figure.layout.annotations]
        assert "experts 95.0%" in texts
        assert "chosen: 8 %" in texts

    @pytest.mark.parametrize("value", ["accuracy", "normalised"])
    def test_tasks(self, value: str) -> None:
        parts = [
            swept(scales=(1.0,)).assign(task=t, normalised=0.5 + i / 10) for i, t in enumerate("ab")
        ]
        figure = decoded(tasks_over_rank(pd.concat(parts), value, "Tasks?", 0.08))
        assert [trace.name for trace in figure.data] == ["a", "b"]
        for trace, part in zip(figure.data, parts, strict=True):
            ordered = part.sort_values("rank")
            np.testing.assert_allclose(trace.x, ordered["rank"])
            np.testing.assert_allclose(trace.y, 100 * ordered[value])
        assert ("expert" in figure.layout.yaxis.title.text) == (value == "normalised")


class TestMap:
    @pytest.mark.parametrize(
        ("ranks", "scales"), [(RANKS, SCALES), ((0.08,), SCALES), (RANKS, (1.0,)), ((0.1,), (1.0,))]
    )
    def test_cells_and_overlay(self, ranks: tuple[float, ...], scales: tuple[float, ...]) -> None:
        frame = swept(ranks, scales)
        accuracy = frame.set_index(["rank", "scale"])["accuracy"]
        chosen, best = (ranks[0], scales[-1]), (ranks[-1], scales[0])
        figure = decoded(rank_scale_map(frame, "Where?", chosen, best))
        heat, overlay = figure.data[:2]
        assert np.shape(heat.z) == (len(scales), len(ranks))
        ticks_x = [f"{100 * r:.3g} %" for r in ranks]
        assert list(figure.layout.xaxis.ticktext) == ticks_x
        assert list(figure.layout.yaxis.ticktext) == [f"{s:g}" for s in scales]
        for (j, scale), (i, rank) in product(enumerate(scales), enumerate(ranks)):
            assert heat.z[j][i] == pytest.approx(100 * accuracy[rank, scale])
        cells = [tuple(cell) for cell in overlay.customdata]
        assert sorted(cells) == sorted(product(ranks, scales))
        for (rank, scale), x, y, text in zip(
            cells, overlay.x, overlay.y, overlay.text, strict=True
        ):
            assert (ranks[int(x)], scales[int(y)]) == (rank, scale)
            share = f"{100 * rank:.3g} %"
            drawn = 100 * accuracy[rank, scale]
            assert text == f"rank {share}, λ = {scale:g}: {drawn:.1f} %"
        for name, (rank, scale) in (("chosen", chosen), ("best", best)):
            mark = named(figure, name)
            assert (ranks[int(mark.x[0])], scales[int(mark.y[0])]) == (rank, scale)

    def test_colours_end_below_the_best(self) -> None:
        frame = swept()  # 90 down to 55
        heat = rank_scale_map(frame, "Where?", (0.08, 2.0), (0.04, 0.5)).data[0]
        assert (heat.zmin, heat.zmax) == pytest.approx((90 - MAP_SPAN, 90))
        narrow = frame.assign(accuracy=0.9 - frame["accuracy"] / 100)
        heat = rank_scale_map(narrow, "Where?", (0.08, 2.0), (0.04, 0.5)).data[0]
        assert heat.zmin == pytest.approx(100 * narrow["accuracy"].min())
        holes = frame.assign(accuracy=frame["accuracy"].where(frame["accuracy"] < 0.9))
        heat = rank_scale_map(holes, "Where?", (0.08, 2.0), (0.04, 0.5)).data[0]
        assert (heat.zmin, heat.zmax) == pytest.approx((83 - MAP_SPAN, 83))

    def test_a_point_off_the_grid_is_not_marked(self) -> None:
        figure = rank_scale_map(swept(), "Where?", (0.5, 2.0), (0.04, 0.5))
        assert [t.name for t in figure.data if t.name] == ["best"]
