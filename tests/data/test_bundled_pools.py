"""The committed pools: sizes, floors of accuracy, and the phenomena that the pages show."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from analysis.outputs.inputs import normalise_pixels
from analysis.outputs.pool_outputs import PoolEvaluator
from data.pool_tasks import POOL_TASKS, Sizes
from merge_core.suites.pool import BUNDLED_POOLS, Pool, bundled_pools, load_pool

LIMIT_BYTES = 30 * 1000**2
DEEP = {
    "digits": ("mlp", "vgg", "resnet", "vit"),
    "noisy-letters": ("vgg", "resnet", "vit"),
}
REGIMES = ("shared", "independent")
DEEP_NAMES = [f"{task}-{key}-{r}" for task, keys in DEEP.items() for key in keys for r in REGIMES]
LINEAR_NAMES = ["digits-linear", "letters-linear", "shapes-linear"]
FAMILIES = {"mlp": "MLP", "vgg": "VGG", "resnet": "ResNet", "vit": "ViT", "linear": "Linear"}
CHANCE = {"digits": 1 / 10, "noisy-letters": 1 / 26, "letters": 1 / 10, "shapes": 1 / 10}
# The lowest member's accuracy on the test split; measured values are in data/README.md.
FLOORS = {"digits": 0.86, "noisy-letters": 0.50, "letters": 0.90, "shapes": 0.80}


@cache
def evaluator(name: str) -> PoolEvaluator:
    return PoolEvaluator(load_pool(name))


def pool(name: str) -> Pool:
    return evaluator(name).pool


def logits(name: str) -> Tensor:
    """Members x images x classes, on the test split."""
    every = evaluator(name)
    return torch.stack([every.member(i, "test").logits for i in range(len(every.pool))])


def accuracy(name: str, values: Tensor) -> float:
    return float((values.argmax(-1).numpy() == evaluator(name).labels("test")).mean())


def members(name: str) -> list[float]:
    return [accuracy(name, each) for each in logits(name)]


def soup(name: str) -> Tensor:
    """Logits of the mean weights; of statistics too, counters are the first's."""
    every = evaluator(name)
    states = [every.weights(i) for i in range(len(every.pool))]
    mean = {
        key: torch.stack([state[key] for state in states]).mean(0)
        if value.is_floating_point()
        else value
        for key, value in states[0].items()
    }
    return every.run(mean, "test").logits


def test_all_are_there_and_small() -> None:
    assert sorted(bundled_pools()) == sorted(DEEP_NAMES + LINEAR_NAMES)
    files = [path for path in BUNDLED_POOLS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT_BYTES
    named = {path for name in bundled_pools() for path in pool(name).files}
    named |= {path.resolve() for path in bundled_pools().values()}
    assert {path.resolve() for path in files} == named  # nothing else lies there
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in files)


@pytest.mark.parametrize("name", DEEP_NAMES)
def test_deep_pools_are_described(name: str) -> None:
    task, key, regime = name.rsplit("-", 2)
    spec = pool(name).spec
    assert (spec.name, spec.task, spec.family, spec.regime) == (name, task, FAMILIES[key], regime)
    assert len(spec.members) == 10
    assert len({member.seed for member in spec.members}) == 10
    assert len({member.learning_rate for member in spec.members}) > 1
    assert (pool(name).start is not None) == (regime == "shared")
    assert {"in_chans", "num_classes"} <= spec.architecture.args.keys()
    assert spec.title
    assert spec.description


@pytest.mark.parametrize("name", DEEP_NAMES + LINEAR_NAMES)
def test_weights_are_stored_small(name: str) -> None:
    for key, value in load_file(pool(name).root / "0.safetensors").items():
        kind = torch.int64 if key.endswith("tracked") else torch.float16
        assert value.dtype == (torch.float32 if "running" in key else kind)
        assert "bias" not in key or "-mlp-" not in name  # exactly homogeneous


@pytest.mark.parametrize("name", DEEP_NAMES + LINEAR_NAMES)
def test_every_member_is_above_the_floor(name: str) -> None:
    assert min(members(name)) >= FLOORS[pool(name).spec.task]


@pytest.mark.parametrize("name", [name for name in DEEP_NAMES if name.endswith("independent")])
def test_independent_starts_ruin_the_soup_and_help_the_ensemble(name: str) -> None:
    chance, single = CHANCE[pool(name).spec.task], float(np.mean(members(name)))
    assert accuracy(name, soup(name)) <= chance + 0.15
    assert accuracy(name, logits(name).mean(0)) >= single


@pytest.mark.parametrize("name", [name for name in DEEP_NAMES if name.endswith("shared")])
def test_a_shared_start_keeps_the_soup(name: str) -> None:
    single = float(np.mean(members(name)))
    assert accuracy(name, soup(name)) >= single - 0.03
    predictions = logits(name).argmax(-1)
    for i in range(len(predictions)):
        for j in range(i):
            assert not torch.equal(predictions[i], predictions[j])  # they do differ


@pytest.mark.parametrize("name", ["noisy-letters-vgg-independent", "noisy-letters-vit-independent"])
def test_an_ensemble_visibly_gains_on_the_harder_task(name: str) -> None:
    assert accuracy(name, logits(name).mean(0)) >= float(np.mean(members(name))) + 0.04


@pytest.mark.parametrize("name", DEEP_NAMES + LINEAR_NAMES)
def test_the_head_of_the_features_gives_the_logits(name: str) -> None:
    every = evaluator(name)
    outputs = every.member(1, "test")
    weight, bias = every.network.head(every.weights(1))
    expected = outputs.features.double() @ weight.double().T + bias.double()
    scale = float(expected.abs().max())
    assert float((outputs.logits - expected).abs().max()) <= 1e-5 * max(1.0, scale)


@pytest.mark.parametrize("name", LINEAR_NAMES)
def test_linear_pools(name: str) -> None:
    spec = pool(name).spec
    described = {(member.weight_decay, member.seed) for member in spec.members}
    assert described == {(decay, seed) for decay in (0, 1e-4, 1e-2, 0.1) for seed in (0, 1, 2)}
    for member in spec.members:
        assert member.learning_rate == 0.01
        if member.seed == 0:
            epochs = [snapshot.epoch for snapshot in member.trajectory]
            assert len(epochs) >= 6
            assert epochs == sorted(epochs)
            assert (epochs[0], epochs[-1]) == (0, member.epochs)
            assert member.trajectory[-1].weights == member.weights
    assert (set(spec.data.mean), set(spec.data.std)) == ({0.0}, {1.0})  # pixels in [0, 1]
    gap = (soup(name) - logits(name).mean(0)).abs().max()
    assert float(gap) <= 1e-5 * max(1.0, float(logits(name).abs().max()))


@pytest.mark.parametrize("name", LINEAR_NAMES)
def test_the_strongest_decay_is_close_to_stationary(name: str) -> None:
    """W = (1/(d·n)) Σ (1[y=c] − p_ic) x_i on the shipped training images, in float64."""
    every = evaluator(name)
    inputs = every.inputs("train")
    channels = inputs.images.shape[-1]
    x = normalise_pixels(inputs.images, (0.0,) * channels, (1.0,) * channels).flatten(1).double()
    onehot = torch.eye(len(every.class_names), dtype=torch.float64)[torch.from_numpy(inputs.labels)]
    for i, member in enumerate(every.pool.spec.members):
        if member.weight_decay == 0.1:
            weight, bias = (value.double() for value in every.network.head(every.weights(i)))
            p = torch.softmax(x @ weight.T + bias, dim=1)
            stationary = (onehot - p).T @ x / (0.1 * len(x))
            assert float((weight - stationary).norm() / weight.norm()) <= 0.05


@pytest.mark.parametrize("task", POOL_TASKS)
def test_the_images_are_those_that_the_seed_draws(task: str) -> None:
    drawn = POOL_TASKS[task](Sizes(), 0)
    with np.load(BUNDLED_POOLS / "inputs" / f"{task}.npz") as stored:
        assert tuple(stored["class_names"]) == drawn.class_names
        for split in ("val", "test"):
            np.testing.assert_array_equal(stored[f"{split}_images"], drawn.splits[split][0])
            np.testing.assert_array_equal(stored[f"{split}_labels"], drawn.splits[split][1])
        assert len(stored["train_labels"]) == (drawn.shipped or len(drawn.splits["train"][1]))
    deep = [name for name in DEEP_NAMES if pool(name).spec.task == task]
    for name in deep:
        assert (pool(name).spec.data.mean, pool(name).spec.data.std) == (drawn.mean, drawn.std)


def test_the_start_is_trained_and_members_leave_it() -> None:
    for name in (name for name in DEEP_NAMES if name.endswith("shared")):
        every = evaluator(name)
        start = every.pool.start
        assert start is not None
        found = accuracy(name, every.checkpoint(start, "test").logits)
        assert 2 * CHANCE[every.pool.spec.task] < found < float(np.mean(members(name)))


def test_paths_stay_below_the_pools() -> None:
    for name in bundled_pools():
        root = BUNDLED_POOLS.resolve()
        assert all(Path(path).is_relative_to(root) for path in pool(name).files)
