"""Powers of m against forward passes of networks whose weights were multiplied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from analysis.magnitude.homogeneity import (
    affine_depth,
    dominance,
    exact_degree,
    laws,
    power_law,
    scaled_names,
)
from analysis.networks.build import build_network
from analysis.outputs.pool_outputs import PoolEvaluator
from merge_core.errors import PoolError
from tests.pools import SIZE, write_pool

FREE_VGG = {"name": "vgg", "args": {"channels": [4, 6], "hidden": 8, "bias": False}}
BIASED_MLP = {"name": "mlp", "args": {"img_size": SIZE, "widths": [12, 8]}}
DEPTHS = {"linear": 1, "mlp": 3, "vgg": 6, "resnet": 10, "vit": 10}


@pytest.fixture(scope="module")
def pools(tmp_path_factory) -> dict[str, PoolEvaluator]:
    folder = tmp_path_factory.mktemp("pools")
    kinds = {name: name for name in DEPTHS} | {"free": FREE_VGG, "biased": BIASED_MLP}
    return {
        name: PoolEvaluator(write_pool(folder / name, kind, members=2))
        for name, kind in kinds.items()
    }


def forward(evaluator: PoolEvaluator, state: dict[str, Tensor]) -> Tensor:
    """The network itself, loaded and run in float64, without the evaluator's ways."""
    spec = evaluator.pool.spec.architecture
    network = build_network(spec, Path("x"), PoolError).double()
    network.load_state_dict(state)
    with torch.no_grad():
        return network(evaluator.images("test").double())


def times(state: dict[str, Tensor], m: float, names) -> dict[str, Tensor]:
    return {n: v.double() * (m if n in names else 1) for n, v in state.items()}


@pytest.mark.parametrize("kind", ["mlp", "free"])
@pytest.mark.parametrize("m", [1e-3, 0.05, 7.0, 1e3])
def test_without_biases_predictions_never_move(pools, kind: str, m: float) -> None:
    evaluator = pools[kind]
    L = 3 if kind == "mlp" else 6
    state = evaluator.weights(0)
    plain, scaled = forward(evaluator, state), forward(evaluator, times(state, m, state))
    assert exact_degree(evaluator, state) == L
    assert torch.equal(plain.argmax(dim=1), scaled.argmax(dim=1))
    assert torch.allclose(scaled, m**L * plain, rtol=1e-9, atol=0)
    law = power_law(evaluator, state, plain, state.keys(), "homogeneous", "test")
    assert law.degree == L
    assert torch.allclose(law.logits(m), scaled, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["vgg", "biased"])
@pytest.mark.parametrize("what", ["parameters", "weights"])
@pytest.mark.parametrize("m", [1e-3, 0.5, 20.0])
def test_with_biases_it_is_a_network_of_other_biases(pools, kind, what, m: float) -> None:
    evaluator = pools[kind]
    module = evaluator.network.module
    layers = [name for name, _ in module.affine_layers()]
    L, shift = len(layers), 1 if what == "parameters" else 0
    state = evaluator.weights(0)
    other = dict(times(state, 1, ()))
    for number, layer in enumerate(layers, start=1):
        other[f"{layer}.bias"] = other[f"{layer}.bias"] * m ** (shift - number)
    scaled = forward(evaluator, times(state, m, scaled_names(module, what)))
    expected = m**L * forward(evaluator, other)
    assert torch.allclose(scaled, expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max()))


def test_who_is_homogeneous(pools) -> None:
    degrees = {
        name: exact_degree(evaluator, scaled_names(evaluator.network.module, "parameters"))
        for name, evaluator in pools.items()
    }
    assert degrees == {
        "linear": 1, "mlp": 3, "free": 6, "vgg": None, "biased": None, "resnet": None, "vit": None
    }  # fmt: skip
    assert {name: affine_depth(pools[name]) for name in DEPTHS} == DEPTHS


@pytest.mark.parametrize(
    ("kind", "layer", "degree"),
    [
        ("biased", "head", 1),
        ("biased", "hidden.1", None),
        ("mlp", "hidden", 2),
        ("vgg", "stages.0", None),
        ("free", "stages.0", 2),
        ("resnet", "fc", 1),
        ("resnet", "layer4", None),
        ("vit", "head", 1),
        ("vit", "blocks.0", None),
    ],
)
def test_one_layer_is_a_power_where_the_network_says_so(pools, kind, layer, degree) -> None:
    evaluator = pools[kind]
    names = scaled_names(evaluator.network.module, "layer", layer)
    assert exact_degree(evaluator, names) == degree
    state = evaluator.weights(1)
    plain = forward(evaluator, state)
    scaled = forward(evaluator, {n: v * 3 if n in names else v for n, v in state.items()})
    power = torch.allclose(scaled, 3.0 ** (degree or 1) * plain, rtol=1e-5, atol=1e-5)
    assert power == (degree is not None)


def test_weights_of_a_biased_head_alone_are_no_power(pools) -> None:
    for kind in ("linear", "vit"):
        names = scaled_names(pools[kind].network.module, "weights")
        assert exact_degree(pools[kind], names) is None
        assert exact_degree(pools[kind], {"head.weight"}) is None


@pytest.mark.parametrize("kind", ["vgg", "biased"])
@pytest.mark.parametrize("what", ["parameters", "weights"])
def test_limits_are_approached(pools, kind: str, what) -> None:
    evaluator = pools[kind]
    names = scaled_names(evaluator.network.module, what)
    state = evaluator.weights(0)
    plain = forward(evaluator, state)
    assert laws(evaluator, names) == ("homogeneous", "large", "small")
    for law, values in (("large", (1e2, 1e4)), ("small", (1e-2, 1e-4))):
        limit = power_law(evaluator, state, plain, names, law, "test")
        errors = []
        for m in values:
            measured = forward(evaluator, times(state, m, names))
            errors.append(float((measured - limit.logits(m)).norm() / measured.norm()))
        assert errors[1] < 0.05 * errors[0]
        assert errors[1] < 2e-3
    # At m = 1 neither is the network.
    assert not torch.allclose(limit.logits(1), plain, rtol=0.1)


def test_limits_are_refused_where_they_do_not_hold(pools) -> None:
    for kind, what in (("mlp", "parameters"), ("vit", "weights"), ("resnet", "state")):
        evaluator = pools[kind]
        names = scaled_names(evaluator.network.module, what)
        assert laws(evaluator, names) == ("homogeneous",)
        state = evaluator.weights(0)
        with pytest.raises(PoolError, match="Choose a chain with biases"):
            power_law(evaluator, state, torch.zeros(50, 4), names, "large", "test")
    names = scaled_names(pools["vgg"].network.module, "layer", "head")
    assert laws(pools["vgg"], names) == ("homogeneous",)


def test_powers_beyond_float64_are_not_finite(pools) -> None:
    state = pools["mlp"].weights(0)
    law = power_law(pools["mlp"], state, torch.ones(2, 2), state.keys(), "homogeneous", "test")
    assert not law.logits(1e150).isfinite().any()


def test_dominance_is_the_part_in_a_sum() -> None:
    frame = dominance([3, 8], 5, [1e-3, 1.0, 2.0])
    for row in frame.itertuples():
        value = row.magnitude**row.depth
        assert row.ratio == pytest.approx(value)
        assert row.share == pytest.approx(value / (value + 4))
    assert frame["depth"].tolist() == [1] * 3 + [3] * 3 + [8] * 3
    assert set(frame[frame["mean"] == "soup"]["depth"]) == {1}
    extreme = dominance([400], 2, [1e-3, 1e3])
    assert extreme["share"].tolist()[2:] == pytest.approx([0, 1], abs=1e-200)
