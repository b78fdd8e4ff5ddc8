"""Linear CKA against two other formulas and its invariances, and the layers it is taken at."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from analysis.averaging.gaps import sample_indices
from analysis.averaging.similarity import centred_gram, cka_frame, layers_of, mean_cka
from analysis.networks.pool_network import pool_network
from analysis.outputs.pool_outputs import PoolEvaluator
from merge_core.errors import Cancelled
from merge_core.progress import Progress
from tests.pools import ARCHITECTURES, IMAGES, write_pool

MEMBERS = (0, 1, 2)
SEEDS = st.integers(0, 10**6)
VIT = ARCHITECTURES["vit"]
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "linear": (ARCHITECTURES["linear"], ()),
    "mlp": (ARCHITECTURES["mlp"], ("hidden.0", "hidden.1")),
    "vgg": (
        ARCHITECTURES["vgg"],
        ("stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1", "hidden"),
    ),
    "resnet": (ARCHITECTURES["resnet"], ("act1", "layer1", "layer2", "layer3", "layer4")),
    "vit_token": (VIT, ("blocks.0", "blocks.1")),
    "vit_avg": (
        {**VIT, "args": {**VIT["args"], "global_pool": "avg"}},
        ("blocks.0", "blocks.1"),
    ),
    "vit_deep": (
        {**VIT, "args": {**VIT["args"], "depth": 11}},
        ("blocks.0", "blocks.2", "blocks.4", "blocks.6", "blocks.8", "blocks.10"),
    ),
    "densenet": (
        {"name": "densenet121", "args": {"block_config": [1, 1], "growth_rate": 4}},
        ("features.norm0", "features.denseblock1", "features.norm5"),
    ),
    "convnext": (
        {
            "name": "convnext_atto",
            "args": {"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [4, 4, 6, 8]},
        },
        ("stages.0", "stages.1", "stages.2", "stages.3"),
    ),
}


@pytest.fixture(scope="module")
def evaluators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PoolEvaluator]:
    folder = tmp_path_factory.mktemp("similarity")
    return {f: PoolEvaluator(write_pool(folder / f, spec)) for f, (spec, _) in FAMILIES.items()}


def random_pair(seed: int, n: int, p: int, q: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, p, generator=g, dtype=torch.float64) + 3
    Y = torch.randn(n, q, generator=g, dtype=torch.float64) + X[:, :1]
    return X, Y


def cka(first: Tensor, second: Tensor) -> float:
    """As :func:`cka_frame` takes it."""
    return float((centred_gram(first) * centred_gram(second)).sum())


def cka_of_features(X: np.ndarray, Y: np.ndarray) -> float:
    """The paper's formula for a linear kernel."""
    A, B = X - X.mean(axis=0), Y - Y.mean(axis=0)
    norms = np.linalg.norm(A.T @ A) * np.linalg.norm(B.T @ B)
    return float(np.linalg.norm(B.T @ A) ** 2 / norms)


@given(SEEDS, st.integers(3, 12), st.integers(1, 8), st.integers(1, 8))
def test_cka_is_both_formulas_of_the_paper(seed: int, n: int, p: int, q: int) -> None:
    X, Y = (value.numpy() for value in random_pair(seed, n, p, q))
    mine = cka(torch.from_numpy(X), torch.from_numpy(Y))
    H = np.eye(n) - np.ones((n, n)) / n

    def hsic(K: np.ndarray, L: np.ndarray) -> float:
        return float(np.trace(K @ H @ L @ H)) / (n - 1) ** 2

    K, L = X @ X.T, Y @ Y.T
    assert mine == pytest.approx(cka_of_features(X, Y), abs=1e-9)
    assert mine == pytest.approx(hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L)), abs=1e-9)
    assert -1e-12 <= mine <= 1 + 1e-12


@given(SEEDS, st.integers(2, 7), st.floats(1e-3, 1e3), st.floats(-50, 50))
def test_cka_ignores_rotation_scale_and_offset(seed: int, p: int, scale: float, offset) -> None:
    X, Y = random_pair(seed, 12, p, 5)
    Q = torch.linalg.qr(random_pair(seed + 1, p, p, p)[0]).Q
    assert cka(scale * X @ Q + offset, Y) == pytest.approx(cka(X, Y), abs=1e-7)
    assert cka(X @ Q, X) == pytest.approx(1, abs=1e-9)


def test_cka_sees_other_changes() -> None:
    X, Y = random_pair(3, 40, 4, 4)
    assert cka(X, X) == pytest.approx(1)
    assert cka(X, Y) < 0.9
    assert cka(X * torch.tensor([1.0, 1.0, 1.0, 30.0]), X) < 0.9
    assert cka(X, torch.full((40, 3), 2.0)) == 0.0
    assert centred_gram(X.reshape(40, 2, 2)).equal(centred_gram(X))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_layers_run_from_input_to_output(evaluators: dict[str, PoolEvaluator], family: str) -> None:
    assert layers_of(evaluators[family]) == (*FAMILIES[family][1], "features", "logits")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_head_of_the_features_is_the_output(
    evaluators: dict[str, PoolEvaluator], family: str
) -> None:
    evaluator = evaluators[family]
    weights, images = evaluator.weights(0), evaluator.images("test").double()
    module = pool_network(evaluator.pool).module.double()
    module.load_state_dict(weights)
    whole = module(images)
    outputs = evaluator.network.outputs(weights, images, torch.float64)
    weight, bias = evaluator.network.head(weights)
    joined = outputs.features @ weight.double().T + bias.double()
    assert torch.allclose(outputs.logits, whole, atol=1e-9)
    assert torch.allclose(joined, whole, atol=1e-9)
    single = evaluator.member(0, "test")
    assert torch.allclose(single.features @ weight.T + bias, whole.float(), atol=1e-5)


def test_cka_of_members_is_that_of_their_activations(
    evaluators: dict[str, PoolEvaluator],
) -> None:
    evaluator = evaluators["mlp"]
    frame = cka_frame(evaluator, (0, 2), "test", limit=20)
    images = evaluator.images("test")[sample_indices(IMAGES["test"], 20)].double().flatten(1)
    held: dict[int, dict[str, Tensor]] = {}
    for member in (0, 2):
        w = {name: value.double() for name, value in evaluator.weights(member).items()}
        first = images @ w["hidden.0.weight"].T
        second = functional.relu(first) @ w["hidden.1.weight"].T
        features = functional.relu(second)
        logits = features @ w["head.weight"].T
        held[member] = {
            "hidden.0": first, "hidden.1": second, "features": features, "logits": logits,
        }  # fmt: skip
    assert list(frame) == ["layer", "depth", "first", "second", "cka"]
    assert list(dict.fromkeys(frame["layer"])) == list(held[0])
    assert len(frame) == 4 * 4
    for row in frame.itertuples():
        first, second = (held[member][row.layer].numpy() for member in (row.first, row.second))
        expected = cka_of_features(first, second)
        assert row.cka == pytest.approx(expected, abs=1e-5)
        assert row.depth == list(held[0]).index(row.layer)


@pytest.mark.parametrize("family", ["vgg", "resnet", "vit_token", "convnext"])
def test_members_are_compared_at_every_layer(
    evaluators: dict[str, PoolEvaluator], family: str
) -> None:
    evaluator = evaluators[family]
    frame = cka_frame(evaluator, MEMBERS, "test", limit=30)
    assert list(dict.fromkeys(frame["layer"])) == list(layers_of(evaluator))
    own = frame[frame["first"] == frame["second"]]
    assert own["cka"].to_numpy() == pytest.approx(1, abs=1e-9)
    swapped = frame.set_index(["layer", "second", "first"])["cka"]
    assert frame.set_index(["layer", "first", "second"])["cka"].to_dict() == pytest.approx(
        swapped.to_dict()
    )
    others = frame[frame["first"] != frame["second"]]
    assert others["cka"].between(0, 0.999).all()
    hooks = [layer._forward_hooks for layer in evaluator.network.module.modules()]
    assert not any(hooks)


def test_equal_members_are_alike_everywhere(tmp_path: Path) -> None:
    """Dropout is off, or two runs of the same weights would differ."""
    spec = {**VIT, "args": {**VIT["args"], "proj_drop_rate": 0.5, "drop_rate": 0.5}}
    evaluator = PoolEvaluator(write_pool(tmp_path / "p", spec, members=2, spread=0.0))
    assert cka_frame(evaluator, (0, 1))["cka"].to_numpy() == pytest.approx(1, abs=1e-9)


def test_mean_over_pairs_leaves_a_member_with_itself_out(
    evaluators: dict[str, PoolEvaluator],
) -> None:
    frame = cka_frame(evaluators["vgg"], MEMBERS, "val")
    mean = mean_cka(frame)
    assert mean["layer"].tolist() == list(layers_of(evaluators["vgg"]))
    for row in mean.itertuples():
        mine = frame[frame["layer"] == row.layer]
        pairs = [
            mine[(mine["first"] == i) & (mine["second"] == j)]["cka"].item()
            for i, j in ((0, 1), (0, 2), (1, 2))
        ]
        assert (row.mean, row.lowest, row.highest, row.pairs) == pytest.approx(
            (np.mean(pairs), min(pairs), max(pairs), 3)
        )
    assert mean_cka(cka_frame(evaluators["vgg"], (1,), "val")).empty


def test_layers_that_overflow_have_no_similarity(tmp_path: Path) -> None:
    def loud(number: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: 1e16 * value for name, value in state.items()} if number == 1 else state

    evaluator = PoolEvaluator(write_pool(tmp_path / "p", "mlp", members=2, change=loud))
    frame = cka_frame(evaluator, (0, 1))
    last = frame[frame["layer"] == "logits"].set_index(["first", "second"])["cka"]
    assert last[0, 0] == pytest.approx(1)
    assert np.isnan(last[0, 1])
    assert np.isnan(last[1, 1])


def test_progress_and_cancellation(evaluators: dict[str, PoolEvaluator]) -> None:
    seen: list[tuple[int, int, str]] = []
    cka_frame(evaluators["mlp"], MEMBERS, progress=Progress(lambda *step: seen.append(step)))
    assert [(done, total) for done, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        cka_frame(evaluators["mlp"], MEMBERS, progress=Progress(cancel=cancel))
