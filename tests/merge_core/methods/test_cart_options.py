"""CART's energy rule and per-layer ranks."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.methods import get_method
from merge_core.methods.spectral import energy_rank
from merge_core.suites.suite import Suite
from tests.merge_core.float64_reference import assert_same, average, cart, merge
from tests.merge_core.spectral_reference import cart_energy

Make = Callable[..., Suite]
seeds = st.integers(0, 10_000)
scales = st.floats(-2, 3).map(lambda x: round(x, 3))
# Shares that no spectrum of the tests hits exactly, where rounding would decide.
energies = st.integers(1, 98).map(lambda x: x / 100 + 0.00371)


@given(seeds, st.integers(1, 5), energies, scales)
def test_the_energy_rule_follows_its_formula(
    synthetic_suite: Make, seed: int, T: int, energy: float, scale: float
) -> None:
    suite = synthetic_suite(T, seed=seed, with_base=False)
    result = merge(suite, "cart_energy", energy=energy, scale=scale)
    assert_same(result, cart_energy(suite, energy, scale))


@pytest.mark.parametrize(
    ("S", "energy", "k"),
    [
        ([2.0, 1, 1], 0.0, 1),
        ([2.0, 1, 1], 0.66, 1),  # 4 of 6
        ([2.0, 1, 1], 0.67, 2),
        ([2.0, 1, 1], 0.84, 3),
        ([2.0, 1, 1], 1.0, 3),
        ([3.0, 4.0 / 3, 0, 0], 1.0, 2),  # what carries nothing is not kept
        ([5.0], 0.3, 1),
        ([0.0, 0.0], 0.5, 0),  # nothing is left out by keeping nothing
        ([0.0, 0.0], 0.0, 0),
        ([], 0.5, 0),
        ([1e-30, 1e-30], 0.9, 2),  # squares below float32's range
    ],
)
def test_the_fewest_directions_that_reach_the_energy(S: list[float], energy: float, k: int) -> None:
    assert energy_rank(torch.tensor(S), energy) == k


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30), st.floats(0, 1))
def test_the_energy_is_reached_and_not_with_one_less(values: list[float], share: float) -> None:
    """Against exact fractions, but for what double precision rounds."""
    S = sorted(values, reverse=True)
    k = energy_rank(torch.tensor(S, dtype=torch.float64), share)
    energies = [Fraction(value) ** 2 for value in S]
    wanted, slack = Fraction(share) * sum(energies), Fraction(1, 10**12)
    assert sum(energies[:k]) >= wanted * (1 - slack)
    assert k == 1 or sum(energies[: k - 1]) < wanted * (1 + slack)


@pytest.mark.parametrize("share", [1.2, -0.5, float("nan")])
def test_impossible_shares_of_energy_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        energy_rank(torch.ones(3), share)


@pytest.mark.parametrize("energy", [0.0, 0.5, 0.9])
def test_what_no_task_or_one_task_leaves_as_it_is(suite_of: Make, energy: float) -> None:
    """Vectors of zeros have rank 0, beside others that have more."""
    same = torch.arange(12.0).reshape(3, 4)
    moved = {f"t{i}": torch.diag(torch.tensor([d, 0.0, 0.0])) for i, d in enumerate((0, 3, -3))}
    suite = suite_of({t: {"a.weight": same, "b.weight": m + 1} for t, m in moved.items()})
    result = merge(suite, "cart_energy", energy=energy)
    assert torch.equal(result["a.weight"], same)
    assert result["b.weight"].numpy() == pytest.approx(np.ones((3, 3)), abs=1e-6)


def test_each_task_and_matrix_has_a_rank_of_its_own(suite_of: Make) -> None:
    # Centred: C_1 = diag(6, 0, −1)…: a spectrum of one strong, one of two equal directions.
    thetas = [np.diag([9.0, 0, 0]), np.diag([0.0, 3, -3]), np.diag([0.0, -3, 3])]
    suite = suite_of({f"t{i}": {"w.weight": torch.tensor(t)} for i, t in enumerate(thetas)})
    result = merge(suite, "cart_energy", energy=0.8)["w.weight"].numpy()
    # Mean diag(3, 0, 0). C_1 = diag(6, 0, 0) needs one direction; C_2 = diag(−3, 3, −3) needs all
    # three at 0.8 (two carry 2/3), and so does C_3, so that they leave diag(−6, 0, 0): the mean.
    assert result == pytest.approx(np.diag([3.0, 0, 0]), abs=1e-5)
    low = merge(suite, "cart", rank=1)["w.weight"].numpy()
    assert np.abs(low - np.diag([3.0, 0, 0])).max() > 1


@given(seeds, st.integers(1, 4), scales)
def test_all_of_the_energy_is_the_average_and_none_is_rank_one(
    synthetic_suite: Make, seed: int, T: int, scale: float
) -> None:
    suite = synthetic_suite(T, seed=seed)
    plain = merge(suite, "average")  # exactly: the rounding of the factors must not show
    for name, value in merge(suite, "cart_energy", energy=1.0, scale=scale).items():
        assert torch.equal(value, plain[name])
    nearly = merge(suite, "cart_energy", energy=0.9999999, scale=scale)
    assert_same(nearly, average(suite), 5e-3)
    none = merge(suite, "cart_energy", energy=0.0, scale=scale)
    assert_same(none, cart(suite, lambda r: 1, scale))


@given(seeds, energies, scales)
def test_two_tasks_give_the_average(
    synthetic_suite: Make, seed: int, energy: float, scale: float
) -> None:
    suite = synthetic_suite(2, seed=seed)
    assert_same(merge(suite, "cart_energy", energy=energy, scale=scale), average(suite), 1e-5)
    assert "two tasks" in get_method("cart_energy").warnings(2, None)[0]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_every_dtype_and_shape(synthetic_suite: Make, dtype: torch.dtype) -> None:
    suite = synthetic_suite(3, dtype=dtype, seed=5)
    result = merge(suite, "cart_energy", energy=0.6)
    assert_same(result, cart_energy(suite, 0.6, 1.0), 2e-5)


def test_ranks_per_layer_come_from_overrides(synthetic_suite: Make) -> None:
    suite = synthetic_suite(3, seed=4)
    document = {
        "method": "cart",
        "parameters": {"rank": 2},
        "overrides": [
            {"match": "blocks.0.*", "parameters": {"rank": 4}},
            {"match": "*.fc2.weight", "parameters": {"rank": 0.5}},
        ],
    }
    with torch.inference_mode():
        result = MergeSession(suite, None, FactorStore()).merge(make_recipe(document))
    ranks = {
        "blocks.0.attn.qkv.weight": lambda r: 4,
        "blocks.0.mlp.fc2.weight": lambda r: r // 2,
        "conv.weight": lambda r: 2,
    }
    assert set(ranks) == set(suite.matrices)
    for name, k in ranks.items():
        assert_same(result, {name: cart(suite, k, 1.0)[name]})


def test_carts_own_parameters_are_what_shipped_recipes_hash() -> None:
    # A new field would change the digest of every CART recipe, and orphan its predictions.
    assert list(get_method("cart").parameters.model_fields) == ["rank", "scale"]
