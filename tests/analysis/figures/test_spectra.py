"""What figures of spectra and interference draw: the frames' own numbers, and axes that say so."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from plotly.colors import sample_colorscale

from analysis.figures import interference as interference_figures
from analysis.figures import spectra as spectra_figures
from analysis.figures import style
from analysis.spectral.interference import (
    cosine_similarity,
    interference_over_rank,
    interference_pairs,
    mean_over_layers,
)
from analysis.spectral.spectra import cuts, spectral_summary, spectrum
from merge_core.task_vectors import TensorGroup, TensorGroups
from tests.analysis.tiny_suite import MATRICES, QKV, TASKS

ORIGINS = ("average", "base")
SHARES = (0.1, 0.25, 0.5, 1.0)


def both_origins(function, *args) -> pd.DataFrame:
    return pd.concat([function(args[0], origin, *args[1:]) for origin in ORIGINS])


def drawn_traces(figure: go.Figure) -> Iterator[go.Scatter]:
    """Traces with data: dummies that only explain the legend are left out."""
    return (trace for trace in figure.data if trace.x[0] is not None)


def visible_texts(figure: go.Figure) -> str:
    axes = figure.layout.xaxis.title.text + figure.layout.yaxis.title.text
    return axes + figure.layout.title.text


@pytest.mark.parametrize(
    ("parameter", "short"),
    [
        ("blocks.0.attn.qkv.weight", "0 attention qkv"),
        ("transformer.h.0.attn.c_attn.weight", "0 attention qkv"),
        ("visual.transformer.resblocks.11.mlp.c_fc.weight", "11 mlp in"),
        ("resblocks.3.attn.in_proj_weight", "3 attention qkv"),
        ("encoder.layer.3.attention.self.query.weight", "3 attention q"),
        ("model.layers.7.self_attn.q_proj.weight", "7 attention q"),
        ("layers.0.blocks.1.attn.qkv.weight", "0.1 attention qkv"),
        ("head.attention.in_proj_weight", "attention qkv"),
        ("stages.0.blocks.1.conv_dw.weight", "0.1 conv_dw"),
        ("layer1.0.conv1.weight", "layer1.0 conv1"),
        ("layer1.0.downsample.0.weight", "layer1.0 downsample.0"),
        ("features.28.weight", "features.28"),
        ("encoder.proj.weight", "proj"),
        ("fc1.weight", "fc1"),
        ("weight", "weight"),
        ("blocks.0.weight", "blocks.0"),
    ],
)
def test_short_names(parameter: str, short: str) -> None:
    assert spectra_figures.short_name(parameter) == short


def test_names_that_would_be_alike_stay_whole() -> None:
    towers = ["text_model.layers.0.fc.weight", "vision_model.layers.0.fc.weight", "x.1.fc.weight"]
    names = spectra_figures.short_names(towers)
    assert list(names.values()) == [*towers[:2], "x.1 fc"]


def test_scree_draws_the_singular_values(fc: TensorGroup) -> None:
    frame = both_origins(spectrum, fc)
    figure = spectra_figures.scree(frame, title="How fast do they fall?")
    lines = list(drawn_traces(figure))
    assert figure.layout.yaxis.type == "log"
    assert len(lines) == len(TASKS) * 2
    for line, ((task, origin), part) in zip(
        lines, frame.groupby(["task", "origin"], sort=False), strict=True
    ):
        assert np.array_equal(line.y, part["sigma"])
        assert np.array_equal(line.x, part["index"])
        assert line.line.dash == ("solid" if origin == "average" else "dash")
        assert line.line.color == style.task_colours(TASKS)[task]
    named = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert named == [*TASKS, *(style.ORIGIN_NAMES[o] for o in ORIGINS)]
    assert "weight units" in visible_texts(figure)
    assert "How fast do they fall?" in visible_texts(figure)


def test_scree_leaves_out_zeros_that_a_log_axis_cannot_show() -> None:
    frame = pd.DataFrame(
        {"task": "a", "origin": "base", "index": [1, 2, 3], "share": [1 / 3, 2 / 3, 1.0]}
    ).assign(sigma=[2.0, 1.0, 0.0], energy=[0.8, 1.0, 1.0])
    (line,) = spectra_figures.scree(frame).data
    assert line.y.tolist() == [2.0, 1.0]


def test_scree_draws_one_tasks_bounds_or_their_mean(fc: TensorGroup) -> None:
    frame, bounds = spectrum(fc, "base"), cuts(fc, "base")
    edge, cut = list(spectra_figures.scree(frame, bounds).data)[-2:]
    assert edge.y == pytest.approx([bounds["noise_edge"].mean()] * 2)
    assert cut.y == pytest.approx([bounds["gavish_donoho"].mean()] * 2)
    assert edge.x.tolist() == [1, 9]
    # One label above both lines, of which the cut is the higher one.
    assert cut.y[1] > edge.y[1]
    assert cut.text[1] == "Gavish-Donoho,<br>noise edge, mean over tasks"
    one = bounds[bounds["task"] == TASKS[2]]
    edge, cut = spectra_figures.scree(frame[frame["task"] == TASKS[2]], one).data[-2:]
    assert edge.y[0] == pytest.approx(one["noise_edge"].iloc[0])
    assert cut.text[1] == "Gavish-Donoho,<br>noise edge"
    two = spectra_figures.scree(both_origins(spectrum, fc), both_origins(cuts, fc))
    (labelled,) = [trace for trace in two.data[-4:] if any(trace.text)]
    assert labelled.y[1] == max(trace.y[1] for trace in two.data[-4:])
    legend = [trace.name for trace in two.data[-4:] if trace.showlegend]
    assert legend == ["noise bounds, centred", "noise bounds, original"]
    nothing = bounds.assign(noise_edge=0.0, gavish_donoho=0.0)
    assert len(spectra_figures.scree(frame, nothing).data) == len(TASKS)


def test_many_tasks_stay_apart_by_markers() -> None:
    tasks = [f"t{i}" for i in range(10)]
    frame = pd.DataFrame({"task": np.repeat(tasks, 2), "origin": "base", "index": [1, 2] * 10})
    frame = frame.assign(share=frame["index"] / 2, sigma=1.0, energy=1.0)
    lines = spectra_figures.scree(frame).data
    assert len({(line.line.color, line.marker.symbol) for line in lines}) == 10
    assert all("markers" in line.mode for line in lines)


def test_cumulative_energy_draws_energy_marks_and_choice(fc: TensorGroup) -> None:
    frame = both_origins(spectrum, fc)
    figure = spectra_figures.cumulative_energy(frame, "Energy", (0.5, 0.9), chosen_share=0.25)
    line = figure.data[0]
    part = frame[(frame["task"] == TASKS[0]) & (frame["origin"] == "average")]
    assert np.array_equal(line.x, part["share"])
    assert np.array_equal(line.y, part["energy"])
    levels = {(shape.x0, shape.y0) for shape in figure.layout.shapes}
    assert {y for _, y in levels} >= {0.5, 0.9}
    assert 0.25 in {x for x, _ in levels}
    assert {note.text for note in figure.layout.annotations} == {"50 %", "90 %", "chosen: 25 %"}


def test_a_map_of_parts_names_them_like_separate_matrices(groups: TensorGroups) -> None:
    frame = spectral_summary(groups, "average", apart=True)
    heat, cells, _ = spectra_figures.summary_map(frame, "frobenius").data
    assert list(heat.y)[:3] == ["0 attention q", "0 attention k", "0 attention v"]
    values = frame.set_index(["part", "task"])["frobenius"]
    for task, row, (parameter, _), text in zip(
        cells.x, cells.y, cells.customdata, cells.text, strict=True
    ):
        if parameter == QKV:  # a click opens the fused layer
            assert float(text) == pytest.approx(values[row[-1], task], rel=1e-5)
    assert short_of_split("q") == "0 attention q"


def short_of_split(part: str) -> str:
    return spectra_figures.short_name(f"layers.0.self_attn.{part}_proj.weight")


@pytest.mark.parametrize("value", list(spectra_figures.SUMMARY_VALUES))
def test_summary_map_draws_every_value_where_it_belongs(groups: TensorGroups, value: str) -> None:
    frame = spectral_summary(groups, "average")
    heat, cells, _ = spectra_figures.summary_map(frame, value, "Map").data
    table = frame.set_index(["parameter", "task"])[value]
    names = spectra_figures.short_names(MATRICES)
    assert heat.hoverinfo == "skip"
    assert heat.texttemplate is not None
    assert len(cells.x) == len(MATRICES) * len(TASKS)
    for task, row, (parameter, whose), text in zip(
        cells.x, cells.y, cells.customdata, cells.text, strict=True
    ):
        assert whose == task
        assert row == names[parameter]
        expected = table[parameter, task]
        i, j = list(heat.y).index(row), list(heat.x).index(task)
        assert heat.z[i, j] == expected
        assert float(text) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [style.SEQUENTIAL, style.DIVERGING])
def test_numbers_in_cells_can_be_read(scale: str) -> None:
    """WCAG's contrast of 4.5 : 1, whatever the colour of the cell."""
    z = np.append(np.linspace(-1, 1, 39), np.nan).reshape(4, 10)
    figure = go.Figure(go.Heatmap(z=z, colorscale=scale, texttemplate="%{z}"))
    style.colour_cell_numbers(figure)
    white, black = figure.data
    assert (white.textfont.color, black.textfont.color) == ("#FFFFFF", "#000000")
    assert (black.zmin, black.zmax, black.colorscale) == (-1, 1, white.colorscale)
    light = np.isfinite(black.z)
    assert np.array_equal(black.z[light], z[light])
    for value, on_light in zip(z[np.isfinite(z)], light[np.isfinite(z)], strict=True):
        (colour,) = sample_colorscale(scale, [(value + 1) / 2])
        share = np.array([int(c) / 255 for c in re.findall(r"\d+", colour)])
        channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in share]
        luminance = 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]
        contrast = (luminance + 0.05) / 0.05 if on_light else 1.05 / (luminance + 0.05)
        assert contrast >= 4.5


def test_summary_map_can_be_clicked_anywhere_in_a_cell(groups: TensorGroups) -> None:
    figure = spectra_figures.summary_map(spectral_summary(groups, "base"), "stable_rank")
    assert figure.layout.hoverdistance == -1
    assert figure.layout.clickmode == "event+select"
    overlay = figure.data[1]
    assert (overlay.mode, overlay.marker.symbol) == ("markers", "square")
    assert overlay.marker.color == "rgba(0,0,0,0)"
    assert overlay.hoverinfo != "skip"


def test_large_summary_maps_thin_their_labels_but_not_their_cells() -> None:
    parameters = [f"blocks.{i}.fc.weight" for i in range(70)]
    frame = pd.DataFrame({"parameter": np.repeat(parameters, 2), "task": ["a", "b"] * 70})
    frame["part"] = "whole"
    figure = spectra_figures.summary_map(frame.assign(stable_rank=np.arange(140.0)), "stable_rank")
    heat, cells = figure.data
    assert heat.texttemplate is None
    assert heat.z.shape == (70, 2)
    assert heat.z[5].tolist() == [10, 11]
    assert len(cells.x) == 140
    ticks = figure.layout.yaxis.tickvals
    assert len(ticks) == 40
    assert (ticks[0], ticks[-1]) == ("0 fc", "69 fc")


def test_pair_map_of_cosines_is_symmetric_about_zero(groups: TensorGroups) -> None:
    frame = cosine_similarity(groups, "average")
    figure = interference_figures.pair_map(frame, "cosine", "Cosines", diverging=True)
    heat = figure.data[0]
    assert np.array_equal(heat.z.ravel(), frame["cosine"])
    assert list(heat.x) == list(heat.y) == list(TASKS)
    assert (heat.zmin, heat.zmax) == (-1, 1)
    assert figure.layout.yaxis.autorange == "reversed"
    assert figure.layout.yaxis.scaleanchor == "x"
    assert heat.texttemplate


def test_pair_map_of_interference_starts_at_zero(fc: TensorGroup) -> None:
    frame = interference_pairs(fc, "base", 2)
    heat = interference_figures.pair_map(frame, "interference").data[0]
    assert heat.zmin == 0
    assert heat.zmax == frame["interference"].max()
    fixed = interference_figures.pair_map(frame, "interference", zmin=-0.5, zmax=1).data[0]
    assert (fixed.zmin, fixed.zmax) == (-0.5, 1)


@pytest.mark.parametrize("value", ["interference_normalised", "update_norm", "reconstruction"])
def test_over_rank_draws_both_origins_on_a_log_axis(groups: TensorGroups, value: str) -> None:
    frame = mean_over_layers(both_origins(interference_over_rank, groups, SHARES))
    figure = interference_figures.curves_over_rank(frame, value, "Over rank", chosen_share=0.25)
    assert figure.layout.xaxis.type == "log"
    assert set(figure.layout.xaxis.tickvals) <= set(SHARES)
    assert figure.layout.xaxis.ticktext[0] == "10 %"
    assert {trace.name for trace in figure.data} == set(style.ORIGIN_NAMES.values())
    for trace, origin in zip(figure.data, ORIGINS, strict=True):
        part = frame[frame["origin"] == origin]
        assert np.array_equal(trace.x, part["share"])
        assert np.array_equal(trace.y, part[value])
    assert figure.layout.shapes[0].x0 == 0.25
    assert figure.layout.annotations[0].x == pytest.approx(np.log10(0.25))


def test_over_rank_draws_a_line_for_each_matrix(groups: TensorGroups) -> None:
    frame = both_origins(interference_over_rank, groups, SHARES)
    figure = interference_figures.curves_over_rank(frame, "interference")
    assert len(figure.data) == 2 * len(MATRICES)
    assert sum(trace.showlegend for trace in figure.data) == 2
    assert figure.data[0].customdata[:, 1].tolist() == frame["k"][: len(SHARES)].tolist()


def test_trade_off_marks_the_chosen_rank(fc: TensorGroup) -> None:
    frame = both_origins(interference_over_rank, fc, SHARES)
    curve, ring, *_ = interference_figures.trade_off(frame, "Trade", chosen_share=0.24).data
    part = frame[frame["origin"] == "average"]
    assert np.array_equal(curve.x, part["reconstruction_share"])
    assert np.array_equal(curve.y, part["interference_normalised"])
    assert list(curve.text) == [f"k={k}" for k in part["k"]]
    chosen = part[part["share"] == 0.25].iloc[0]
    assert ring.x.tolist() == [chosen["reconstruction_share"]]
    assert ring.y.tolist() == [chosen["interference_normalised"]]
    means = interference_figures.trade_off(mean_over_layers(frame))
    assert len(means.data) == 2
    assert list(means.data[0].text) == ["10 %", "25 %", "50 %", "100 %"]


def test_figures_leave_colours_of_page_and_text_to_the_theme(groups: TensorGroups) -> None:
    frame = mean_over_layers(both_origins(interference_over_rank, groups, SHARES))
    for figure in (
        interference_figures.trade_off(frame, "A long question " * 6),
        interference_figures.curves_over_rank(frame, "interference"),
        spectra_figures.summary_map(spectral_summary(groups, "base"), "top_share"),
    ):
        assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
        assert figure.layout.font.color is None
    lines = interference_figures.trade_off(frame, "A long question " * 6).layout.title.text
    assert max(map(len, lines.split("<br>"))) <= 44


def test_share_axis_has_few_ticks_at_computed_shares() -> None:
    shares = np.geomspace(0.004, 1, 25)
    axis = style.share_axis(shares)
    assert len(axis["tickvals"]) == 6
    assert set(axis["tickvals"]) <= set(shares)
    assert axis["ticktext"][-1] == "100 %"
    assert style.share_axis([0.5])["ticktext"] == ["50 %"]


def test_conflict_bars_draw_both_shares_of_each_matrix() -> None:
    frame = pd.DataFrame(
        {"parameter": ["blocks.0.a.weight", "blocks.1.a.weight"], "conflict": [0.25, 0.5],
         "opposed": [0.75, 1.0], "entries": [8, 8]}
    )  # fmt: skip
    figure = interference_figures.conflict_bars(frame)
    assert [list(bar.y) for bar in figure.data] == [["0 a", "1 a"]] * 2
    assert np.concatenate([bar.x for bar in figure.data]).tolist() == [25, 50, 75, 100]
