"""Fisher, RegMean, AdaMerging and adaptive CART, given what was learnt: formulas, identities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from merge_core.errors import RecipeError
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.methods import get_method, methods
from merge_core.methods.adamerging import Coefficients, limits
from merge_core.methods.regmean import no_equations
from merge_core.progress import Progress
from merge_core.suites.suite import Suite
from tests.conftest import SHAPES
from tests.merge_core.float64_reference import assert_same, average, cart, states, svd_k
from tests.merge_core.float64_reference import merge as plain_merge
from tests.merge_core.sparse_reference import ties_sum

Make = Callable[..., Suite]
States = Callable[..., tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]]

LEARNT = ("fisher", "regmean", "regmean_plus_plus", "adamerging", "cart_adaptive")
COUNTER = "bn.num_batches_tracked"
MATRIX = "blocks.0.mlp.fc2.weight"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
seeds = st.integers(0, 10_000)


def merge(suite: Suite, method: str, learned: Any, **fields: Any) -> dict[str, Tensor]:
    recipe = make_recipe({"method": method, **fields})
    return MergeSession(suite, None, FactorStore()).merge(recipe, learned=learned)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(0.1, 2, shape))


def some_state(method: str, suite: Suite, seed: int = 0) -> Any:
    """A state of the right form, drawn at random."""
    T = len(suite.tasks)
    if method == "fisher":
        return {n: draw(seed, T, *s).float() for n, s in SHAPES.items()}
    if method.startswith("regmean"):
        return {MATRIX: draw(seed, *SHAPES[MATRIX])}
    values = {name: draw(seed + i, T).float() for i, name in enumerate(SHAPES)}
    return Coefficients(values) if method == "adamerging" else values


def test_these_are_the_methods_that_learn() -> None:
    assert {m.name for m in methods().values() if m.learns} == set(LEARNT)
    for name in LEARNT:
        method = get_method(name)
        assert method.data == "inputs"
        assert method.gradients == (not name.startswith("regmean"))


@pytest.mark.parametrize("name", LEARNT)
def test_nothing_is_merged_before_something_is_learnt(synthetic_suite: Make, name: str) -> None:
    with pytest.raises(RecipeError, match="learns from the suite's data"):
        merge(synthetic_suite(), name, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LEARNT)
def test_every_shape_and_dtype_is_merged(
    synthetic_suite: Make, name: str, dtype: torch.dtype
) -> None:
    suite = synthetic_suite(dtype=dtype)
    merged = merge(suite, name, some_state(name, suite))
    working = torch.float64 if dtype == torch.float64 else torch.float32
    for key, shape in SHAPES.items():
        assert merged[key].shape == shape
        assert merged[key].dtype == working
        assert torch.isfinite(merged[key]).all()
    assert merged[COUNTER].item() == 100


@pytest.mark.parametrize("name", LEARNT)
def test_equal_experts_that_are_the_base_stay(
    suite_of: Make, synthetic_states: States, name: str
) -> None:
    _, base = synthetic_states([], seed=3)
    suite = suite_of(dict.fromkeys("abc", base), base)
    # The update of equal layers is zero, as B is: see the tests of NormalEquations.
    state = {} if name.startswith("regmean") else some_state(name, suite)
    assert_same(merge(suite, name, state), states(suite)[1], 1e-6)


# Fisher


@given(seeds, st.integers(1, 5))
def test_fisher_is_the_weighted_mean(synthetic_suite: Make, seed: int, T: int) -> None:
    suite = synthetic_suite(T, seed=seed, with_base=False)
    F = some_state("fisher", suite, seed)
    experts, _ = states(suite)
    weights = {f"task{i}": 0.5 + i for i in range(T)}
    expected, weighted = {}, {}
    for name in SHAPES:
        f = F[name].double().numpy()
        theta = np.stack([e[name] for e in experts])
        w = np.array([*weights.values()]).reshape(-1, *[1] * (theta.ndim - 1))
        expected[name] = (f * theta).sum(0) / f.sum(0)
        weighted[name] = (w * f * theta).sum(0) / (w * f).sum(0)
    assert_same(merge(suite, "fisher", F), expected, 1e-6)
    assert_same(merge(suite, "fisher", F, weights=weights), weighted, 1e-6)


def test_fisher_by_hand(suite_of: Make) -> None:
    # (3·1 + 1·5)/4 = 2; the floor makes 0 and 1e-6 alike: the plain mean; 0 against 1 is 1's.
    a, b = torch.tensor([[1.0, 2.0], [4.0, 0.0]]), torch.tensor([[5.0, 6.0], [8.0, 0.0]])
    suite = suite_of({"a": {"w": a}, "b": {"w": b}})
    F = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[1.0, 1e-6], [1.0, 1.0]]])
    merged = merge(suite, "fisher", {"w": F})["w"]
    np.testing.assert_allclose(merged, [[2, 4], [8, 0]], rtol=1e-5)


def test_fisher_without_information_is_the_average(synthetic_suite: Make) -> None:
    suite = synthetic_suite()
    nothing = {name: torch.zeros(3, *shape) for name, shape in SHAPES.items()}
    for state in ({}, nothing):
        assert_same(merge(suite, "fisher", state), average(suite), 1e-6)


def test_the_scale_of_fisher_information_cancels(synthetic_suite: Make) -> None:
    suite = synthetic_suite()
    F = some_state("fisher", suite)
    one = merge(suite, "fisher", F)
    other = merge(suite, "fisher", {name: 100 * value for name, value in F.items()})
    for name in SHAPES:
        torch.testing.assert_close(one[name], other[name])


@pytest.mark.parametrize("weights", [{"task0": -1.0}, dict.fromkeys(["task0", "task1"], 0.0)])
def test_fisher_refuses_weights_that_leave_no_mean(
    synthetic_suite: Make, weights: dict[str, float]
) -> None:
    with pytest.raises(RecipeError, match="at least 0"):
        merge(synthetic_suite(2), "fisher", {}, weights=weights)


# RegMean


def fit(Ws: list[np.ndarray], Xs: list[np.ndarray], factor: float = 1.0) -> np.ndarray:
    """Average plus update, from weights (m x n) and inputs (rows x n)."""
    mean = np.mean(Ws, axis=0)
    equations = no_equations(*mean.shape)
    for W, X in zip(Ws, Xs, strict=True):
        equations.add(torch.from_numpy(W - mean), torch.from_numpy(X.T @ X), factor)
    return mean + equations.solve().numpy()


@given(seeds, st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
def test_regmean_is_the_least_squares_fit_of_all_outputs(seed: int, T: int, m: int, n: int) -> None:
    source = np.random.default_rng(seed)
    Ws = [source.normal(size=(m, n)) for _ in range(T)]
    # Channels of very different size, as after a rectifier.
    Xs = [source.normal(size=(n + 5 + t, n)) * 10.0 ** source.integers(-3, 3, n) for t in range(T)]
    stacked = np.vstack([X @ W.T for X, W in zip(Xs, Ws, strict=True)])
    expected = np.linalg.lstsq(np.vstack(Xs), stacked, rcond=None)[0].T
    np.testing.assert_allclose(fit(Ws, Xs), expected, rtol=1e-6, atol=1e-6)


@given(seeds, st.floats(0, 1))
def test_regmean_reduces_what_is_off_the_diagonal(seed: int, factor: float) -> None:
    source = np.random.default_rng(seed)
    Ws, Xs = source.normal(size=(3, 2, 4)), source.normal(size=(3, 9, 4))
    G = np.einsum("tri,trj->tij", Xs, Xs) * (factor + (1 - factor) * np.eye(4))
    expected = np.einsum("tmi,tij->mj", Ws, G) @ np.linalg.inv(G.sum(0))
    np.testing.assert_allclose(fit([*Ws], [*Xs], factor), expected, rtol=1e-8, atol=1e-8)


def test_regmean_by_hand() -> None:
    # One output, two inputs. Task 1 sees only the first channel, task 2 both alike:
    # G_1 = diag(4, 0), G_2 = [[1, 1], [1, 1]]; ΣG = [[5, 1], [1, 1]],
    # ΣW_tG_t = (4, 0) + (2, 2) with W_1 = (1, 9), W_2 = (0, 2): W = (6, 2) ΣG⁻¹ = (1, 1).
    W = fit([np.array([[1.0, 9.0]]), np.array([[0.0, 2.0]])],
               [np.array([[2.0, 0.0]]), np.array([[1.0, 1.0]])])  # fmt: skip
    np.testing.assert_allclose(W, [[1, 1]], atol=1e-12)


def test_directions_without_inputs_stay_at_the_average() -> None:
    Ws = [np.array([[1.0, 4.0, 2.0]]), np.array([[3.0, 8.0, 0.0]])]
    silent = np.array([[2.0, 0.0, 0.0], [1.0, 0.0, 0.0]])  # G is singular: two dead channels
    W = fit(Ws, [silent, np.sqrt(3) * silent])
    np.testing.assert_allclose(W, [[(1 + 3 * 3) / 4, 6, 1]], atol=1e-12)
    np.testing.assert_allclose(fit(Ws, [0 * silent] * 2), [[2, 6, 1]])
    # The same along a direction that is no channel: rows that always sum to zero.
    centred = np.random.default_rng(0).normal(size=(2, 8, 3))
    centred -= centred.mean(axis=2, keepdims=True)
    W = fit(Ws, [*centred])
    assert np.isfinite(W).all()
    np.testing.assert_allclose(W.sum(), np.mean(Ws, axis=0).sum(), rtol=1e-9)


def test_equal_layers_give_that_layer() -> None:
    source = np.random.default_rng(1)
    W, Xs = source.normal(size=(3, 4)), source.normal(size=(3, 2, 4))  # rank 2 of 4
    np.testing.assert_allclose(fit([W] * 3, [*Xs]), W, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", ["regmean", "regmean_plus_plus"])
def test_regmean_adds_what_was_learnt_and_averages_the_rest(
    synthetic_suite: Make, name: str
) -> None:
    suite = synthetic_suite(with_base=False)
    state = some_state(name, suite)
    expected = average(suite)
    expected[MATRIX] = expected[MATRIX] + state[MATRIX].numpy()
    assert_same(merge(suite, name, state), expected, 1e-6)


# AdaMerging


@given(seeds, st.integers(1, 5))
def test_adamerging_adds_each_vector_by_its_coefficient(
    synthetic_suite: Make, seed: int, T: int
) -> None:
    suite = synthetic_suite(T, seed=seed)
    state = some_state("adamerging", suite, seed)
    experts, base = states(suite)
    expected = {
        name: origin
        + sum(
            float(c) * (e[name] - origin) for c, e in zip(state.values[name], experts, strict=True)
        )
        for name, origin in base.items()
    }
    assert_same(merge(suite, "adamerging", state), expected)


@given(seeds, st.integers(1, 5))
def test_adamerging_plus_plus_takes_trimmed_and_elected_vectors(
    synthetic_suite: Make, seed: int, T: int
) -> None:
    suite = synthetic_suite(T, seed=seed)
    recipe = make_recipe({"method": "adamerging", "parameters": {"trimmed": "ties"}})
    session = MergeSession(suite, None, FactorStore())
    found = limits(session.groups, recipe.run(suite.tasks), Progress())
    values = {name: torch.full((T,), 0.4) for name in SHAPES}
    merged = session.merge(recipe, learned=Coefficients(values, found))
    # With equal coefficients that is TIES with the sum.
    assert_same(merged, ties_sum(suite, 0.2, 0.4, "global"))


def test_adamerging_shifts_with_the_base(suite_of: Make, synthetic_states: States) -> None:
    members, base = synthetic_states(["a", "b"], seed=5, counter=False)
    shift = {name: torch.full_like(value, 0.5) for name, value in base.items()}

    def moved(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value + shift[name] for name, value in state.items()}

    plain = suite_of(members, base)
    state = some_state("adamerging", plain)
    one = merge(plain, "adamerging", state)
    other = merge(suite_of({t: moved(s) for t, s in members.items()}, moved(base)),
                  "adamerging", state)  # fmt: skip
    for name in SHAPES:
        torch.testing.assert_close(other[name], one[name] + shift[name], rtol=1e-4, atol=1e-5)


# CART with test-time adaptation


@given(seeds, st.integers(1, 5), st.integers(1, 12))
def test_adaptive_cart_adds_each_truncation_by_its_coefficient(
    synthetic_suite: Make, seed: int, T: int, k: int
) -> None:
    suite = synthetic_suite(T, seed=seed, with_base=False)
    state = some_state("cart_adaptive", suite, seed)
    experts, _ = states(suite)
    expected = average(suite)
    for name in suite.matrices:
        mean = expected[name]
        rows = (mean.shape[0], -1)
        parts = [svd_k((e[name] - mean).reshape(rows), k).reshape(mean.shape) for e in experts]
        expected[name] = mean + sum(
            float(c) * part for c, part in zip(state[name], parts, strict=True)
        )
    assert_same(merge(suite, "cart_adaptive", state, parameters={"rank": k}), expected)


@given(seeds, st.sampled_from([0.1, 0.4, 1.0, 2, 100]))
def test_equal_coefficients_are_cart(synthetic_suite: Make, seed: int, rank: float | int) -> None:
    suite = synthetic_suite(4, seed=seed)
    state = {name: torch.full((4,), 1.7) for name in suite.matrices}
    merged = merge(suite, "cart_adaptive", state, parameters={"rank": rank})
    theirs = plain_merge(suite, "cart", rank=rank, scale=1.7)
    assert_same(merged, {n: v.double().numpy() for n, v in theirs.items() if n in SHAPES})


def test_adaptive_cart_of_one_task_is_the_expert(synthetic_suite: Make) -> None:
    suite = synthetic_suite(1)
    merged = merge(suite, "cart_adaptive", some_state("cart_adaptive", suite))
    assert_same(merged, cart(suite, lambda r: r, 1.0), 1e-7)
    warn = get_method("cart_adaptive").warnings
    parameters = get_method("cart_adaptive").parameters()
    assert "expert itself" in warn(1, parameters)[0]
    assert "each other's negative" in warn(2, parameters)[0]
    assert warn(3, parameters) == []
