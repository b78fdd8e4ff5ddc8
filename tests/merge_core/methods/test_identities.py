"""What must hold of a merge whatever the weights are: identities and closed forms."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from merge_core.methods import get_method, methods
from merge_core.suites.suite import Suite
from tests.merge_core.float64_reference import assert_same, average, merge, states

Make = Callable[..., Suite]
States = Callable[..., tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]]
seeds = st.integers(0, 10_000)
SETTINGS: dict[str, dict[str, Any]] = {"ties": {"density": 0.4}, "cart": {"rank": 2}}
SETTINGS["low_rank_task_arithmetic"] = {"rank": 2}
SETTINGS["knots"] = {"density": 0.4}
# One model from any number of experts, by their weights alone; the others have tests of their own.
PLAIN = [
    name
    for name, method in methods().items()
    if not method.indexed and method.tasks is None and method.learns is None
]
# Means on a sphere about zero: they know no origin that could move.
SPHERICAL = ("karcher",)


@given(seeds)
def test_one_expert_at_weight_one_gives_itself_back(synthetic_suite: Make, seed: int) -> None:
    suite = synthetic_suite(1, seed=seed)
    expected = states(suite)[0][0]
    for method, parameters in [
        ("average", {}),
        ("task_arithmetic", {"scale": 1}),
        ("ties", {"density": 1, "scale": 1}),
        ("ties", {"density": 1, "scale": 1, "trim": "tensor"}),
        ("low_rank_task_arithmetic", {"rank": 1.0, "scale": 1}),
        ("tsv_m", {"scale": 1}),
        ("cart", {"rank": 1}),
        ("cart", {"rank": 0.5, "scale": 3}),
    ]:
        assert_same(merge(suite, method, **parameters), expected, 1e-5)


@given(seeds, st.integers(1, 4))
def test_equal_experts_are_their_own_average(
    suite_of: Make, synthetic_states: States, seed: int, T: int
) -> None:
    members, base = synthetic_states(["only"], seed=seed)
    suite = suite_of({f"t{i}": members["only"] for i in range(T)}, base)
    expected = states(suite)[0][0]
    for method, parameters in [
        ("average", {}),
        ("task_arithmetic", {"scale": 1 / T}),
        ("ties", {"density": 1}),
        ("cart", {"rank": 2, "scale": 2}),
        ("low_rank_task_arithmetic", {"rank": 1.0, "scale": 1 / T}),
    ]:
        assert_same(merge(suite, method, **parameters), expected, 1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_the_order_of_the_experts_does_not_matter(
    suite_of: Make, synthetic_states: States, name: str
) -> None:
    members, base = synthetic_states(["a", "b", "c"], seed=8)
    merged = [
        merge(suite_of({t: members[t] for t in order}, base), name, **SETTINGS.get(name, {}))
        for order in itertools.permutations("abc")
    ]
    expected = {k: v.double().numpy() for k, v in merged[0].items() if v.is_floating_point()}
    for other in merged[1:]:
        assert_same(other, expected, 1e-5)


@pytest.mark.parametrize("name", [name for name in PLAIN if name not in SPHERICAL])
def test_moving_base_and_experts_together_moves_the_merge_by_as_much(
    suite_of: Make, synthetic_states: States, name: str
) -> None:
    dtype = torch.float64  # so that the shift does not cost the task vectors their digits
    members, base = synthetic_states(["a", "b", "c"], seed=9, dtype=dtype, counter=False)
    _, shift = synthetic_states([], seed=77, dtype=dtype, counter=False)

    def moved(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value + shift[key] for key, value in state.items()}

    here = merge(suite_of(members, base), name, **SETTINGS.get(name, {}))
    there = merge(
        suite_of({t: moved(s) for t, s in members.items()}, moved(base)),
        name,
        **SETTINGS.get(name, {}),
    )
    assert_same(there, {k: v.numpy() for k, v in moved(here).items()}, 1e-6)


@given(seeds, st.integers(1, 5), st.floats(-3, 5), st.sampled_from([1.0, 10, 99]))
def test_cart_with_all_directions_is_the_average(
    synthetic_suite: Make, seed: int, T: int, scale: float, rank: float
) -> None:
    suite = synthetic_suite(T, seed=seed)
    assert_same(merge(suite, "cart", rank=rank, scale=scale), average(suite), 1e-6)


@given(seeds, st.integers(1, 6), st.floats(-3, 5))
def test_cart_with_two_tasks_is_the_average_for_every_rank_and_scale(
    synthetic_suite: Make, seed: int, k: int, scale: float
) -> None:
    suite = synthetic_suite(2, seed=seed)
    assert_same(merge(suite, "cart", rank=k, scale=scale), average(suite), 1e-5)
    cart = get_method("cart")
    assert "two tasks" in cart.warnings(2, None)[0]
    assert cart.warnings(3, None) == []
    assert "one task" in cart.warnings(1, None)[0]


@given(seeds, st.integers(1, 6))
def test_scale_zero_is_the_origin_of_each_method(synthetic_suite: Make, seed: int, k: int) -> None:
    suite = synthetic_suite(3, seed=seed)
    mean, base = average(suite), states(suite)[1]
    assert_same(merge(suite, "cart", rank=k, scale=0), mean, 1e-6)
    for method in ("task_arithmetic", "ties"):
        assert_same(merge(suite, method, scale=0), base, 1e-6)
    spectral = {key: base[key] if key in suite.matrices else mean[key] for key in base}
    for method in ("low_rank_task_arithmetic", "tsv_m", "iso_c"):
        assert_same(merge(suite, method, scale=0), spectral, 1e-6)


@given(seeds, st.floats(-1, 2))
def test_low_rank_task_arithmetic_at_full_rank_is_task_arithmetic_on_matrices(
    synthetic_suite: Make, seed: int, scale: float
) -> None:
    suite = synthetic_suite(4, seed=seed)
    full = merge(suite, "task_arithmetic", scale=scale)
    low = merge(suite, "low_rank_task_arithmetic", rank=1.0, scale=scale)
    assert_same(low, {key: full[key].double().numpy() for key in suite.matrices}, 1e-5)


@given(seeds, st.integers(1, 6))
def test_task_arithmetic_at_one_over_t_is_the_average(
    synthetic_suite: Make, seed: int, T: int
) -> None:
    suite = synthetic_suite(T, seed=seed)
    assert_same(merge(suite, "task_arithmetic", scale=1 / T), average(suite), 1e-6)


def test_a_merge_is_affine_in_its_scale(synthetic_suite: Make) -> None:
    suite = synthetic_suite(4, seed=10)
    for name in PLAIN:
        if "scale" not in get_method(name).parameters.model_fields:
            continue
        zero, one, three = (
            merge(suite, name, **SETTINGS.get(name, {}), scale=s) for s in (0, 1, 3)
        )
        expected = {
            key: (zero[key] + 3 * (one[key] - zero[key])).double().numpy()
            for key in suite.parameters
            if zero[key].is_floating_point()
        }
        assert_same(three, expected, 1e-4)


# Closed forms: orthogonal rank-one task vectors σ_t u_t v_tᵀ on the axes of a 6 x 8 matrix.

SIGMAS = (4.0, 2.0, 1.0)


def rank_one_suite(suite_of: Make, sigmas: Sequence[float] = SIGMAS) -> Suite:
    base = torch.arange(48.0).reshape(6, 8) / 8
    members = {}
    for t, sigma in enumerate(sigmas):
        tau = torch.zeros(6, 8)
        tau[t, 7 - t] = sigma
        members[f"t{t}"] = {"w.weight": base + tau}
    return suite_of(members, {"w.weight": base})


def update_of(suite: Suite, method: str, **parameters: Any) -> np.ndarray:
    merged = merge(suite, method, **parameters)["w.weight"].double().numpy()
    return merged - states(suite)[1]["w.weight"]


def antidiagonal(values: Sequence[float]) -> np.ndarray:
    out = np.zeros((6, 8))
    for t, value in enumerate(values):
        out[t, 7 - t] = value
    return out


def test_tsv_m_adds_task_vectors_that_do_not_interfere(suite_of: Make) -> None:
    update = update_of(rank_one_suite(suite_of), "tsv_m", scale=1.5)
    np.testing.assert_allclose(update, 1.5 * antidiagonal(SIGMAS), atol=1e-5)


def test_iso_c_gives_orthogonal_tasks_the_mean_of_all_singular_values(suite_of: Make) -> None:
    # r = 6 singular values, three of them zero: their mean is Σσ/6.
    update = update_of(rank_one_suite(suite_of), "iso_c", scale=2)
    np.testing.assert_allclose(update, 2 * antidiagonal([sum(SIGMAS) / 6] * 3), atol=1e-5)


def test_low_rank_task_arithmetic_at_rank_one_keeps_rank_one_tasks_whole(suite_of: Make) -> None:
    update = update_of(rank_one_suite(suite_of), "low_rank_task_arithmetic", rank=1, scale=1)
    np.testing.assert_allclose(update, antidiagonal(SIGMAS), atol=1e-5)


def test_a_task_that_left_a_matrix_alone_does_not_disturb_the_others_in_tsv_m(
    suite_of: Make,
) -> None:
    # Its task vector is zero and has no directions: only σ counts, not a solver's filler.
    update = update_of(rank_one_suite(suite_of, (3.0, 0.0, 2.0)), "tsv_m")
    np.testing.assert_allclose(update, antidiagonal([3.0, 0.0, 2.0]), atol=1e-5)


def test_cart_of_three_orthogonal_tasks_by_hand(suite_of: Make) -> None:
    # C_t = τ_t − (τ_1 + τ_2 + τ_3)/3 with σ = 3 each: on the three axes C_1 is diag(2, −1, −1),
    # whose leading direction is the first axis, so the rank-one sum is diag(2, 2, 2).
    suite = rank_one_suite(suite_of, (3.0, 3.0, 3.0))
    update = update_of(suite, "cart", rank=1, scale=0.5)
    np.testing.assert_allclose(update, antidiagonal([1 + 0.5 * 2] * 3), atol=1e-5)


def test_tsv_m_splits_what_two_tasks_share(suite_of: Make) -> None:
    # Two equal rank-one tasks: [u u] = u·(1, 1) has the polar factor u·(1, 1)/√2 on both sides,
    # so Δ = u (σ/√2, σ/√2)·(1/√2, 1/√2)ᵀ vᵀ = σ u vᵀ: said twice, counted once.
    base = torch.zeros(6, 8)
    tau = torch.zeros(6, 8)
    tau[2, 5] = 4.0
    suite = suite_of({t: {"w.weight": tau} for t in "ab"}, {"w.weight": base})
    np.testing.assert_allclose(update_of(suite, "tsv_m"), tau.numpy(), atol=1e-5)
