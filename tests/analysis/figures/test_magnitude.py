"""Figures of section F: what is drawn is what the frames hold."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from plotly.graph_objects import Figure, Scatter

from analysis.figures.magnitude import (
    QUANTITIES,
    dominance_lines,
    magnitude_grid,
)
from analysis.figures.regularisation import (
    corruption_lines,
    identity_bar,
    noise_lines,
    norm_ranges,
    norm_ratios,
    weight_histogram,
)
from analysis.magnitude.calibration import MEASURES
from analysis.magnitude.homogeneity import dominance
from analysis.magnitude.norms import TOTAL, histogram_frame, identity_frame, norms_frame
from analysis.magnitude.robustness import corruption_sweep, weight_noise_sweep
from analysis.magnitude.sweep import SUBJECTS, magnitude_sweep, predicted_sweep
from analysis.outputs.pool_outputs import PoolEvaluator
from tests.pools import write_pool

MEMBERS = (0, 1, 2)
M = [1e-2, 1.0, 1e2]


@pytest.fixture(scope="module")
def vgg(tmp_path_factory) -> PoolEvaluator:
    return PoolEvaluator(write_pool(tmp_path_factory.mktemp("pools") / "vgg", "vgg"))


@pytest.fixture(scope="module")
def sweep(vgg) -> pd.DataFrame:
    return magnitude_sweep(vgg, MEMBERS, M)


def assert_house_style(figure: Figure) -> None:
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert figure.layout.legend.orientation == "h"
    assert figure.layout.title.font.size == 15
    figure.to_json()


def cell_of(figure: Figure, quantity: str) -> list[Scatter]:
    """What is drawn of one measure."""
    number = list(QUANTITIES).index(quantity) + 1
    return [t for t in figure.data if t.yaxis == ("y" if number == 1 else f"y{number}")]


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_lines_hold_the_frame(sweep, quantity: str) -> None:
    figure = magnitude_grid(sweep, title="What happens?", chosen=10)
    assert_house_style(figure)
    lines = cell_of(figure, quantity)
    drawn = {trace.name: trace for trace in lines}
    for subject, part in sweep.groupby("subject", sort=False):
        if part[quantity].isna().all():
            assert SUBJECTS[subject] not in drawn
            continue
        trace = drawn[SUBJECTS[subject]]
        assert list(trace.x) == M
        assert np.array_equal(trace.y, part[quantity].to_numpy())
    assert figure.layout.xaxis.type == "log"
    assert {shape.x0 for shape in figure.layout.shapes} == {10}
    assert len({(t.line.color, t.line.dash) for t in lines}) == len(lines)


def test_the_prediction_lies_over_the_lines(vgg, sweep) -> None:
    prediction = predicted_sweep(vgg, MEMBERS, M, law="large")
    lines = cell_of(magnitude_grid(sweep, prediction), "accuracy")
    dashed = [t for t in lines if t.name.startswith("prediction: limit of large m")]
    assert len(dashed) == 5
    assert [t.showlegend for t in dashed] == [True] + [False] * 4
    assert lines[-5:] == dashed
    assert {t.line.dash for t in dashed} == {"dash"}
    assert "large" in dashed[0].hovertemplate


def test_small_multiples_name_each_subject_once(vgg, sweep) -> None:
    prediction = predicted_sweep(vgg, MEMBERS, M)
    figure = magnitude_grid(sweep, prediction, "All at once", chosen=2)
    assert_house_style(figure)
    named = [trace.name for trace in figure.data if trace.showlegend]
    assert sorted(named) == sorted({*SUBJECTS.values(), "prediction: pure homogeneity, mᴸ"})
    titles = [note.text for note in figure.layout.annotations]
    assert titles == [label for label, _ in QUANTITIES.values()]
    axes = {trace.yaxis for trace in figure.data}
    assert axes == {"y", "y2", "y3", "y4", "y5", "y6"}
    logits = [t for t in figure.data if t.yaxis == "y6" and t.name == SUBJECTS["uniform_soup"]]
    part = sweep[sweep["subject"] == "uniform_soup"]
    assert np.array_equal(logits[0].y, part["log10_logit_norm"].to_numpy())
    assert len(figure.layout.shapes) == 6
    assert list(figure.layout.xaxis5.ticktext) == ["1"]
    assert figure.layout.yaxis.range == (-0.03, 1.05)
    assert figure.layout.yaxis6.range is None
    assert sum(len(t.x) for t in figure.data) < 2000


def test_what_is_not_finite_is_marked(sweep) -> None:
    frame = sweep.copy()
    lost = (frame["magnitude"] == 1e2) & (frame["subject"] == "uniform_soup")
    frame.loc[lost, [*MEASURES]] = np.nan
    frame.loc[lost, ["accuracy", "stability", "non_finite"]] = [0.0, 0.0, 1.0]
    figure = magnitude_grid(frame)
    marks, of_accuracy = (
        next(t for t in cell_of(figure, quantity) if t.name == "some logits not finite")
        for quantity in ("entropy", "accuracy")
    )
    assert list(marks.x) == [1e2]
    assert marks.y[0] == pytest.approx(frame["entropy"].min())
    assert list(marks.customdata[0]) == ["uniform soup", 100.0]
    assert of_accuracy.y[0] == 0
    assert all(t.name != "some logits not finite" for t in magnitude_grid(sweep).data)
    frame["entropy"] = np.nan
    frame["non_finite"] = 1.0
    assert set(cell_of(magnitude_grid(frame), "entropy")[0].y) == {0.0}


def test_dominance_draws_soup_and_ensembles() -> None:
    frame = dominance([1, 8], 10, M)
    figure = dominance_lines(frame, "Who dominates?", chosen=2)
    assert_house_style(figure)
    assert len(figure.data) == 3
    assert figure.data[0].name == "soup: of the weights, m : 1"
    assert figure.data[2].name == "ensemble: of the logits, m<sup>8</sup> : 1"
    assert figure.data[2].y[-1] == pytest.approx(1)
    assert figure.data[0].y[1] == pytest.approx(0.1)


def test_norms_per_parameter(vgg) -> None:
    frame = norms_frame(vgg, MEMBERS)
    figure = norm_ratios(frame, "Smaller?")
    assert_house_style(figure)
    assert sum(len(t.x) for t in figure.data) == len(frame)
    weights = frame[frame["weight"]]
    assert np.array_equal(figure.data[0].x, weights["ratio"].to_numpy())
    assert figure.layout.shapes[0].x0 == pytest.approx(3**-0.5)
    for quantity in ("norm", "variance"):
        figure = norm_ranges(frame, quantity)
        assert_house_style(figure)
        assert np.array_equal(figure.data[1].x, frame[f"{quantity}_soup"].to_numpy())
        reach = figure.data[0].x + np.array(figure.data[0].error_x.array)
        assert reach == pytest.approx(frame[f"{quantity}_max"].to_numpy())
        reach = figure.data[0].x - np.array(figure.data[0].error_x.arrayminus)
        assert reach == pytest.approx(frame[f"{quantity}_min"].to_numpy())
    assert len(norm_ratios(frame[frame["weight"]]).data) == 1


def test_histogram_and_identity(vgg) -> None:
    frame = histogram_frame(vgg, MEMBERS, "hidden.weight", bins=12)
    figure = weight_histogram(frame, "Where are they?")
    assert_house_style(figure)
    for trace, (_, part) in zip(figure.data, frame.groupby("subject", sort=False), strict=True):
        assert len(trace.x) == 13
        assert np.array_equal(trace.y[:12], part["density"].to_numpy())
        assert trace.line.shape == "hv"
    figure = identity_bar(identity_frame(vgg, MEMBERS), TOTAL, "Equal?")
    assert_house_style(figure)
    whole, soup, spread = (trace.x[0] for trace in figure.data)
    assert whole == pytest.approx(soup + spread)
    assert [trace.y[0] for trace in figure.data] == ["members"] + ["average + spread"] * 2
    assert figure.layout.barmode == "stack"


def test_noise_and_corruption(vgg) -> None:
    noise = weight_noise_sweep(vgg, MEMBERS, [0.0, 0.5], (0, 1))
    corruption = corruption_sweep(vgg, MEMBERS, "blur", (0, 2))
    for figure, frame in (
        (noise_lines(noise, title="Noise?"), noise),
        (corruption_lines(corruption, "blur", "Blur?"), corruption),
    ):
        assert_house_style(figure)
        for trace, (_, part) in zip(figure.data, frame.groupby("subject", sort=False), strict=True):
            assert np.array_equal(trace.y, part["accuracy"].to_numpy())
            high = trace.y + np.array(trace.error_y.array)
            assert high == pytest.approx(part["high"].to_numpy())
    assert "own RMS" in noise_lines(noise).layout.xaxis.title.text
    assert "members' RMS" in noise_lines(noise, relative=False).layout.xaxis.title.text
    assert list(figure.layout.xaxis.ticktext) == ["0<br>(0)", "2<br>(0.75)"]
    bars = {trace.name: trace.error_y.visible for trace in figure.data}
    assert bars["individuals"]
    assert not bars["logit ensemble"]
