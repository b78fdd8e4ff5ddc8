"""Figures of rank selection: the numbers drawn are the numbers of the frames."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from analysis.figures import rank_evidence, rank_map, rank_selection
from tests.analysis.figures.test_accuracy import decode, trace_named

RANKS, SCALES = (0.01, 0.1, 1.0), (0.5, 2.0)


def points(ranks: tuple[float, ...] = RANKS, scales: tuple[float, ...] = SCALES) -> pd.DataFrame:
    """A score per cell, 90 % and 7 points less each; the second cell on part of the images."""
    frame = pd.DataFrame(list(product(ranks, scales)), columns=["rank", "scale"])
    frame["score"] = [0.9 - 0.07 * i for i in range(len(frame))]
    frame["images"] = [60 if i == 1 else 250 for i in range(len(frame))]
    frame["tied"] = [i < 3 for i in range(len(frame))]
    frame = frame.assign(low=frame["score"] - 0.03, high=frame["score"] + 0.02)
    frame = frame.assign(expected=frame["score"] - 0.01)
    frame = frame.assign(
        expected_low=frame["expected"] - 0.03, expected_high=frame["expected"] + 0.02
    )
    # Shuffled, so that a figure that trusts the order of rows is wrong.
    return frame.assign(method="cart").sample(frac=1, random_state=1)


def picks() -> pd.DataFrame:
    rows = [
        ("energy", "Energy 90 %", "weights", 0.1, 2.0, np.nan),
        ("entropy", "Mean entropy", "inputs", 0.0316227766, 1.25, 0.8),
        ("accuracy", "Labels", "labels", 0.01, 0.5, 0.9),
        ("scale_only", "Scale only", "weights", np.nan, 1.0, np.nan),
    ]
    columns = ["proxy", "title", "mode", "rank", "scale", "accuracy"]
    return pd.DataFrame(rows, columns=columns)


class TestCurve:
    @pytest.mark.parametrize("axis", ["rank", "scale"])
    def test_line_band_and_marks(self, axis: str) -> None:
        other = {"rank": "scale", "scale": "rank"}[axis]
        frame = points()
        frame = frame[frame[other] == frame[other].min()]
        figure = decode(
            rank_selection.score_curve(
                frame, "Best?", axis=axis, picks=picks(), references={"experts": 0.95}, chosen=0.5
            )
        )
        ordered = frame.sort_values(axis)
        line = trace_named(figure, "accuracy expected, centred (CART)")
        np.testing.assert_allclose(line.x, ordered[axis])
        np.testing.assert_allclose(line.y, 100 * ordered["expected"])
        dots = trace_named(figure, "measured, centred (CART)")
        np.testing.assert_allclose(dots.x, ordered[axis])
        np.testing.assert_allclose(dots.y, 100 * ordered["score"])
        assert [s.endswith("-open") for s in dots.marker.symbol] == (
            ordered["images"] < 250
        ).tolist()
        n = len(ordered)
        band = figure.data[0]
        np.testing.assert_allclose(band.y[:n], 100 * ordered["expected_high"])
        np.testing.assert_allclose(band.y[n:][::-1], 100 * ordered["expected_low"])
        np.testing.assert_allclose(band.x, [*ordered[axis], *ordered[axis][::-1]])
        lines = [(shape.x0, shape.y0) for shape in figure.layout.shapes]
        assert any(y == pytest.approx(95) for _, y in lines)
        assert any(x == 0.5 for x, _ in lines)

    def test_marks_lie_on_the_curve_at_their_rank(self) -> None:
        frame = points(scales=(2.0,))
        figure = decode(rank_selection.score_curve(frame, "Best?", picks=picks()))
        mark = trace_named(figure, "picks, inputs only")
        # Half way between 0.01 and 0.1 on the log axis: half way between 89 and 82 %.
        assert mark.x[0] == pytest.approx(10**-1.5)
        assert mark.y[0] == pytest.approx((89 + 82) / 2, abs=1e-5)
        assert "Mean entropy" in mark.text[0]
        assert "λ = 1.25" in mark.text[0]
        assert len(trace_named(figure, "picks, weights only").x) == 1  # one of the two has a rank

    def test_what_is_no_share_keeps_its_unit(self) -> None:
        frame = points(scales=(2.0,))
        figure = decode(rank_selection.score_curve(frame, "Best?", value="entropy"))
        line = next(t for t in figure.data if t.name)
        np.testing.assert_allclose(line.y, frame.sort_values("rank")["expected"])
        assert figure.layout.yaxis.title.text == "Entropy"

    @pytest.mark.parametrize("value", ["accuracy", "normalised"])
    def test_tasks(self, value: str) -> None:
        parts = [
            points(scales=(1.0,)).assign(
                task=t, accuracy=lambda f: f["score"], normalised=0.5 + i / 10
            )
            for i, t in enumerate("ab")
        ]
        figure = decode(
            rank_selection.tasks_over_rank(pd.concat(parts), value, "Tasks?", chosen=0.1)
        )
        assert [trace.name for trace in figure.data] == ["a", "b"]
        for trace, part in zip(figure.data, parts, strict=True):
            ordered = part.sort_values("rank")
            np.testing.assert_allclose(trace.x, ordered["rank"])
            np.testing.assert_allclose(trace.y, 100 * ordered[value])
            best = np.asarray(trace.y) == np.max(trace.y)
            assert (np.asarray(trace.marker.size) == np.max(trace.marker.size)).tolist() == (
                best.tolist()
            )
        assert ("expert" in figure.layout.yaxis.title.text) == (value == "normalised")


def outline(figure: go.Figure) -> set[frozenset[tuple[float, float]]]:
    """The drawn sides, each as its two ends."""
    trace = trace_named(figure, "statistically tied")
    x, y = list(trace.x), list(trace.y)
    return {frozenset({(x[i], y[i]), (x[i + 1], y[i + 1])}) for i in range(0, len(x), 3)}


class TestMap:
    def test_cells_show_what_was_evaluated_and_on_how_many_images(self) -> None:
        frame = points().query("not (rank == 1.0 and scale == 0.5)")
        figure = decode(rank_map.evaluated_map(frame, RANKS, SCALES, "Where?"))
        whole, part = [t for t in figure.data if t.type == "heatmap"]
        score = frame.set_index(["rank", "scale"])
        for (i, rank), (j, scale) in product(enumerate(RANKS), enumerate(SCALES)):
            shown = [float(np.asarray(t.z, dtype=float)[j, i]) for t in (whole, part)]
            if (rank, scale) not in score.index:
                assert np.isnan(shown).all()
                continue
            row = score.loc[(rank, scale)]
            place = 0 if row["images"] == 250 else 1
            assert shown[place] == pytest.approx(100 * row["score"])
            assert np.isnan(shown[1 - place])
        assert whole.xgap < part.xgap  # fewer images, smaller cells

    def test_overlay_and_marks_carry_their_setting(self) -> None:
        frame = points().query("rank < 1")
        figure = decode(
            rank_map.evaluated_map(
                frame,
                RANKS,
                SCALES,
                "Where?",
                recommended=(0.01, 0.5),
                chosen=(1.0, 2.0),
                picks=picks(),
            )
        )
        overlay = next(t for t in figure.data if t.customdata is not None)
        assert sorted(map(tuple, overlay.customdata)) == sorted(product(RANKS, SCALES))
        for (rank, scale), x, y, text in zip(
            overlay.customdata, overlay.x, overlay.y, overlay.text, strict=True
        ):
            assert (RANKS[int(x)], SCALES[int(y)]) == (rank, scale)
            assert ("not evaluated" in text) == (rank == 1.0)
            if (rank, scale) == (0.01, 2.0):
                assert "83.0% on 60 inputs a task, tied" in text
        star, ring = trace_named(figure, "recommended"), trace_named(figure, "chosen")
        assert (star.x[0], star.y[0]) == (0, 0)
        assert (ring.x[0], ring.y[0]) == (2, 1)
        entropy = trace_named(figure, "picks, inputs only")
        # Off the grid: half way in log rank, half way in scale.
        assert entropy.x[0] == pytest.approx(0.5)
        assert entropy.y[0] == pytest.approx(0.5)

    def test_one_line_goes_around_what_is_tied(self) -> None:
        # Cells (rank, scale) 0,0  0,1  1,0 by place: an L of three cells has eight sides.
        figure = decode(rank_map.evaluated_map(points(), RANKS, SCALES, "Where?"))
        tied = {(0, 0), (0, 1), (1, 0)}
        sides: dict[frozenset[tuple[float, float]], int] = {}
        for i, j in tied:
            corners = [
                (i - 0.5, j - 0.5),
                (i + 0.5, j - 0.5),
                (i + 0.5, j + 0.5),
                (i - 0.5, j + 0.5),
            ]
            for a, b in zip(corners, corners[1:] + corners[:1], strict=True):
                side = frozenset({a, b})
                sides[side] = sides.get(side, 0) + 1
        assert outline(figure) == {side for side, count in sides.items() if count == 1}

    def test_colours_end_below_the_best(self) -> None:
        axis = rank_map.evaluated_map(points(), RANKS, SCALES, "Where?").layout.coloraxis
        assert (axis.cmin, axis.cmax) == pytest.approx((90 - rank_map.MAP_SPAN, 90))
        narrow = points().assign(score=lambda f: 0.9 - f["score"] / 100)
        axis = rank_map.evaluated_map(narrow, RANKS, SCALES, "Where?").layout.coloraxis
        assert axis.cmin == pytest.approx(100 * narrow["score"].min())

    def test_nothing_evaluated_still_shows_the_picks(self) -> None:
        empty = points().iloc[:0]
        figure = decode(
            rank_map.evaluated_map(
                empty, RANKS, SCALES, "Where?", recommended=(0.05, 1.0), picks=picks()
            )
        )
        assert not [t for t in figure.data if t.type == "heatmap"]
        star = trace_named(figure, "recommended")
        assert star.x[0] == pytest.approx(np.log(0.05 / 0.01) / np.log(10))
        assert star.y[0] == pytest.approx(1 / 3)
        assert len(trace_named(figure, "picks, weights only").x) == 1
        overlay = next(t for t in figure.data if t.customdata is not None)
        assert all("not evaluated" in text for text in overlay.text)


class TestEvidence:
    def test_proxies_are_stretched_to_the_unit_interval(self) -> None:
        proxies = pd.DataFrame(
            {
                "proxy": ["bell"] * 3 + ["flat"] * 3,
                "title": ["The bell"] * 3 + ["Flat"] * 3,
                "rank": [1.0, 0.01, 0.1] * 2,
                "value": [3.0, 5.0, 11.0, 2.0, 2.0, 2.0],
            }
        )
        curve = points(scales=(2.0,))
        figure = decode(rank_evidence.proxies_over_rank(proxies, curve, "Which?", shown=["bell"]))
        bell, flat = trace_named(figure, "The bell"), trace_named(figure, "Flat")
        np.testing.assert_allclose(bell.x, [0.01, 0.1, 1.0])
        np.testing.assert_allclose(bell.y, [0.25, 1, 0])
        np.testing.assert_allclose(bell.customdata, [5, 11, 3])
        np.testing.assert_allclose(flat.y, 0)
        assert (bell.visible, flat.visible) == (True, "legendonly")
        np.testing.assert_allclose(trace_named(figure, "by the search").y, [1, 0.5, 0])

    def test_each_pick_stands_in_its_proxys_row(self) -> None:
        figure = decode(rank_evidence.picks_over_rank(picks(), "Where?", 0.01))
        drawn = {y: x for t in figure.data for x, y in zip(t.x, t.y, strict=True)}
        assert drawn == pytest.approx(
            {"Energy 90 %": 0.1, "Mean entropy": 0.0316227766, "Labels": 0.01}
        )
        entropy = trace_named(figure, "inputs only")
        assert entropy.text[0].endswith("80.0%")
        assert trace_named(figure, "weights only").text[0] == "rank 10 %, λ = 2"

    def test_regrets_with_their_means_and_what_lies_beyond(self) -> None:
        rows = [
            ("good", "inputs", "vision", "8", 0.001),
            ("good", "inputs", "vision", "4a", 0.003),
            ("bad", "weights", "vision", "8", 0.40),
            ("bad", "weights", "vision", "4a", 0.02),
        ]
        table = pd.DataFrame(rows, columns=["title", "mode", "suite", "subset", "test_regret"])
        figure = decode(rank_evidence.regret_dots(table.assign(proxy=table["title"]), "Who?"))
        np.testing.assert_allclose(trace_named(figure, "inputs only").x, [0.1, 0.3])
        weights = trace_named(figure, "weights only")
        assert list(weights.marker.symbol) == ["triangle-right-open", "triangle-down-open"]
        np.testing.assert_allclose(weights.x, [rank_evidence.REGRET_SPAN, 2])
        np.testing.assert_allclose(weights.customdata, [40, 2])
        means = trace_named(figure, "mean")
        assert dict(zip(means.y, means.customdata, strict=True)) == pytest.approx(
            {"good": 0.2, "bad": 21}
        )
        assert figure.layout.yaxis.categoryarray[-1] == "good"  # the last category is on top

    def test_best_setting_over_the_number_of_tasks(self) -> None:
        frame = pd.DataFrame(
            {
                "tasks": [4, 4, 8],
                "subset": ["4a", "4b", "8"],
                "suite": "vision",
                "best_rank": [0.1, 0.2, 0.08],
                "best_scale": [2.0, 3.0, 2.5],
                "tied_rank_low": [0.05, 0.1, 0.07],
                "tied_rank_high": [0.3, 0.4, 0.09],
                "tied_scale_low": [1.0, 2.0, 2.0],
                "tied_scale_high": [3.0, 4.0, 3.0],
            }
        )
        figure = decode(rank_evidence.best_over_tasks(frame, "More tasks?"))
        for trace, axis, factor in zip(figure.data, ("rank", "scale"), (100, 1), strict=True):
            np.testing.assert_allclose(trace.y, factor * frame[f"best_{axis}"])
            np.testing.assert_allclose(
                trace.y + trace.error_y.array, factor * frame[f"tied_{axis}_high"]
            )
            np.testing.assert_allclose(
                trace.y - trace.error_y.arrayminus, factor * frame[f"tied_{axis}_low"]
            )
            np.testing.assert_array_equal(np.round(trace.x), frame["tasks"])
            assert len(set(trace.x)) == 3  # subsets of one size do not cover each other

    def test_each_layer_has_its_row(self) -> None:
        rows = [("a", "x.weight", 3, 0.1), ("a", "y.weight", 9, 0.3), ("b", "y.weight", 6, 0.2)]
        frame = pd.DataFrame(rows, columns=["rule", "parameter", "rank", "share"])
        figure = decode(rank_evidence.layer_ranks(frame, "Layers?", uniform=0.08))
        first = trace_named(figure, "a")
        assert dict(zip(first.y, first.x, strict=True)) == {"x.weight": 0.1, "y.weight": 0.3}
        assert first.text[1] == "9 directions"
        assert figure.layout.yaxis.categoryarray[-1] == "x.weight"  # the first layer is on top
        assert figure.layout.shapes[0].x0 == 0.08

    def test_accuracy_stands_over_what_is_stored(self) -> None:
        frame = pd.DataFrame(
            {
                "title": ["Uniform", "Uniform", "Energy"],
                "share": [0.2, 0.1, 0.1],
                "numbers": [4e6, 2e6, 1.9e6],
                "scale": [1.0, 2.0, 2.0],
                "accuracy": [0.8, 0.7, 0.75],
            }
        )
        frame = frame.assign(low=frame["accuracy"] - 0.02, high=frame["accuracy"] + 0.01)
        figure = decode(rank_evidence.accuracy_over_storage(frame, "Helps?"))
        line = trace_named(figure, "Uniform")
        np.testing.assert_allclose(line.x, [2, 4])
        np.testing.assert_allclose(line.y, [70, 80])
        np.testing.assert_allclose(line.error_y.array, 1)
        np.testing.assert_allclose(line.error_y.arrayminus, 2)
        assert "rank 10 %" in line.text[0]
