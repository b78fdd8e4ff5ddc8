"""Peak memory of every merge method, as torch's and Python's allocators report it.

Both are counted by what is asked of them, not by what the system gives: the figures are the same
in each run, and the pages of mapped weight files do not count.
"""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from merge_core.executors.base import Executor
from merge_core.executors.local import Serial, Threads
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import merge_parameters
from merge_core.merging.recipe import make_recipe
from merge_core.methods import blockwise, get_method, methods
from merge_core.methods.adamerging import Coefficients
from merge_core.methods.sparse import Limits
from merge_core.suites.estimates import IMPORTS_BYTES
from merge_core.suites.preflight import preflight
from merge_core.suites.suite import Suite
from merge_core.task_vectors import TensorGroups

Make = Callable[..., Suite]

BOUND = 1.5  # times what Task Arithmetic takes
EMBEDDING, MATRIX = "embed.weight", "blocks.0.mlp.fc1.weight"
SHAPES = {EMBEDDING: (20_000, 256), MATRIX: (1000, 800)}
EXPERTS = 8
TASKS = [f"task{i}" for i in range(EXPERTS)]
WEIGHTS = {task: 0.5 + i / EXPERTS for i, task in enumerate(TASKS)}


@dataclass(frozen=True)
class Case:
    """A merge: a method, further fields of its recipe, and what it learnt from data."""

    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    learn: Callable[[Suite], Any] = lambda _: None

    def __str__(self) -> str:
        values = {**self.fields.get("parameters", {}), **self.fields}
        return "-".join([self.method, *(str(v) for v in values.values() if isinstance(v, str))])


def information(suite: Suite) -> dict[str, torch.Tensor]:
    return {name: torch.ones(EXPERTS, *suite.expert(TASKS[0]).info(name).shape) for name in SHAPES}


def update(suite: Suite) -> dict[str, torch.Tensor]:
    return {MATRIX: torch.ones(suite.expert(TASKS[0]).info(MATRIX).shape, dtype=torch.float64)}


def coefficients(_: Suite) -> Coefficients:
    limits = Limits(0.2, torch.full((EXPERTS,), 0.4))
    return Coefficients({name: torch.linspace(0.1, 0.4, EXPERTS) for name in SHAPES}, limits)


# What is entrywise, or needs no more than inner products of whole tensors.
BLOCKWISE = (
    Case("average"),
    Case("average", {"weights": WEIGHTS}),
    Case("task_arithmetic", {"weights": WEIGHTS}),
    Case("ties", {"parameters": {"trim": "global"}}),
    Case("ties", {"parameters": {"trim": "tensor"}, "weights": WEIGHTS}),
    Case("dare_task_arithmetic"),
    Case("dare_ties"),
    Case("breadcrumbs"),
    Case("consensus"),
    # Its time grows with the pairs of tasks.
    Case("pcb", {"parameters": {"variant": "paper"}, "tasks": TASKS[:3]}),
    Case("pcb", {"parameters": {"variant": "code"}, "tasks": TASKS[:3]}),
    Case("slerp", {"tasks": TASKS[:2]}),
    Case("karcher"),
    Case("model_stock"),
    Case("fisher", learn=information),
    Case("fisher", {"weights": WEIGHTS}, learn=lambda _: {}),
    Case("adamerging", learn=coefficients),
    Case("adamerging", {"parameters": {"trimmed": "ties"}}, learn=coefficients),
    Case("regmean", learn=update),
    Case("regmean_plus_plus", learn=update),
    Case("tall_masks"),
    Case("emr"),
)
# What decomposes matrices, and treats an embedding as the others do.
SPECTRAL = (
    "cart",
    "cart_adaptive",
    "cart_energy",
    "cart_indexing",
    "iso_c",
    "iso_cts",
    "knots",
    "low_rank_task_arithmetic",
    "tsv_c",
    "tsv_m",
    "wudi",
)


@pytest.fixture(scope="module")
def suite(synthetic_suite: Make) -> Iterator[Suite]:
    made = synthetic_suite(TASKS, shapes=SHAPES, counter=False)
    # Files are mapped once, which torch counts as its own memory, and the profiler is imported.
    for member in made.members(made.tasks):
        for name in member:
            member.tensor(name)
    peak(Case("average"), made)
    yield made
    shutil.rmtree(made.root)


def merge(
    case: Case,
    suite: Suite,
    learned: Any,
    executor: Executor | None = None,
    names: Collection[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The merge as it is written to a file, parameter by parameter."""
    recipe = make_recipe({"method": case.method, **case.fields})
    groups = TensorGroups(suite, recipe.tasks, FactorStore(Path("absent"), memory_bytes=0))
    task = groups.tasks[1] if get_method(case.method).indexed else None
    return merge_parameters(recipe, groups, None, task, learned, executor, names)


def peak(case: Case, suite: Suite, names: Collection[str] | None = None) -> int:
    """Bytes that torch and Python (with NumPy) hold at most while merging, at their own peaks."""
    learned = case.learn(suite)
    tracemalloc.start()
    try:
        activities = [ProfilerActivity.CPU]
        with torch.no_grad(), profile(activities=activities, profile_memory=True) as seen:
            for _ in merge(case, suite, learned, names=names):
                pass
        python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen.profiler is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most + python


@pytest.fixture(scope="module")
def task_arithmetic(suite: Suite) -> int:
    return peak(Case("task_arithmetic"), suite)


def test_every_method_is_measured() -> None:
    assert {case.method for case in BLOCKWISE}.isdisjoint(SPECTRAL)
    assert {case.method for case in BLOCKWISE} | set(SPECTRAL) == set(methods())


def test_what_is_measured_is_what_a_merge_holds(suite: Suite, task_arithmetic: int) -> None:
    # The average and the result of the embedding, while the matrix before it is written.
    embedding, matrix = (4 * m * n for m, n in SHAPES.values())
    assert task_arithmetic == pytest.approx(2 * embedding + matrix, rel=0.01)


@pytest.mark.parametrize("case", BLOCKWISE, ids=str)
def test_no_copy_of_all_experts_is_made(case: Case, suite: Suite, task_arithmetic: int) -> None:
    taken = peak(case, suite)
    assert taken <= BOUND * task_arithmetic
    assert taken <= preflight(suite).entrywise_bytes - IMPORTS_BYTES


@pytest.mark.parametrize("name", SPECTRAL)
def test_nor_of_an_embedding_where_matrices_are_decomposed(
    name: str, suite: Suite, task_arithmetic: int
) -> None:
    assert peak(Case(name, learn=lambda _: {}), suite, {EMBEDDING}) <= BOUND * task_arithmetic


@pytest.mark.parametrize("case", BLOCKWISE, ids=str)
def test_threads_change_no_byte_and_blocks_none_that_matters(
    case: Case, synthetic_suite: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = synthetic_suite(TASKS, shapes={EMBEDDING: (50, 7), MATRIX: (9, 30)}, counter=False)
    learned = case.learn(suite)
    whole = dict(merge(case, suite, learned, Serial()))
    monkeypatch.setattr(blockwise, "BLOCK", 64)
    alone = dict(merge(case, suite, learned, Serial()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        beside = dict(merge(case, suite, learned, Threads()))
    finally:
        torch.set_num_threads(before)
    for name, value in alone.items():
        assert torch.equal(value, beside[name])
        torch.testing.assert_close(value, whole[name], atol=1e-6, rtol=1e-6)
