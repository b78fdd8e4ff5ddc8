"""What figures of templates and of deeper networks draw: the data's own numbers and pixels."""

from __future__ import annotations

import base64
import io
import itertools

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from PIL import Image

from analysis.figures.pictures import patterns as deep
from analysis.figures.pictures import templates as flat
from analysis.patterns.filters import (
    Components,
    filter_components,
    head_spectrum,
    kernel_norms,
    position_similarity,
    query_key,
)
from analysis.patterns.images import normalise
from analysis.patterns.templates import cosine_frame

NAMES = ["zero", "one", "two", "three", "four", "five", "a very long name"]
LAYER = "blocks.0.attn.qkv.weight"


def pictures(count: int = 7, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, 4, 4, channels))


def decode(trace: go.Image) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(trace.source.split(",")[1]))))


def pixels(figure: go.Figure, x: float, y: float) -> np.ndarray | None:
    """The pixel drawn at a place of the figure's axes; None outside all images."""
    for trace in figure.data:
        image, top = decode(trace), trace.y0 or 0
        if 0 <= round(y - top) < image.shape[0] and 0 <= round(x) < image.shape[1]:
            return image[round(y - top), round(x)]
    return None


def plain_text(figure: go.Figure) -> str:
    return figure.layout.title.text.replace("<br>", " ")


def test_template_grid_puts_every_image_under_its_name() -> None:
    rows = {"template": pictures(), "class mean minus overall mean": pictures()[::-1]}
    figure = flat.template_grid(rows, NAMES, title="Templates", columns=3)
    assert len(figure.data) == 3
    assert all(trace.hoverinfo == "skip" for trace in figure.data)
    labels = {a.text: a for a in figure.layout.annotations}
    assert list(labels) == [*NAMES[:6], "a very lo…"]
    ticks = iter(figure.layout.yaxis.tickvals)
    assert len(figure.layout.yaxis.tickvals) == 6
    tile = decode(figure.data[0]).shape[1] // 3
    for block in range(3):
        for images in rows.values():
            y = next(ticks)
            for place in range(3 * block, min(3 * block + 3, 7)):
                x = list(labels.values())[place].x
                # The pixel right and below of the middle is [2, 2] of 4 x 4.
                level = normalise(images)[place, 2, 2, 0]
                found = pixels(figure, x + tile / 16, y + tile / 16)
                assert found is not None
                assert found[0] == pytest.approx(255 * level, abs=0.51)
                assert list(labels.values())[place].y < y
    assert list(figure.layout.yaxis.ticktext[:2]) == [
        "template",
        "class mean<br>minus overall<br>mean",
    ]
    # All is inside the axes: the first picture's label above, the last one's rows below.
    low, high = figure.layout.yaxis.range
    assert high < 0 < max(figure.layout.yaxis.tickvals) < low
    assert figure.layout.yaxis.scaleanchor == "x"


@pytest.mark.parametrize(
    ("kind", "shared", "said"),
    [
        ("symmetric", False, "grey is zero, each on its own scale"),
        ("joint", True, "min-max, one scale"),
    ],
)
def test_titles_say_how_greys_are_to_be_read(kind, shared: bool, said: str) -> None:
    figure = flat.template_grid({"t": pictures()}, NAMES, "What?", kind, shared)
    assert plain_text(figure).startswith("What? (")
    assert said in plain_text(figure)


def test_blend_strip_draws_parents_blend_and_difference_on_one_scale() -> None:
    A, B = pictures(2, 3)
    figure = flat.blend_strip(A, B, 0.25, ("zero", "one"), "Blend")
    expected = np.stack([A, B, 0.25 * A + 0.75 * B, A - B])
    expected = 0.5 + expected / np.abs(expected).max() / 2
    image = decode(figure.data[0])
    tile = image.shape[0]
    for annotation, wanted in zip(figure.layout.annotations, expected, strict=True):
        left = round(annotation.x - (tile - 1) / 2)
        shown = image[tile // 8 :: tile // 4, left + tile // 8 : left + tile : tile // 4, :3]
        assert np.abs(shown[:4, :4] / 255 - wanted).max() < 0.003
    texts = [a.text for a in figure.layout.annotations]
    assert texts == ["zero", "one", "λ = 0.25", "first − second"]


def test_cosine_map_is_the_frame() -> None:
    A, B = pictures(7), pictures(7)[::-1]
    frame = cosine_frame(A, B, NAMES)
    figure = flat.cosine_map(frame, "Which?")
    trace = figure.data[0]
    table = frame.pivot_table(index="first", columns="second", values="cosine", sort=False)
    assert np.array_equal(trace.z, table[list(trace.x)].loc[list(trace.y)].to_numpy())
    assert (trace.zmin, trace.zmax) == (-1, 1)
    assert figure.layout.yaxis.autorange == "reversed"


def measured_frame(epochs: tuple[float, ...] = (5.0,)) -> pd.DataFrame:
    """Two seeds, three decays: a diagonal that says where it belongs."""
    rows = []
    for (member, (decay, seed)), epoch in itertools.product(
        enumerate(itertools.product((0.1, 0.0, 0.01), (0, 1))), epochs
    ):
        for k, comparison in enumerate(["means", "centred_means"] + ["stationary"] * (decay > 0)):
            rows.append(
                {
                    "member": member,
                    "seed": seed,
                    "weight_decay": decay,
                    "epoch": epoch,
                    "comparison": comparison,
                    "diagonal": decay + 0.1 * seed + k + epoch,
                    "test_accuracy": 0.5 + decay + 0.1 * seed,
                }
            )
    return pd.DataFrame(rows)


def lines(figure: go.Figure) -> list[go.Scatter]:
    return [trace for trace in figure.data if "lines+markers" in trace.mode]


def test_lines_over_decay_are_means_over_seeds() -> None:
    figure = flat.dominance_lines(measured_frame(), "weight_decay", "diagonal", "Decay")
    means, centred, stationary = lines(figure)
    assert list(means.x) == ["0", "0.01", "0.1"]
    assert list(stationary.x) == ["0.01", "0.1"]
    for k, line in ((0, means), (1, centred), (2, stationary)):
        assert line.y == pytest.approx([float(x) + 0.05 + k + 5 for x in line.x])
        assert line.customdata[:, 1] - line.customdata[:, 0] == pytest.approx(0.1)
    bands = [t for t in figure.data if t.fill == "tonexty"]
    assert len(bands) == 3
    assert bands[0].y == pytest.approx(means.y + 0.05)
    assert "μ<sub>c</sub> − μ" in centred.name
    assert figure.layout.xaxis.type == "category"


def test_accuracy_is_drawn_once_in_percent() -> None:
    (line,) = lines(flat.dominance_lines(measured_frame(), "weight_decay", "test_accuracy"))
    assert line.y == pytest.approx([55, 56, 65])
    assert line.customdata[:, 2].tolist() == [2, 2, 2]


def test_lines_over_training_are_one_for_each_decay() -> None:
    frame = measured_frame((0.0, 2.0, 7.0))
    figure = flat.dominance_lines(frame, "epoch", "diagonal", comparison="means")
    found = {line.name: line for line in lines(figure)}
    assert list(found) == ["decay 0", "decay 0.01", "decay 0.1"]
    assert list(found["decay 0.1"].x) == [0, 2, 7]
    assert found["decay 0.1"].y == pytest.approx(np.array([0, 2, 7]) + 0.15)
    assert "class means" in figure.layout.yaxis.title.text
    for line in lines(flat.dominance_lines(frame, "epoch", "test_accuracy")):
        assert line.customdata[:, 2].tolist() == [2, 2, 2]


def test_one_member_has_no_band_and_an_unknown_decay_a_name() -> None:
    alone = measured_frame().query("seed == 0").assign(weight_decay=float("nan"))
    figure = flat.dominance_lines(alone.head(2), "weight_decay", "diagonal")
    assert len(figure.data) == 2
    assert list(figure.data[0].x) == ["not given"]


def test_responses_are_drawn_as_they_are() -> None:
    frame = pd.DataFrame(
        {
            "lam": [0, 0, 0, 1, 1, 1],
            "images": ["a", "b", "others"] * 2,
            "logit": [1.0, 2, 3, 4, 5, 6],
            "share_as_a": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
        }
    )
    for value, scale in (("logit", 1), ("share_as_a", 100)):
        figure = flat.response_lines(frame, value, ("cat", "dog"), "Who?")
        assert [t.name for t in figure.data] == [
            "images of cat",
            "images of dog",
            "all other images",
        ]
        for trace, key in zip(figure.data, ("a", "b", "others"), strict=True):
            assert trace.y == pytest.approx(frame[frame["images"] == key][value] * scale)
    models = pd.DataFrame(
        {
            "lam": [0.0, 1.0],
            "accuracy": [0.5, 0.6],
            "class_accuracy": [0.7, 0.8],
            "logit": [1.0, 2.0],
            "logit_others": [3.0, 4.0],
        }
    )
    accuracy = flat.model_response_lines(models, "accuracy", "cat", ("one", "two"))
    assert [list(t.y) for t in accuracy.data] == [[50, 60], [70, 80]]
    logit = flat.model_response_lines(models, "logit", "cat", ("one", "two"))
    assert [list(t.y) for t in logit.data] == [[1, 2], [3, 4]]
    assert "1: one alone" in logit.layout.xaxis.title.text


def test_kernel_grid_shows_the_first_ones_and_says_so() -> None:
    filters = pictures(20, 3)
    figure = deep.kernel_grid(filters, "Kernels", columns=4, most=8)
    assert "[first 8 of 20]" in plain_text(figure)
    assert "grey is zero" in plain_text(figure)
    image = decode(figure.data[0])
    assert image.shape[1] / image.shape[0] == pytest.approx(2, abs=0.05)
    assert image[0, 0, :3] / 255 == pytest.approx(normalise(filters)[0, 0, 0], abs=0.003)
    assert "first" not in plain_text(deep.kernel_grid(filters[:3], "Kernels"))


def test_components_carry_the_share_they_explain() -> None:
    found = filter_components(pictures(30, 3))
    figure = deep.components_grid(found, "Components", columns=4, most=10)
    assert len(figure.data) == 3
    texts = [a.text for a in figure.layout.annotations]
    shares = [float(t.removesuffix(" %")) / 100 for t in texts]
    assert shares == pytest.approx(found.explained[:10], rel=0.01)
    few = deep.components_grid(Components(found.filters[:2], found.explained[:2]))
    assert len(few.layout.annotations) == 2


def test_kernel_norms_fall_along_each_row() -> None:
    state = {f"layer{i}.{'long' * 5}.conv.weight": torch.randn(9, 2, 3, 3) for i in (1, 2)}
    frame = kernel_norms(state)
    (trace,) = (figure := deep.kernel_norm_map(frame, "Norms")).data
    assert trace.zmin == 0
    assert trace.zmax == pytest.approx(frame["rms"].max())
    for row, (_, part) in zip(trace.z, frame.groupby("layer"), strict=True):
        assert (np.diff(row) <= 0).all()
        assert (row[0], row[-1]) == pytest.approx((part["rms"].max(), part["rms"].min()))
    assert all(len(text) <= 18 for text in figure.layout.yaxis.ticktext)
    assert list(figure.layout.yaxis.tickvals) == list(trace.y)


@pytest.mark.parametrize("g", [3, 14, 24])
def test_positions_stand_where_they_are(g: int) -> None:
    table = torch.randn(1 + g * g, 4, generator=torch.Generator().manual_seed(0))
    S = position_similarity(table)
    figure = deep.position_grid(S, "Positions")
    (trace,) = figure.data
    assert max(trace.z.shape) <= 256
    assert (trace.zmin, trace.zmax) == (-1, 1)
    # Ticks stand at the middle of the maps of the patches that they number from 1.
    for x, column in zip(figure.layout.xaxis.tickvals, figure.layout.xaxis.ticktext, strict=True):
        for y, row in zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext, strict=True):
            left, top = round(x - (g - 1) / 2), round(y - (g - 1) / 2)
            shown = trace.z[top : top + g, left : left + g]
            assert shown == pytest.approx(S[int(row) - 1, int(column) - 1], abs=1e-6)


@pytest.mark.parametrize(("heads", "width"), [(1, 8), (3, 12), (12, 144), (1, 300)])
def test_heads_share_one_symmetric_scale(heads: int, width: int) -> None:
    state = {LAYER: torch.randn(3 * width, width, generator=torch.Generator().manual_seed(1))}
    forms = query_key(state, LAYER, heads)
    figure = deep.head_maps(forms, "Heads")
    (trace,) = figure.data
    assert max(trace.z.shape) <= 256
    assert trace.zmin == -trace.zmax
    assert f"±{trace.zmax:.2g}" in trace.colorbar.title.text
    assert ("means of blocks" in plain_text(figure)) == (width in (144, 300))
    assert [a.text for a in figure.layout.annotations] == [f"head {h}" for h in range(heads)]
    cells = int(np.isfinite(trace.z).sum() / heads) ** 0.5
    assert cells == int(cells) <= 128
    for annotation, form in zip(figure.layout.annotations, forms, strict=True):
        left, top = round(annotation.x - (cells - 1) / 2), round(annotation.y + 0.5)
        shown = trace.z[top : top + int(cells), left : left + int(cells)]
        assert np.isfinite(shown).all()
        if cells == width:
            assert shown == pytest.approx(form, abs=1e-5)


def test_spectra_of_heads_are_drawn_with_their_symmetry() -> None:
    state = {LAYER: torch.randn(36, 12, generator=torch.Generator().manual_seed(2))}
    frame = head_spectrum(state, LAYER, 3)
    figure = deep.head_spectrum(frame, "Spectra")
    assert figure.layout.yaxis.type == "log"
    for trace, (head, part) in zip(figure.data, frame.groupby("head"), strict=True):
        assert list(trace.y) == pytest.approx(list(part["sigma"]))
        share = 100 * part["symmetric_share"].iloc[0]
        assert trace.name == f"{head}: {share:.0f} % symmetric"


def test_all_figures_are_transparent_and_fit_a_phone() -> None:
    state = {LAYER: torch.randn(36, 12), "a.weight": torch.randn(4, 4, 3, 3)}
    frame = head_spectrum(state, LAYER, 3)
    for figure in (
        flat.template_grid({"t": pictures()}, NAMES, "A rather long question about templates"),
        flat.cosine_map(cosine_frame(pictures(), pictures(), NAMES), "Cosines"),
        flat.dominance_lines(measured_frame(), "weight_decay", "diagonal", "Decay"),
        deep.kernel_norm_map(kernel_norms(state), "Norms"),
        deep.head_maps(query_key(state, LAYER, 3), "Heads"),
        deep.head_spectrum(frame, "Spectra"),
    ):
        assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
        assert all(len(line) <= 44 for line in figure.layout.title.text.split("<br>"))
        assert figure.layout.width is None
        assert len(figure.to_json()) < 300_000
