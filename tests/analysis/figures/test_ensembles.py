"""What figures of soups and ensembles draw: the frames' own numbers, and nothing invisible."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from analysis.averaging.ensembles import (
    ENSEMBLES,
    RULES,
    accuracy_over_members,
    agreement,
    rules_frame,
)
from analysis.averaging.gaps import covariance_frame
from analysis.averaging.similarity import cka_frame, mean_cka
from analysis.averaging.soups import greedy_soup
from analysis.figures import ensembles as figures
from analysis.figures import similarity as maps
from analysis.figures.style import TRANSPARENT
from analysis.outputs.pool_outputs import PoolEvaluator
from tests.pools import write_pool

MEMBERS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> PoolEvaluator:
    return PoolEvaluator(write_pool(tmp_path_factory.mktemp("figures") / "p", "mlp", 4))


@pytest.fixture(scope="module")
def over_n(evaluator: PoolEvaluator) -> pd.DataFrame:
    return accuracy_over_members(evaluator, MEMBERS)


def traces_by_name(figure: go.Figure) -> dict[str, go.Scatter]:
    return {trace.name: trace for trace in figure.data}


def every_figure(evaluator: PoolEvaluator, over_n: pd.DataFrame) -> Iterator[go.Figure]:
    rules = rules_frame(evaluator, MEMBERS)
    yield figures.rules_dots(rules, "Which rule wins?", 0.25)
    yield figures.accuracy_over_n(over_n, "Which rule wins?", 0.25)
    yield figures.accuracy_against_cost(over_n, "Which rule wins?", 0.25)
    for value in ("agreement", "error_overlap"):
        yield maps.agreement_map(agreement(evaluator, MEMBERS), value, "Who agrees?")
    frame = cka_frame(evaluator, MEMBERS)
    yield maps.cka_layers(mean_cka(frame), "Who is alike?")
    gaps = covariance_frame(evaluator, MEMBERS)
    yield figures.covariance_scatter(gaps, "Are they equal?")
    yield figures.gap_scatter(gaps, "Are they equal?")
    yield figures.greedy_trace(greedy_soup(evaluator, MEMBERS)[1], "Who joins?")


def test_all_figures_fit_both_themes_and_serialise(
    evaluator: PoolEvaluator, over_n: pd.DataFrame
) -> None:
    for figure in every_figure(evaluator, over_n):
        assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == TRANSPARENT
        assert figure.layout.xaxis.title.text
        assert figure.layout.title.text
        assert figure.layout.font.color is None
        points = sum(len(t.x) for t in figure.data if isinstance(t, go.Scatter))
        assert points <= figures.MOST_POINTS + 2
        assert len(figure.to_json()) < 400_000


def test_every_rule_has_a_look_of_its_own() -> None:
    assert list(figures.RULE_LOOKS) == list(RULES)
    assert len(set(figures.RULE_LOOKS.values())) == len(RULES)
    assert len({symbol for _, symbol, _ in figures.RULE_LOOKS.values()}) == len(RULES)


def test_dots_are_the_rules_accuracies_with_their_intervals(evaluator: PoolEvaluator) -> None:
    frame = rules_frame(evaluator, MEMBERS)
    figure = figures.rules_dots(frame, "", 0.25)
    dots = traces_by_name(figure)
    assert list(dots) == list(RULES.values())
    for row in frame.itertuples():
        dot = dots[row.label]
        assert dot.x[0] == pytest.approx(100 * row.accuracy)
        assert dot.x[0] + dot.error_x.array[0] == pytest.approx(100 * row.high)
        assert dot.x[0] - dot.error_x.arrayminus[0] == pytest.approx(100 * row.low)
    band, chance = figure.layout.shapes
    single = frame.iloc[0]
    assert (band.x0, band.x1) == pytest.approx((100 * single["worst"], 100 * single["best"]))
    assert chance.x0 == 25
    assert [a.text for a in figure.layout.annotations] == ["chance 25 %"]
    low, high = figure.layout.xaxis.range
    assert low <= 100 * frame["low"].min()
    assert high >= 100 * frame["high"].max()


def test_images_without_finite_logits_are_written_beside_the_dot(
    evaluator: PoolEvaluator,
) -> None:
    frame = rules_frame(evaluator, MEMBERS)
    frame.loc[frame["rule"] == "uniform_soup", "non_finite"] = 7
    figure = figures.rules_dots(frame)
    (note,) = figure.layout.annotations
    assert note.text == "7 of 50 images without finite logits"
    assert note.y == "uniform soup"
    assert "7 of 50 images" in traces_by_name(figure)["uniform soup"].hovertemplate


def test_lines_over_n_lie_over_the_band_of_individuals(over_n: pd.DataFrame) -> None:
    figure = figures.accuracy_over_n(over_n)
    traces = traces_by_name(figure)
    single = over_n[over_n["rule"] == "individuals"]
    band = traces["worst to best individual"]
    assert np.asarray(band.x).tolist() == [1, 2, 3, 4, 4, 3, 2, 1]
    assert np.asarray(band.y)[:4] == pytest.approx(100 * single["best"].to_numpy())
    assert np.asarray(band.y)[:3:-1] == pytest.approx(100 * single["worst"].to_numpy())
    for rule, label in RULES.items():
        expected = 100 * over_n.loc[over_n["rule"] == rule, "accuracy"].to_numpy()
        assert np.asarray(traces[label].y) == pytest.approx(expected)
        shown = [4] if rule == "greedy_soup" else [1, 2, 3, 4]
        assert np.asarray(traces[label].x).tolist() == shown


def test_cost_draws_ensembles_over_passes_and_all_else_at_one(over_n: pd.DataFrame) -> None:
    traces = traces_by_name(figures.accuracy_against_cost(over_n))
    at_one = []
    for rule, label in RULES.items():
        mine = over_n[over_n["rule"] == rule]
        if rule in ENSEMBLES:
            assert np.asarray(traces[label].x).tolist() == [1, 2, 3, 4]
            assert np.asarray(traces[label].y) == pytest.approx(100 * mine["accuracy"].to_numpy())
        else:
            assert np.asarray(traces[label].y) == pytest.approx(100 * mine["accuracy"].iloc[-1:])
            at_one.append(float(traces[label].x[0]))
    assert len(set(at_one)) == 4
    assert np.mean(at_one) == pytest.approx(1)
    assert max(at_one) - min(at_one) < 0.5


def test_maps_keep_the_order_of_the_models(evaluator: PoolEvaluator) -> None:
    frame = agreement(evaluator, (2, 0))
    heat = maps.agreement_map(frame).data[0]
    names = ["member 2", "member 0", "uniform soup", "logit ensemble"]
    assert list(heat.x) == list(heat.y) == ["2", "0", "soup", "ensemble"]
    table = frame.set_index(["first", "second"])["agreement"]
    for i, first in enumerate(names):
        for j, second in enumerate(names):
            assert heat.z[i, j] == table[first, second]
    assert heat.zmin <= heat.z.min()
    assert heat.zmax == 1


def test_layers_are_drawn_with_their_spread(evaluator: PoolEvaluator) -> None:
    mean = mean_cka(cka_frame(evaluator, MEMBERS))
    traces = traces_by_name(maps.cka_layers(mean))
    assert list(traces["mean over pairs"].x) == ["hidden.0", "hidden.1", "features", "logits"]
    assert np.asarray(traces["mean over pairs"].y) == pytest.approx(mean["mean"].to_numpy())
    band = np.asarray(traces["lowest to highest pair"].y)
    assert band[:4] == pytest.approx(mean["highest"].to_numpy())
    assert band[:3:-1] == pytest.approx(mean["lowest"].to_numpy())


def test_many_logits_are_thinned_and_broken_ones_left_out() -> None:
    n = 5000
    values = np.linspace(-3, 3, n)
    frame = pd.DataFrame(
        {"image": range(n), "class": 0, "measured": 2 * values, "predicted": values}
    )
    frame.loc[10, "measured"] = np.nan
    line, points = figures.gap_scatter(frame).data
    assert len(points.x) == figures.MOST_POINTS
    assert np.asarray(points.y) == pytest.approx(2 * np.asarray(points.x))
    assert points.name == "one image and class (1500 of 5000)"
    assert list(line.x) == list(line.y) == [-6, 6]
    empty = figures.gap_scatter(frame.assign(measured=np.nan))
    assert len(empty.data[0].x) == 0


def test_the_greedy_trace_shows_who_joins() -> None:
    trace = pd.DataFrame(
        {
            "step": [1, 2, 3],
            "member": [4, 0, 2],
            "member_accuracy": [0.9, 0.8, 0.7],
            "accuracy": [0.9, 0.5, 0.95],
            "kept": [True, False, True],
        }
    )
    traces = traces_by_name(figures.greedy_trace(trace))
    assert list(traces["joins"].x) == ["member 4", "member 2"]
    assert np.asarray(traces["joins"].y) == pytest.approx([90, 95])
    assert list(traces["does not join"].x) == ["member 0"]
    assert np.asarray(traces["soup so far"].y) == pytest.approx([90, 90, 95])
    assert np.asarray(traces["member alone"].y) == pytest.approx([90, 80, 70])
