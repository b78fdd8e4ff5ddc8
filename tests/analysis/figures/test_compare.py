"""Figures of a comparison: places, marks and names say what the frames say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.accuracy import paired_differences
from analysis.figures.compare import cost_scatter, method_dots, paired_map, task_radar

LABELS = ["CART", "TIES", "DARE with Task Arithmetic (drop 0.5, then SVC at floor 1, seed 0)", "A"]


@pytest.fixture
def summary() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "label": LABELS,
            "accuracy": [0.9, 0.8, 0.8, 0.7],
            "low": [0.88, 0.78, 0.75, 0.6],
            "high": [0.91, 0.83, 0.82, 0.8],
            "worst": [0.5, 0.6, 0.7, 0.4],
            "worst_task": ["x", "y", "y", "x"],
            "seconds": [1.0, 0.1, 2.0, 0.01],
            "storage_mb": [5.0, np.nan, 2.0, 1.0],
        }
    )


def test_dots_stand_by_their_places(summary: pd.DataFrame) -> None:
    figure = method_dots(summary.sample(frac=1, random_state=1), "?", {"experts": 0.95})
    dots, worst = figure.data
    names = dict(zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext, strict=True))
    assert names["CART"] == "1  CART"
    assert names["A"] == "4  A"
    assert list(dots.y)[::3] == ["A", "CART"]  # the last category is drawn at the top
    assert max(text.count("<br>") for text in names.values()) == 1
    bars = {
        label: (x - minus, x, x + plus)
        for label, x, plus, minus in zip(
            dots.y, dots.x, dots.error_x.array, dots.error_x.arrayminus, strict=True
        )
    }
    assert bars["CART"] == pytest.approx((88, 90, 91))
    assert dict(zip(worst.y, worst.x, strict=True))["A"] == pytest.approx(40)
    assert figure.layout.shapes[0].x0 == pytest.approx(95)


def test_equal_accuracies_have_the_same_places_in_both_figures(summary: pd.DataFrame) -> None:
    names = method_dots(summary, "?").layout.yaxis.ticktext[::-1]
    assert [name.split("  ")[1].split("<br>")[0][:4] for name in names] == [
        label[:4] for label in summary["label"]
    ]


def test_the_map_is_antisymmetric_and_marks_what_is_real() -> None:
    rng = np.random.default_rng(0)
    hits = {f"m{i:02}": {"t": rng.random(400) < 0.3 + 0.02 * i} for i in range(15)}
    order = sorted(hits, reverse=True)
    pairs = paired_differences(hits)
    figure = paired_map(pairs, order, "?")
    (drawn,) = figure.data
    z, marks = np.array(drawn.z), np.array(drawn.text)
    means = 100 * np.array([hits[label]["t"].mean() for label in order])
    np.testing.assert_allclose(z, means[:, None] - means)
    assert (marks == marks.T).all()
    assert (marks == "●").sum() == 2 * pairs["real"].sum() > 0
    for row in pairs.to_dict("records"):
        mark = marks[order.index(row["first"]), order.index(row["second"])]
        assert (mark == "●") == row["real"]
    columns = figure.layout.xaxis
    assert list(columns.ticktext) == ["1", "5", "10", "15"]
    assert list(columns.tickvals) == [order[i] for i in (0, 4, 9, 14)]
    assert list(figure.layout.yaxis.ticktext) == [str(i) for i in range(1, 16)]


def test_the_radar_starts_below_what_is_drawn() -> None:
    frame = pd.DataFrame(
        {"label": ["a", "a", "b", "b"], "task": ["x", "y"] * 2, "accuracy": [0.8, 0.9, 0.1, 0.2]}
    )
    figure = task_radar(frame, ["a"], "?")
    assert [trace.name for trace in figure.data] == ["a"]
    assert figure.layout.polar.radialaxis.range == pytest.approx((75, 100))
    assert list(figure.data[0].r) == pytest.approx([80, 90, 80])
    assert task_radar(frame, [], "?").layout.polar.radialaxis.range[0] == 0


def test_names_of_near_points_stand_beside_each_other(summary: pd.DataFrame) -> None:
    frame = summary.assign(seconds=[1.0, 0.9, 0.8, 0.01], accuracy=[0.9, 0.895, 0.89, 0.3])
    (dots,) = cost_scatter(frame, "seconds", "?").data
    sides = dict(zip(dots.customdata, dots.textposition, strict=True))
    assert sides == {
        LABELS[2]: "top left",
        "TIES": "top center",
        "CART": "bottom right",
        "A": "top center",
    }


def test_costs_name_what_nothing_cheaper_beats(summary: pd.DataFrame) -> None:
    figure = cost_scatter(summary, "seconds", "?")
    (dots,) = figure.data
    assert figure.layout.xaxis.type == "log"
    named = {text.replace("<br>", " ") for text in dots.text if text}
    assert named == {"A", "TIES", "CART"}  # the third takes longest and is no better
    place = list(dots.customdata).index("TIES")
    assert (dots.x[place], dots.y[place]) == pytest.approx((0.1, 80))
    assert "TIES" not in cost_scatter(summary, "storage_mb", "?").data[0].customdata  # unknown
