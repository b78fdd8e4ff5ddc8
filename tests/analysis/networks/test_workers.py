"""Work side by side: each thread runs its own weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from analysis.magnitude.sweep import magnitude_sweep
from analysis.networks.towers import suite_network
from analysis.outputs.pool_outputs import PoolEvaluator
from merge_core.suites.suite import load_suite
from tests.evaluable import SIZE, TASKS, write_evaluable
from tests.pools import write_pool


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def alternate(run: dict[str, Tensor], compute: object, rounds: int = 30) -> None:
    """Two threads at once, each with weights of its own, again and again."""
    assert callable(compute)
    wanted = {name: compute(name) for name in run}
    gate = threading.Barrier(2)

    def repeat(name: str) -> bool:
        gate.wait()
        return all(torch.equal(compute(name), wanted[name]) for _ in range(rounds))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(repeat, run))


def test_two_threads_do_not_run_each_others_weights(tmp_path: Path) -> None:
    evaluator = PoolEvaluator(write_pool(tmp_path / "p", "vit"))
    states = {str(i): evaluator.weights(i) for i in range(2)}
    images = evaluator.images("test")
    alternate(states, lambda name: evaluator.network.outputs(states[name], images).logits)


def test_nor_do_those_of_a_suite(tmp_path: Path) -> None:
    suite = load_suite(write_evaluable(tmp_path / "s"))
    network = suite_network(suite)
    states = {
        task: {name: suite.expert(task).tensor(name) for name in suite.expert(task)}
        for task in TASKS[:2]
    }
    images = torch.randn(20, 3, SIZE, SIZE)
    alternate(states, lambda task: network.features(states[task], images))


def test_a_sweep_is_the_same_on_two_threads(tmp_path: Path, two_threads: None) -> None:
    evaluator = PoolEvaluator(write_pool(tmp_path / "p", "vgg"))
    magnitudes = [0.1, 1.0, 3.0]
    both = magnitude_sweep(evaluator, (0, 1, 2), magnitudes)
    torch.set_num_threads(1)
    alone = magnitude_sweep(PoolEvaluator(evaluator.pool), (0, 1, 2), magnitudes)
    assert (
        both.drop(columns="arithmetic").round(9).equals(alone.drop(columns="arithmetic").round(9))
    )
