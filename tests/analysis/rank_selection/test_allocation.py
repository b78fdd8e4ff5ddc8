"""Ranks per layer against brute force over all allocations, and against plain merges."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.accuracy import mean_accuracy
from analysis.evaluation.evaluator import Evaluator
from analysis.rank_selection.allocation import (
    ALLOCATIONS,
    _fill,
    allocate,
    compare_with_uniform,
    stored_numbers,
    uniform_ranks,
    with_ranks,
)
from analysis.rank_selection.space import search_space
from merge_core.errors import RecipeError
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.suites.suite import Suite
from merge_core.task_vectors import TensorGroups
from tests.analysis.tiny_suite import CONV, FC, MATRICES, QKV, TASKS, random_states, write_suite
from tests.evaluable import copy_evaluable

GAINS = st.lists(st.floats(0, 5), min_size=1, max_size=4).map(
    lambda values: np.array(sorted(values, reverse=True))
)


def best(worth: list[np.ndarray], costs: list[int], budget: int) -> float:
    """The largest total gain of all allocations that fit, one direction at least each."""
    return max(
        sum(w[:k].sum() for w, k in zip(worth, ks, strict=True))
        for ks in product(*(range(1, w.size + 1) for w in worth))
        if sum(k * c for k, c in zip(ks, costs, strict=True)) <= budget
    )


@given(st.lists(GAINS, min_size=2, max_size=4), st.integers(0, 10))
def test_with_one_price_the_fill_is_the_best_of_all(worth: list[np.ndarray], extra: int) -> None:
    costs = [3] * len(worth)
    budget = 3 * (len(worth) + extra)
    kept = _fill(worth, costs, budget)
    assert 3 * sum(kept) <= budget
    gained = sum(w[:k].sum() for w, k in zip(worth, kept, strict=True))
    assert gained == pytest.approx(best(worth, costs, budget))


@given(st.lists(st.tuples(GAINS, st.integers(1, 7)), min_size=2, max_size=4), st.integers(0, 40))
def test_with_several_prices_it_misses_less_than_one_direction(
    matrices: list[tuple[np.ndarray, int]], extra: int
) -> None:
    worth, costs = [w for w, _ in matrices], [c for _, c in matrices]
    budget = sum(costs) + extra
    kept = _fill(worth, costs, budget)
    spent = sum(k * c for k, c in zip(kept, costs, strict=True))
    assert spent <= budget
    gained = sum(w[:k].sum() for w, k in zip(worth, kept, strict=True))
    largest = max((w[1] for w in worth if w.size > 1), default=0.0)
    assert gained >= best(worth, costs, budget) - largest - 1e-9
    for w, c, k in zip(worth, costs, kept, strict=True):
        assert k == w.size or budget - spent < c


def test_what_counts_is_the_gain_per_number_stored() -> None:
    cheap, dear = np.array([5.0] + [3.0] * 10), np.array([5.0, 4.0])
    assert _fill([cheap, dear], [1, 10], budget=21) == [11, 1]


def test_what_a_direction_is_worth_by_each_rule() -> None:
    S = np.array([2.0, 1.0, 1.0])
    worth = {name: gain(S).tolist() for name, (_, gain) in ALLOCATIONS.items()}
    assert worth["energy"] == [4, 1, 1]
    assert worth["relative_energy"] == pytest.approx([4 / 6, 1 / 6, 1 / 6])
    assert worth["nuclear"] == pytest.approx([0.5, 0.25, 0.25])


def test_the_budget_is_the_storage_of_the_uniform_rank(groups: TensorGroups) -> None:
    sizes = {QKV: (12, 8), FC: (9, 14), CONV: (6, 12)}
    ranks = {QKV: 3, FC: 1, CONV: 2}
    expected = len(TASKS) * sum(k * (sum(sizes[name]) + 1) for name, k in ranks.items())
    assert stored_numbers(groups, ranks) == expected
    assert uniform_ranks(groups, 0.5) == {QKV: 4, FC: 4, CONV: 3}
    for rule in ALLOCATIONS:
        for share in (0.1, 0.5, 0.8):
            kept = allocate(groups, "average", share, rule)
            left = stored_numbers(groups, uniform_ranks(groups, share)) - stored_numbers(
                groups, kept
            )
            assert left >= 0
            for name in MATRICES:
                assert 1 <= kept[name] <= min(sizes[name])
                full = kept[name] == min(sizes[name])
                assert full or left < len(TASKS) * (sum(sizes[name]) + 1)
        assert allocate(groups, "average", 1.0, rule) == uniform_ranks(groups, 1.0)


def grow(tmp_path: Path, factor: float) -> TensorGroups:
    """The tiny suite with the task vectors of one matrix made longer."""
    base, experts = random_states()
    for state in experts.values():
        state[FC] = base[FC] + factor * (state[FC] - base[FC])
    suite = write_suite(tmp_path / f"grown{factor}", base, experts)
    return TensorGroups(suite, None, FactorStore(tmp_path / "factors"))


def test_only_the_plain_energy_favours_matrices_that_moved_far(tmp_path: Path) -> None:
    usual, far = grow(tmp_path, 1.0), grow(tmp_path, 50.0)
    for rule in ("relative_energy", "nuclear"):
        assert allocate(far, "base", 0.5, rule) == allocate(usual, "base", 0.5, rule)
    assert allocate(far, "base", 0.5, "energy")[FC] > allocate(usual, "base", 0.5, "energy")[FC]


def test_matrices_with_one_spectrum_share_alike(tmp_path: Path) -> None:
    names = ("blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight")
    g = torch.Generator().manual_seed(0)
    vectors = [torch.randn(6, 6, generator=g) for _ in range(3)]
    base = {name: torch.zeros(6, 6) for name in names}
    experts = {
        f"t{i}": {names[0]: v.clone(), names[1]: v.flip(0).contiguous()}
        for i, v in enumerate(vectors)
    }
    suite = write_suite(tmp_path / "s", base, experts)
    groups = TensorGroups(suite, None, FactorStore(tmp_path / "f"))
    for rule in ALLOCATIONS:
        assert allocate(groups, "average", 0.5, rule) == {names[0]: 3, names[1]: 3}


def test_every_task_counts(tmp_path: Path) -> None:
    """Two matrices, of which one task moves the first and two others the second."""
    names = ("blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight")
    still, moved = torch.zeros(6, 6), torch.eye(6)
    experts = {
        task: {names[0]: first.clone(), names[1]: second.clone()}
        for task, first, second in (("a", moved, still), ("b", still, moved), ("c", still, moved))
    }
    suite = write_suite(tmp_path / "s", {name: still.clone() for name in names}, experts)
    groups = TensorGroups(suite, None, FactorStore(tmp_path / "f"))
    assert allocate(groups, "base", 0.5, "energy") == {names[0]: 1, names[1]: 5}


def test_ranks_become_overrides_of_exactly_those_parameters() -> None:
    recipe = with_ranks(search_space("cart", "vision").recipe(0.5, 2.0), {"a[0].weight": 3, "b": 5})
    assert recipe.parameters_of("a[0].weight").rank == 3
    assert recipe.parameters_of("a0.weight").rank == 0.5
    assert recipe.parameters_of("b").rank == 5
    assert recipe.parameters_of("b").scale == 2.0
    with pytest.raises(RecipeError):
        with_ranks(search_space("task_arithmetic", "vision").recipe(None, 1.0), {"b": 5})


def test_unknown_rules_are_refused(groups: TensorGroups) -> None:
    with pytest.raises(RecipeError, match="relative_energy"):
        allocate(groups, "average", 0.5, "nothing")


def test_comparison_is_that_of_plain_merges(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    suite: Suite = copy_evaluable(tmp_path / "suite")
    evaluator, session = Evaluator(suite), MergeSession(suite, None, FactorStore(tmp_path / "f"))
    space = search_space("cart", str(suite.path), None)
    frame = compare_with_uniform(space, session, evaluator, [0.3], [0.5, 2.0], ["nuclear"])
    assert frame["rule"].tolist() == ["uniform", "nuclear"]
    plain = {
        s: mean_accuracy(evaluator.recipe(space.recipe(0.3, s), session)).iloc[0]
        for s in (0.5, 2.0)
    }
    scale = max(plain, key=lambda s: plain[s]["accuracy"])
    uniform, own = frame.to_dict("records")
    for column in ("accuracy", "low", "high"):
        assert uniform[column] == pytest.approx(plain[scale][column])
    assert (uniform["gain"], uniform["gain_low"], uniform["gain_high"]) == (0, 0, 0)
    ranks = allocate(session.groups, "average", 0.3, "nuclear")
    assert own["numbers"] == stored_numbers(session.groups, ranks) <= uniform["numbers"]
    merged = with_ranks(space.recipe(None, own["scale"]), ranks)
    accuracy = mean_accuracy(evaluator.recipe(merged, session))["accuracy"].iloc[0]
    assert own["accuracy"] == pytest.approx(accuracy)
    assert own["gain"] == pytest.approx(accuracy - uniform["accuracy"])
    assert own["gain"] != 0
    assert own["gain_low"] <= own["gain"] <= own["gain_high"]
