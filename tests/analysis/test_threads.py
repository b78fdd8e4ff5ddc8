"""No loop of small operations is split over torch's own threads, whatever computes.

Next to another busy process an operation on two threads waits for the slower one at its end, each
time. Work is split at its seams instead: every operation of some size is looked at here, in
whichever thread it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import merge_core.executors.local as executors
from analysis.averaging.similarity import cka_frame
from analysis.comparison.costs import storage_bytes
from analysis.evaluation.evaluator import Evaluator
from analysis.learning.learn import learn
from analysis.magnitude.norms import identity_frame, norms_frame
from analysis.magnitude.robustness import weight_noise_sweep
from analysis.magnitude.sweep import magnitude_sweep
from analysis.outputs.pool_outputs import PoolEvaluator
from analysis.outputs.prediction_store import PredictionStore
from analysis.rank_selection.allocation import allocate
from analysis.rank_selection.select import SelectionOptions, select_rank
from analysis.rank_selection.space import search_space
from analysis.spectral.interference import (
    cosine_similarity,
    interference_over_rank,
    interference_pairs,
    principal_angles,
    sign_conflict,
)
from analysis.spectral.spectra import cuts, spectral_summary, spectrum
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.output.model_folder import merge_to_folder
from merge_core.suites.suite import load_suite
from merge_core.task_vectors import TensorGroups
from tests.conftest import random_states, write_suite
from tests.evaluable import TASKS, copy_evaluable
from tests.pools import write_pool

SOME_ENTRIES = 256
# They change no number, and so are not split.
VIEWS = (
    *("aten.detach.default", "aten.lift_fresh.default", "aten.select.int"),
    *("aten.set_.source_Storage", "aten.view.dtype"),  # of reading a file that is mapped
)
SHAPES = {"blocks.0.fc.weight": (40, 24), "blocks.1.fc.weight": (24, 40), "embed": (50, 24)}

OF_WEIGHTS: dict[str, Callable[[TensorGroups], object]] = {
    "over rank": lambda groups: interference_over_rank(groups, "average", [0.1, 0.5, 1.0]),
    "one over rank": lambda groups: interference_over_rank(groups.members[0], "average", [0.5]),
    "pairs": lambda groups: interference_pairs(groups.members[0], "average", 5),
    "angles": lambda groups: principal_angles(groups.members[0], "average", 5),
    "cosine": lambda groups: cosine_similarity(groups, "base"),
    "signs": lambda groups: sign_conflict(groups, "base"),
    "summary": lambda groups: spectral_summary(groups, "average"),
    "spectrum": lambda groups: spectrum(groups.members[0], "average"),
    "cuts": lambda groups: cuts(groups.members[0], "average"),
    "allocation": lambda groups: allocate(groups, "average", 0.3),
}
OF_POOLS: dict[str, Callable[[PoolEvaluator], object]] = {
    "magnitude": lambda pool: magnitude_sweep(pool, (0, 1), [0.5, 2.0]),
    "noise": lambda pool: weight_noise_sweep(pool, (0, 1), [0.1], [0]),
    "cka": lambda pool: cka_frame(pool, (0, 1)),
    "identity": lambda pool: identity_frame(pool, (0, 1)),
    "norms": lambda pool: norms_frame(pool, (0, 1)),
    "run": lambda pool: pool.run(pool.weights(0), "test"),
}


class Watch(TorchDispatchMode):
    """Notes the operations of one thread, and the split ones among them.

    Args:
        seen: names of operations on tensors of some size, with torch's number of threads.
    """

    def __init__(self, seen: set[tuple[str, int]]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor))
        large = max((tensor.numel() for tensor in tensors), default=0) >= SOME_ENTRIES
        if large and str(func) not in VIEWS:
            self._seen.add((str(func), torch.get_num_threads()))
        return result


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's number of threads, as a user's process has it."""
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, int]]]:
    """What runs in this thread and in executors' threads, while torch has two."""
    seen: set[tuple[str, int]] = set()
    alone = executors._use_one_thread

    def watched() -> None:
        alone()
        Watch(seen).__enter__()  # modes belong to threads; this one ends with its thread

    monkeypatch.setattr(executors, "_use_one_thread", watched)
    with threads(2), Watch(seen):
        yield seen


@pytest.fixture
def session(tmp_path: Path) -> MergeSession:
    experts, base = random_states("abcd", SHAPES)
    suite = load_suite(write_suite(tmp_path / "weights", experts, base))
    return MergeSession(suite, None, FactorStore(tmp_path / "factors"))


def check(seen: set[tuple[str, int]]) -> None:
    """Something was computed, and nothing of it on two threads."""
    assert seen
    split = sorted(name for name, threads in seen if threads > 1)
    assert not split, "split by torch: " + ", ".join(split)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_analyses_of_weights(
    session: MergeSession, name: str, keep: bool, seen: set[tuple[str, int]]
) -> None:
    session.groups.keep = keep
    OF_WEIGHTS[name](session.groups)
    check(seen)


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_they_give_the_same_on_any_number_of_threads(session: MergeSession, name: str) -> None:
    def found() -> str:
        result = OF_WEIGHTS[name](session.groups)
        return str(result.to_csv()) if isinstance(result, pd.DataFrame) else repr(result)

    alone = found()
    with threads(2):
        assert found() == alone


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("method", ["cart", "ties", "pcb", "emr", "tsv_m", "average"])
def test_merges(
    session: MergeSession, tmp_path: Path, method: str, keep: bool, seen: set[tuple[str, int]]
) -> None:
    session.groups.keep = keep
    recipe = make_recipe({"suite": str(session.suite.path), "method": method})
    task = "a" if recipe.declaration.indexed else None
    session.merge(recipe, task=task)
    merge_to_folder(recipe, session.suite, tmp_path / "merged")
    storage_bytes(recipe, session)
    check(seen)


def test_rank_and_scale_from_weights(session: MergeSession, seen: set[tuple[str, int]]) -> None:
    space = search_space("cart", str(session.suite.path))
    select_rank(space, session, None, SelectionOptions("weights"))
    check(seen)


@pytest.fixture
def evaluation(tmp_path: Path) -> tuple[MergeSession, Evaluator]:
    suite = copy_evaluable(tmp_path / "suite")
    predictions = PredictionStore(tmp_path / "predictions")  # other tests may have kept the same
    return MergeSession(suite, None, FactorStore(tmp_path / "factors")), Evaluator(
        suite, predictions
    )


LEARNING: dict[str, dict[str, int]] = {
    "cart": {},
    "fisher": {"examples": 3},
    "regmean": {"examples": 5},
    "regmean_plus_plus": {"examples": 5},
    "adamerging": {"steps": 2},
    "cart_adaptive": {"steps": 2},
}


@pytest.mark.parametrize("method", LEARNING)
def test_evaluation_and_learning(
    evaluation: tuple[MergeSession, Evaluator], method: str, seen: set[tuple[str, int]]
) -> None:
    session, evaluator = evaluation
    fields = {"suite": str(session.suite.path), "method": method, "parameters": LEARNING[method]}
    evaluator.recipe(make_recipe(fields), session)
    check(seen)


@pytest.mark.parametrize("method", LEARNING)
def test_what_is_learnt_is_the_same_on_any_number_of_threads(
    evaluation: tuple[MergeSession, Evaluator], method: str
) -> None:
    session, evaluator = evaluation
    fields = {"suite": str(session.suite.path), "method": method, "parameters": LEARNING[method]}
    recipe = make_recipe(fields)

    def merged() -> dict[str, Tensor]:
        return session.merge(recipe, learned=learn(evaluator.outputs, recipe, session))

    def features(weights: dict[str, Tensor]) -> Tensor:
        return evaluator.outputs.network.features(
            weights, evaluator.outputs.inputs(TASKS[0], "val", None)[0], batch=6
        )

    alone = merged()
    wanted = features(alone)
    with threads(2):
        again = merged()
        assert torch.equal(features(again), wanted)
    assert all(torch.equal(again[name], alone[name]) for name in alone)


def test_a_search(evaluation: tuple[MergeSession, Evaluator], seen: set[tuple[str, int]]) -> None:
    session, evaluator = evaluation
    space = search_space("cart", str(session.suite.path), None, [0.1, 0.5], [0.5, 1.0])
    select_rank(space, session, evaluator, SelectionOptions("inputs", every_proxy=True))
    check(seen)


@pytest.fixture
def pool(tmp_path: Path) -> PoolEvaluator:
    evaluator = PoolEvaluator(write_pool(tmp_path / "pool", "vit"))
    evaluator.images("test")
    return evaluator


@pytest.mark.parametrize("name", OF_POOLS)
def test_analyses_of_pools(pool: PoolEvaluator, name: str, seen: set[tuple[str, int]]) -> None:
    OF_POOLS[name](pool)
    check(seen)
