"""``mergescope pool build``: what it writes, its presets, and its one-line refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from analysis.outputs.pool_outputs import PoolEvaluator
from data.pool_building import RATES
from data.pool_images import ImageTask
from data.pool_presets import Request, plan_request
from merge_core.suites.pool import load_pool
from mergescope import cli
from tests.data.test_vision_datasets import write_cifar100, write_mnist


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """``call(*arguments)`` gives the exit code of ``mergescope pool build``."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["mergescope", "pool", "build", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert isinstance(caught.value.code, int)
        return caught.value.code

    return run


def blank(name: str, size: int, channels: int, classes: int) -> ImageTask:
    images = np.zeros((4, size, size, channels), dtype=np.uint8)
    split = images, np.zeros(4, dtype=np.int64)
    names = tuple(str(i) for i in range(classes))
    splits = {"train": split, "val": split, "test": split}
    return ImageTask(name, name, names, splits, (0.4,) * channels, (0.3,) * channels)


def test_bundled_images(call: Any, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "my-pool"
    options = ["--dataset", "digits", "--limit", 40, "--members", 2, "--epochs", 1, "--regime"]
    args = ["--architecture", "mlp", "--arg", "widths=[5, 4]", "--arg", "bias=false"]
    assert call(folder, *options, "shared", *args) == 0
    assert capsys.readouterr().out.strip() == str(folder)
    pool = load_pool(folder)
    assert (pool.name, pool.spec.regime, len(pool)) == ("my-pool", "shared", 2)
    assert pool.spec.architecture.args["widths"] == [5, 4]
    assert pool.spec.architecture.args["bias"] is False
    assert pool.start is not None
    evaluator = PoolEvaluator(pool)
    assert evaluator.member(0, "test").logits.shape == (40, 10)


def test_a_dataset_of_ones_own(call: Any, tmp_path: Path) -> None:
    write_mnist(tmp_path / "data")
    for regime in ("shared_random", "independent"):
        options = ["--dataset", "mnist", "--root", tmp_path / "data", "--regime", regime]
        args = ["--architecture", "vgg", "--arg", "channels=[3]", "--arg", "hidden=4"]
        assert call(tmp_path / regime, *options, *args, "--members", 2, "--epochs", 1) == 0
        pool = load_pool(tmp_path / regime)
        assert (pool.spec.data.mean, pool.spec.data.std) == ((0.1307,), (0.3081,))
        assert (pool.start is None) == (regime == "independent")
        assert PoolEvaluator(pool).member(1, "val").logits.shape == (10, 10)


def test_the_papers_preset_on_files(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar100(tmp_path / "data", monkeypatch)
    options = ["--dataset", "cifar100", "--root", tmp_path / "data", "--preset", "paper"]
    assert call(tmp_path / "pool", *options, "--members", 1, "--epochs", 1) == 0
    pool = load_pool(tmp_path / "pool")
    weight = pool.member(0).tensor("head.weight")
    assert tuple(weight.shape) == (100, 3072)
    assert (pool.spec.data.mean, pool.spec.data.std) == ((0.0,) * 3, (1.0,) * 3)
    member = pool.spec.members[0]
    assert (member.learning_rate, member.weight_decay) == (0.01, 0.1)
    assert PoolEvaluator(pool).inputs("train").images.shape == (100, 32, 32, 3)


def test_the_papers_numbers() -> None:
    plan, task = plan_request(Request("x", preset="paper"), blank("cifar100", 32, 3, 100))
    training = plan.training
    assert plan.architecture.name == "linear"
    assert (training.epochs, training.batch, training.rate) == (100, 64, 0.01)
    assert (training.optimiser, training.momentum, training.schedule) == ("sgd", 0.9, "steps")
    assert (training.milestones, training.shift) == ((0.2, 0.4, 0.6, 0.8), 0)
    assert {(m.rate, m.weight_decay) for m in plan.members} == {(0.01, 0.1)}
    assert (plan.mean, plan.std) == ((0.0,) * 3, (1.0,) * 3)  # pixels in [0, 1]
    assert task.shipped is None  # all of them, for the stationary template

    plan, _ = plan_request(Request("x", preset="paper"), blank("folder", 64, 3, 200))
    training = plan.training
    assert (training.epochs, training.batch, training.milestones) == (10, 1024, (0.5,))
    assert (plan.mean, plan.std) == ((0.4,) * 3, (0.3,) * 3)  # the dataset's own


def test_the_small_preset() -> None:
    task = blank("cifar10", 32, 3, 10)
    plan, stored = plan_request(Request("x", "resnet18", regime="shared", epochs=8), task)
    assert plan.pretraining is not None
    assert (plan.pretraining.epochs, plan.training.epochs) == (2, 8)
    assert len({m.rate for m in plan.members}) == len(set(RATES))
    assert (plan.mean, stored.shipped) == (task.mean, 1000)
    assert plan_request(Request("x", "linear"), task)[1].shipped is None


def test_mistakes(call: Any, tmp_path: Path, capsys: Any) -> None:
    few = ["--limit", 20, "--members", 1, "--epochs", 1]
    output = tmp_path / "pool"
    cases: list[tuple[list[object], str]] = [
        ([output, "--dataset", "imagenet"], "No dataset 'imagenet'"),
        ([output, "--dataset", "mnist"], "--root"),
        ([output, "--dataset", "mnist", "--root", tmp_path / "no"], "is not a folder"),
        ([output, "--root", tmp_path], "is bundled"),
        ([output, "--preset", "large"], "No preset 'large'"),
        ([output, "--preset", "paper", "--architecture", "vgg"], "linear classifiers"),
        ([output, "--regime", "alone"], "No regime 'alone'"),
        ([output, "--arg", "depth"], "key=value"),
        ([output, "--arg", "channels=["], "is not a value"),
        ([output, "--arg", "channels=7"], "cannot build 'vgg'"),
        ([output, "--architecture", "resnet99"], "resnet99"),
        ([output, "--device", "tpu"], "is no device"),
        ([tmp_path / "two words"], "cannot be a pool's name"),
        ([output, "--members", 0], "--members"),
    ]
    if not torch.cuda.is_available():
        cases.append(([output, "--device", "cuda"], "no CUDA device"))
    for arguments, message in cases:
        assert call(*few, *arguments) == 2, arguments
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert message in lines[0]
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_left_alone(call: Any, tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "pool" / "mine.png")
    options = ["--limit", 20, "--members", 1, "--epochs", 1, "--architecture", "linear"]
    assert call(tmp_path / "pool", *options) == 2
    assert [path.name for path in (tmp_path / "pool").iterdir()] == ["mine.png"]
