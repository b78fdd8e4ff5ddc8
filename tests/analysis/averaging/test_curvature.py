"""The predicted gap where it is exact, and second derivatives against central differences."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from analysis.averaging.curvature import WRITTEN_OUT, gap_summary, predicted_gap, second_derivative
from analysis.averaging.ensembles import rule_logits
from analysis.averaging.gaps import sample_indices
from analysis.networks.pool_network import pool_network
from analysis.outputs.pool_outputs import PoolEvaluator
from merge_core.errors import Cancelled
from merge_core.progress import Progress
from tests.pools import ARCHITECTURES, CLASSES, IMAGES, write_pool

MEMBERS = (0, 1, 2)
FAMILIES: dict[str, dict[str, Any]] = {
    **ARCHITECTURES,
    "vit_avg": {
        **ARCHITECTURES["vit"],
        "args": {**ARCHITECTURES["vit"]["args"], "global_pool": "avg", "drop_rate": 0.5},
    },
    "densenet": {"name": "densenet121", "args": {"block_config": [1, 1], "growth_rate": 4}},
    "convnext": {
        "name": "convnext_atto",
        "args": {"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [4, 4, 6, 8]},
    },
}


def activate_always(number: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hidden units that no image switches off: the network is linear in x, bilinear in θ."""
    return {name: value + 9 if name == "hidden.0.bias" else value for name, value in state.items()}


@pytest.fixture(scope="module")
def bilinear(tmp_path_factory: pytest.TempPathFactory) -> PoolEvaluator:
    spec = {"name": "mlp", "args": {"img_size": 12, "widths": [6]}}
    folder = tmp_path_factory.mktemp("bilinear")
    return PoolEvaluator(write_pool(folder / "p", spec, members=4, change=activate_always))


def test_the_prediction_is_exact_for_two_linear_layers(bilinear: PoolEvaluator) -> None:
    members = (0, 1, 2, 3)
    assert min(float(bilinear.member(m, "test").features.min()) for m in members) > 0
    frame = predicted_gap(bilinear, members, "test")
    assert len(frame) == IMAGES["test"] * CLASSES
    assert float(frame["measured"].abs().max()) > 0.5
    assert frame["predicted"].to_numpy() == pytest.approx(frame["measured"].to_numpy(), abs=2e-5)
    row = gap_summary(frame).iloc[0]
    assert row["correlation"] == pytest.approx(1)
    assert row["slope"] == pytest.approx(1, abs=1e-5)
    assert row["relative_error"] < 1e-4


def test_two_linear_layers_by_hand(bilinear: PoolEvaluator) -> None:
    """The gap is −mean of (W_i − W̄)((V_i − V̄) x + (a_i − ā))."""
    states = [{k: v.double() for k, v in bilinear.weights(m).items()} for m in MEMBERS]
    mean = {name: sum(s[name] for s in states) / 3 for name in states[0]}
    x = bilinear.images("val").double().flatten(1)
    total = torch.zeros(len(x), CLASSES, dtype=torch.float64)
    for state in states:
        d = {name: state[name] - mean[name] for name in mean}
        total += (x @ d["hidden.0.weight"].T + d["hidden.0.bias"]) @ d["head.weight"].T
    frame = predicted_gap(bilinear, MEMBERS, "val")
    assert frame["predicted"].to_numpy() == pytest.approx((-total / 3).flatten().numpy(), abs=1e-5)
    # In float64 the prediction is the gap itself.
    steps = [{name: state[name] - mean[name] for name in mean} for state in states]
    images = bilinear.images("val").double()
    curved = sum(second_derivative(bilinear.network.module, mean, step, images) for step in steps)
    logits = [bilinear.run(state, "val", torch.float64).logits for state in (mean, *states)]
    gap = logits[0] - sum(logits[1:]) / 3
    assert torch.allclose(-curved / 6, gap, atol=1e-10)


def test_a_linear_model_has_no_gap(tmp_path: Path) -> None:
    frame = predicted_gap(PoolEvaluator(write_pool(tmp_path / "p", "linear")), MEMBERS)
    assert float(frame["predicted"].abs().max()) < 1e-5
    assert float(frame["measured"].abs().max()) < 1e-5


@pytest.mark.parametrize("family", list(FAMILIES))
def test_second_derivatives_are_central_differences(tmp_path: Path, family: str) -> None:
    pool = write_pool(tmp_path / "p", FAMILIES[family], members=2)
    evaluator = PoolEvaluator(pool)
    centre, other = (
        {n: v.double() for n, v in evaluator.weights(m).items() if v.is_floating_point()}
        for m in (0, 1)
    )
    step = {name: other[name] - value for name, value in centre.items()}
    images = evaluator.images("test")[:5].double()
    module = pool_network(pool).module.double()

    def along(t: float) -> Tensor:
        state = {name: value + t * step[name] for name, value in centre.items()}
        return torch.func.functional_call(module, state, (images,))

    mine = second_derivative(evaluator.network.module, centre, step, images)
    h = 1e-5  # small: a rectifier that switches in between would spoil the difference
    differences = (along(h) - 2 * along(0.0) + along(-h)) / h**2
    size = float(differences.abs().max())
    assert mine.numpy() == pytest.approx(differences.numpy(), abs=1e-4 * size + 1e-4)
    if family != "linear":
        assert size > 0.1


def test_normalisation_written_out_is_torchs() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 4, 4, generator=g, dtype=torch.float64)
    mean, weight, bias = (torch.randn(3, generator=g, dtype=torch.float64) for _ in range(3))
    batch = (x, mean, mean.exp(), weight, bias)
    layer = (x.transpose(1, 3), (4, 3), *torch.randn(2, 4, 3, generator=g, dtype=torch.float64))
    for function, arguments in ((functional.batch_norm, batch), (functional.layer_norm, layer)):
        expected = function(*arguments, eps=0.3)
        assert torch.allclose(WRITTEN_OUT[function](*arguments, eps=0.3), expected, atol=1e-12)
        bare = arguments[: 3 if function is functional.batch_norm else 2]
        assert torch.allclose(WRITTEN_OUT[function](*bare), function(*bare), atol=1e-12)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_near_a_common_start_the_prediction_holds(tmp_path: Path, family: str) -> None:
    evaluator = PoolEvaluator(write_pool(tmp_path / "p", family, spread=0.03))
    row = gap_summary(predicted_gap(evaluator, MEMBERS)).iloc[0]
    assert row["rms_measured"] > 1e-5
    if family == "vit":  # smooth
        assert row["correlation"] > 0.98
        assert row["slope"] == pytest.approx(1, abs=0.15)
    else:  # rectifiers switch, which the second derivative does not see
        assert row["correlation"] > 0.3


def test_the_measured_gap_is_that_of_the_images_named(tmp_path: Path) -> None:
    evaluator = PoolEvaluator(write_pool(tmp_path / "p", "resnet"))
    frame = predicted_gap(evaluator, MEMBERS, "test", limit=6)
    places = sample_indices(IMAGES["test"], 6)
    soup = rule_logits(evaluator, MEMBERS, "uniform_soup", "test")
    whole = rule_logits(evaluator, MEMBERS, "logit_ensemble", "test")
    assert frame["image"].tolist() == places.repeat_interleave(CLASSES).tolist()
    expected = (soup - whole)[places].flatten().numpy()
    assert frame["measured"].to_numpy() == pytest.approx(expected)
    assert list(frame) == ["image", "class", "measured", "predicted"]


def test_the_network_stays_as_it_is(tmp_path: Path) -> None:
    evaluator = PoolEvaluator(write_pool(tmp_path / "p", "vit"))
    before = evaluator.run(evaluator.weights(0), "test").logits
    fused = evaluator.network.module.blocks[0].attn.fused_attn
    predicted_gap(evaluator, MEMBERS, limit=3)
    assert evaluator.network.module.blocks[0].attn.fused_attn == fused
    assert next(evaluator.network.module.parameters()).dtype == torch.float32
    assert torch.equal(evaluator.run(evaluator.weights(0), "test").logits, before)


def test_batches_do_not_matter(bilinear: PoolEvaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = predicted_gap(bilinear, MEMBERS)
    monkeypatch.setattr("analysis.averaging.curvature.BATCH", 7)
    assert predicted_gap(bilinear, MEMBERS)["predicted"].to_numpy() == pytest.approx(
        whole["predicted"].to_numpy(), abs=1e-5
    )


def test_summary_of_known_numbers() -> None:
    frame = pd.DataFrame({"measured": [2.0, 4.0, np.nan, -6.0], "predicted": [1.0, 2.0, 5.0, -3.0]})
    row = gap_summary(frame).iloc[0]
    assert row.to_dict() == pytest.approx(
        {
            "correlation": 1.0,
            "slope": 2.0,
            "relative_error": 0.5,
            "rms_measured": (56 / 3) ** 0.5,
            "rms_predicted": (14 / 3) ** 0.5,
            "rows": 3,
        }
    )


@pytest.mark.parametrize("values", [[], [np.nan], [0.0, 0.0]])
def test_a_summary_of_nothing_has_no_numbers(values: list[float]) -> None:
    row = gap_summary(pd.DataFrame({"measured": values, "predicted": values})).iloc[0]
    assert np.isnan(row[["correlation", "slope", "relative_error"]].to_numpy(float)).all()


def test_progress_and_cancellation(bilinear: PoolEvaluator) -> None:
    seen: list[tuple[int, int, str]] = []
    predicted_gap(bilinear, MEMBERS, progress=Progress(lambda *step: seen.append(step)))
    assert [(done, total) for done, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        predicted_gap(bilinear, MEMBERS, progress=Progress(cancel=cancel))
