"""Scaled models against networks that are built, loaded, scaled and run in float64 here."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from torch import Tensor

from analysis.magnitude import sweep
from analysis.magnitude.calibration import MEASURES, measures
from analysis.magnitude.homogeneity import layer_names, scaled_names
from analysis.magnitude.sweep import (
    SUBJECTS,
    choose_scaled,
    magnitude_sweep,
    predicted_sweep,
    scaled_state,
)
from analysis.networks.build import build_network
from analysis.outputs.pool_outputs import PoolEvaluator
from merge_core.errors import Cancelled, PoolError
from merge_core.progress import Progress
from tests.pools import ARCHITECTURES, write_pool

M = [1e-3, 0.1, 1.0, 10.0, 1e3]
KINDS = ("linear", "mlp", "vgg", "resnet", "vit")


@pytest.fixture(scope="module")
def pools(tmp_path_factory) -> dict[str, PoolEvaluator]:
    folder = tmp_path_factory.mktemp("pools")
    return {kind: PoolEvaluator(write_pool(folder / kind, kind)) for kind in KINDS}


def forward(evaluator: PoolEvaluator, state: dict[str, Tensor]) -> np.ndarray:
    """The network itself, loaded and run in float64, without the evaluator's ways."""
    network = build_network(evaluator.pool.spec.architecture, Path("x"), PoolError).double()
    network.load_state_dict(state)
    with torch.no_grad():
        return network(evaluator.images("test").double()).numpy()


def is_scaled(name: str, value: Tensor, what: str) -> bool:
    """By names alone: nothing else in these networks is a buffer."""
    if what == "weights":
        return value.ndim >= 2
    if what == "parameters":
        return "running_" not in name and "num_batches" not in name
    return "num_batches" not in name


def members_at(evaluator, m: float, what: str, scaled: tuple[int, ...]) -> list[dict]:
    states = []
    for i in range(3):
        state = {n: v.double() if v.is_floating_point() else v for n, v in
                 evaluator.weights(i).items()}  # fmt: skip
        if i in scaled:
            state = {n: v * m if is_scaled(n, v, what) else v for n, v in state.items()}
        states.append(state)
    return states


def mean_state(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: torch.stack([state[name] for state in states]).mean(dim=0)
        if states[0][name].is_floating_point()
        else states[0][name]
        for name in states[0]
    }


def restore_norms(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    soup = mean_state(states)
    for name, value in soup.items():
        if is_scaled(name, value, "parameters"):
            target = np.mean([float(state[name].norm()) for state in states])
            soup[name] = value * target / float(value.norm())
    return soup


def row(frame: pd.DataFrame, m: float, subject: str) -> pd.Series:
    return frame[(frame["magnitude"] == m) & (frame["subject"] == subject)].iloc[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("who", "what", "scaled"),
    [
        ("all", "parameters", (0, 1, 2)),
        ("all", "weights", (0, 1, 2)),
        ("all_but_last", "state", (0, 1)),
        ("first", "weights", (0,)),
        ("last", "parameters", (2,)),
    ],
)
def test_sweep_is_what_scaled_networks_give(pools, kind, who, what, scaled) -> None:
    evaluator = pools[kind]
    labels = evaluator.labels("test")
    frame = magnitude_sweep(evaluator, (0, 1, 2), M[::2], who, what)
    start = members_at(evaluator, 1.0, what, scaled)
    own = [forward(evaluator, state).argmax(axis=1) for state in start]
    for m in M[::2]:
        states = members_at(evaluator, m, what, scaled)
        logits = [forward(evaluator, state) for state in states]
        right = [np.mean(logits[i].argmax(axis=1) == labels) for i in scaled]
        same = [np.mean(logits[i].argmax(axis=1) == own[i]) for i in scaled]
        individuals = row(frame, m, "individuals")
        # One of fifty images may tie within rounding.
        assert individuals["accuracy"] == pytest.approx(np.mean(right), abs=0.021)
        assert individuals["stability"] == pytest.approx(np.mean(same), abs=0.021)
        expected = {
            "uniform_soup": forward(evaluator, mean_state(states)),
            "logit_ensemble": np.mean(logits, axis=0),
        }
        if who == "all":
            expected["norm_restored"] = forward(evaluator, restore_norms(states))
        for subject, z in expected.items():
            p = softmax(z, axis=1)
            found = row(frame, m, subject)
            assert found["accuracy"] == pytest.approx(np.mean(p.argmax(1) == labels), abs=0.021)
            assert found["confidence"] == pytest.approx(p.max(axis=1).mean(), rel=2e-3)
            norm = np.linalg.norm(z, axis=1).mean()
            assert found["logit_norm"] == pytest.approx(norm, rel=2e-3)
            assert found["log10_logit_norm"] == pytest.approx(np.log10(norm), abs=1e-3)
        mixed = np.mean([softmax(z, axis=1) for z in logits], axis=0)
        found = row(frame, m, "probability_ensemble")
        assert found["confidence"] == pytest.approx(mixed.max(axis=1).mean(), rel=2e-3)
        assert np.isnan(found["logit_norm"])
    assert frame["non_finite"].max() == 0
    wanted = set(SUBJECTS) - (set() if who == "all" else {"norm_restored"})
    assert set(frame["subject"]) == wanted
    assert list(frame) == ["magnitude", "subject", *MEASURES, "arithmetic"]


@pytest.mark.parametrize("kind", KINDS)
def test_at_one_nothing_has_changed(pools, kind: str) -> None:
    evaluator = pools[kind]
    labels = evaluator.labels("test")
    frame = magnitude_sweep(evaluator, (0, 1, 2), [1.0], "all", "state")
    assert frame["stability"].tolist() == [1.0] * 5
    members = [evaluator.member(i, "test").logits for i in range(3)]
    accuracy = np.mean([np.mean(z.argmax(dim=1).numpy() == labels) for z in members])
    assert row(frame, 1.0, "individuals")["accuracy"] == pytest.approx(accuracy)
    ensemble = torch.stack(members).mean(dim=0).argmax(dim=1).numpy()
    assert row(frame, 1.0, "logit_ensemble")["accuracy"] == np.mean(ensemble == labels)


def test_without_biases_nothing_moves_but_the_logits(pools) -> None:
    magnitudes = np.logspace(-3, 3, 13)
    frame = magnitude_sweep(pools["mlp"], (0, 1, 2), magnitudes)
    for subject in set(SUBJECTS) - {"probability_ensemble"}:
        part = frame[frame["subject"] == subject]
        assert part["stability"].tolist() == [1.0] * 13
        assert np.ptp(part["accuracy"]) == 0
        slope = np.polyfit(np.log10(magnitudes), part["log10_logit_norm"], 1)[0]
        assert slope == pytest.approx(3, abs=1e-9)
    assert set(frame["arithmetic"]) == {"exact"}
    # Nothing was run for it but the two soups.
    fresh = PoolEvaluator(pools["mlp"].pool)
    magnitude_sweep(fresh, (0, 1, 2), magnitudes)
    assert fresh.forward_images == 2 * 50


def test_the_probability_ensemble_of_tiny_logits_is_the_logit_ensemble(pools) -> None:
    # Logits of 1e-18: every probability is 1/4 in float64, yet the order is known.
    frame = magnitude_sweep(pools["mlp"], (0, 1, 2), [1e-6])
    soft, hard = (row(frame, 1e-6, f"{kind}_ensemble") for kind in ("probability", "logit"))
    assert soft["accuracy"] == hard["accuracy"]
    assert soft["entropy_relative"] == pytest.approx(1)


def test_overflow_of_float32_is_seen_and_float64_takes_over(pools) -> None:
    evaluator = pools["vgg"]
    state = evaluator.weights(0)
    module = evaluator.network.module
    scaled = scaled_state(state, 1e8, "parameters", module)
    labels = evaluator.labels("test")
    single = evaluator.run(scaled, "test", torch.float32).logits
    assert measures(labels, logits=single)["non_finite"] > 0.9
    assert measures(labels, logits=single)["accuracy"] < 0.1
    frame = magnitude_sweep(evaluator, (0, 1, 2), [1e8])
    assert frame["non_finite"].max() == 0
    assert set(frame["arithmetic"]) == {"float64"}
    # Six layers: beyond float64 too.
    lost = magnitude_sweep(evaluator, (0, 1, 2), [1e60])
    assert lost["non_finite"].tolist() == [1.0] * 5
    assert lost["accuracy"].tolist() == lost["stability"].tolist() == [0.0] * 5
    assert lost["confidence"].isna().all()


def test_float64_takes_over_where_float32_is_finite_but_wrong(pools) -> None:
    # The square of 1e24 overflows inside a layer norm, which then gives zeros.
    evaluator = pools["vit"]
    state = scaled_state(evaluator.weights(0), 1e12, "weights", evaluator.network.module)
    exact = forward(evaluator, state)
    single = evaluator.run(state, "test").logits
    assert bool(single.isfinite().all())
    assert np.linalg.norm(single.numpy() - exact) > 0.1 * np.linalg.norm(exact)
    frame = magnitude_sweep(evaluator, (0,), [1e12], what="weights")
    found = row(frame, 1e12, "individuals")
    assert found["arithmetic"] == "float64"
    norm = np.linalg.norm(exact, axis=1).mean()
    assert found["logit_norm"] == pytest.approx(norm, rel=1e-3)


def test_images_that_float32_loses_are_run_again(pools, monkeypatch) -> None:
    # A probe that always trusts float32.
    monkeypatch.setattr(sweep._Scaling, "_needs_double", lambda self, m: False)
    frame = magnitude_sweep(pools["vgg"], (0, 1, 2), [1e8])
    assert frame["non_finite"].max() == 0


def test_dropout_has_no_say(tmp_path: Path, pools) -> None:
    args = ARCHITECTURES["vit"]["args"] | {"drop_rate": 0.5, "attn_drop_rate": 0.5}
    dropping = write_pool(tmp_path / "p", {**ARCHITECTURES["vit"], "args": args})
    frames = [
        magnitude_sweep(evaluator, (0, 1, 2), [0.5, 2.0])
        for evaluator in (PoolEvaluator(dropping), pools["vit"])
    ]
    pd.testing.assert_frame_equal(*frames)


def test_a_scaled_member_takes_over_the_ensemble(pools) -> None:
    evaluator = pools["mlp"]
    own = evaluator.member(0, "test").logits.argmax(dim=1).numpy()
    start = torch.stack([evaluator.member(i, "test").logits for i in range(3)]).mean(dim=0)
    frame = magnitude_sweep(evaluator, (0, 1, 2), [1e4], who="first")
    ensemble = row(frame, 1e4, "logit_ensemble")
    assert ensemble["accuracy"] == np.mean(own == evaluator.labels("test"))
    assert ensemble["stability"] == np.mean(own == start.argmax(dim=1).numpy()) < 1


@settings(max_examples=10)
@given(st.floats(1e-2, 1e2), st.integers(0, 2))
def test_a_soup_of_scaled_members_is_a_mean_of_weights(pools, m: float, who: int) -> None:
    # With one affine layer the soup's logits are the mean of the scaled members' logits.
    evaluator = pools["linear"]
    frame = magnitude_sweep(evaluator, (0, 1, 2), [m], ("all", "first", "all_but_last")[who])
    soup, ensemble = (row(frame, m, name) for name in ("uniform_soup", "logit_ensemble"))
    for name in ("confidence", "entropy", "logit_norm"):
        assert soup[name] == pytest.approx(ensemble[name], rel=1e-4)


def test_reestimated_statistics_undo_the_scale_of_a_kernel(pools) -> None:
    evaluator = pools["resnet"]
    arguments = ((0, 1, 2), [1.0, 30.0], "all", "layer", "layer1.0.conv1")
    kept = magnitude_sweep(evaluator, *arguments, statistics="reestimate")
    soup = kept[kept["subject"] == "uniform_soup"]
    assert soup["logit_norm"].iloc[1] == pytest.approx(soup["logit_norm"].iloc[0], rel=1e-3)
    moved = magnitude_sweep(evaluator, *arguments)
    soup = moved[moved["subject"] == "uniform_soup"]
    assert soup["logit_norm"].iloc[1] != pytest.approx(soup["logit_norm"].iloc[0], rel=1e-2)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
@pytest.mark.parametrize("what", ["weights", "parameters", "state"])
def test_what_is_scaled(pools, kind: str, what) -> None:
    evaluator = pools[kind]
    state, module = evaluator.weights(0), pools[kind].network.module
    scaled = scaled_state(state, 3.0, what, module)
    assert scaled.keys() == state.keys()
    for name, value in state.items():
        factor = 3 if is_scaled(name, value, what) else 1
        assert torch.allclose(scaled[name].double(), factor * value.double(), rtol=1e-12), name
    if kind == "resnet":
        assert ("bn1.running_var" in scaled_names(module, what)) == (what == "state")


def test_layers_are_named_and_found(pools) -> None:
    module = pools["vit"].network.module
    names = layer_names(module)
    assert {"pos_embed", "blocks.0.attn.qkv", "head"} <= set(names)
    found = frozenset().union(*(scaled_names(module, "layer", name) for name in names))
    assert found == scaled_names(module, "parameters")
    assert scaled_names(module, "layer", "blocks.1") == {
        name for name in found if name.startswith("blocks.1.")
    }
    with pytest.raises(PoolError, match="no layer 'block'"):
        scaled_names(module, "layer", "block")


def test_wrong_choices_are_named(pools) -> None:
    assert choose_scaled((4, 5, 6), "all_but_last") == (4, 5)
    assert choose_scaled((4, 5, 6), "last") == (6,)
    with pytest.raises(PoolError, match="No member would be scaled"):
        magnitude_sweep(pools["mlp"], (1,), [1.0], "all_but_last")
    for magnitudes in ([], [0.0], [1.0, float("inf")]):
        with pytest.raises(PoolError, match="positive"):
            magnitude_sweep(pools["mlp"], (0,), magnitudes)


def test_progress_counts_models_and_can_be_cancelled(pools) -> None:
    seen: list[tuple[int, int]] = []
    progress = Progress(lambda done, total, label: seen.append((done, total)))
    magnitude_sweep(pools["vgg"], (0, 1), [0.5, 1.0], progress=progress)
    assert seen == [(done, 12) for done in range(1, 13)]
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        magnitude_sweep(pools["vgg"], (0, 1), [0.5], progress=Progress(cancel=cancel))


def test_the_prediction_is_the_measurement_where_it_holds(pools) -> None:
    for kind, who in (("mlp", "all"), ("mlp", "first"), ("linear", "all")):
        measured = magnitude_sweep(pools[kind], (0, 1, 2), M, who)
        predicted = predicted_sweep(pools[kind], (0, 1, 2), M, who)
        assert list(predicted) == ["magnitude", "subject", *MEASURES, "law", "depth"]
        assert set(predicted["depth"]) == {3 if kind == "mlp" else 1}
        soups = {"uniform_soup", "norm_restored"}
        assert soups.isdisjoint(predicted["subject"]) == (who == "first")
        both = measured.merge(predicted, on=["magnitude", "subject"])
        assert len(both) == len(predicted)
        for name in ("accuracy", "stability", "entropy", "ece"):
            assert both[f"{name}_x"].to_numpy() == pytest.approx(both[f"{name}_y"].to_numpy())


def test_predictions_of_other_networks(pools) -> None:
    evaluator = pools["vit"]
    flat = predicted_sweep(evaluator, (0, 1, 2), M, what="weights")
    individuals = flat[flat["subject"] == "individuals"]
    assert np.ptp(individuals["accuracy"]) == 0
    assert np.diff(individuals["log10_logit_norm"]) == pytest.approx(10 * np.diff(np.log10(M)))
    # Far out, the limits are what is measured on a chain with biases.
    evaluator = pools["vgg"]
    for law, m in (("large", 1e4), ("small", 1e-4)):
        measured = magnitude_sweep(evaluator, (0, 1, 2), [m])
        predicted = predicted_sweep(evaluator, (0, 1, 2), [m], law=law)
        for subject in SUBJECTS:
            one, other = row(measured, m, subject), row(predicted, m, subject)
            assert one["accuracy"] == pytest.approx(other["accuracy"], abs=0.021)
            assert one["stability"] == pytest.approx(other["stability"], abs=0.021)
            assert one["confidence"] == pytest.approx(other["confidence"], rel=1e-2)
    with pytest.raises(PoolError, match="Choose a chain"):
        predicted_sweep(pools["resnet"], (0, 1, 2), [1.0], law="small")
