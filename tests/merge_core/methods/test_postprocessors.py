"""Subspace Boosting and SVC: by hand, against references, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.methods import get_method, methods
from merge_core.suites.suite import Suite
from tests.merge_core.float64_reference import Array, assert_same, merge, states

Make = Callable[..., Suite]
Matrix = Sequence[Sequence[float]]
seeds = st.integers(0, 10_000)
KERNEL = "conv.weight"


def chain(suite: Suite, method: str, *steps: tuple[str, dict[str, Any]], **fields: Any):
    """A method followed by post-processors, as the engine merges it."""
    then = [{"method": name, "parameters": parameters} for name, parameters in steps]
    recipe = make_recipe({"method": method, "then": then, **fields})
    with torch.inference_mode():
        return MergeSession(suite, None, FactorStore()).merge(recipe)


def of(suite_of: Make, *taus: Matrix, base: float = 0.0) -> Suite:
    start = torch.full_like(torch.tensor(taus[0]), base)
    return suite_of(
        {f"t{i}": {"w.weight": start + torch.tensor(tau)} for i, tau in enumerate(taus)},
        {"w.weight": start},
    )


def sum_update(suite: Suite, post: str, **parameters: float) -> np.ndarray:
    """Σ τ of the one matrix after a post-processor."""
    steps = ((post, parameters),)
    merged = chain(suite, "task_arithmetic", *steps, parameters={"scale": 1})["w.weight"]
    return merged.double().numpy()


def boost(update: Array, beta: float) -> Array:
    """Entry by entry down the spectrum, in plain numpy."""
    U, S, Vt = np.linalg.svd(update, full_matrices=False)
    reached, k = S[0], 0
    while reached < beta * S.sum() * (1 - 1e-12):
        k += 1
        reached += S[k]
    return U @ np.diag([max(s, S[k]) for s in S]) @ Vt


def calibrate(update: Array, taus: list[Array], floor: float) -> Array:
    U, S, Vt = np.linalg.svd(update, full_matrices=False)
    total = np.zeros_like(update)
    for r in range(len(S)):
        a, s = U[:, r] @ update, []
        for tau in taus:
            own = U[:, r] @ tau
            s.append(max(floor / len(taus), a @ own / (own @ own)))
        total += len(taus) / sum(s) * S[r] * np.outer(U[:, r], Vt[r])
    return total


class TestSubspaceBoosting:
    @pytest.mark.parametrize(
        ("beta", "expected"),
        [
            (0.0, [4, 4, 4, 4]),  # the first value reaches it
            (0.5, [4, 4, 4, 4]),  # 4 of 8
            (0.51, [4, 2, 2, 2]),
            (0.75, [4, 2, 2, 2]),  # 6 of 8
            (0.76, [4, 2, 1, 1]),
            (1.0, [4, 2, 1, 1]),
        ],
    )
    def test_by_hand(self, suite_of: Make, beta: float, expected: list[float]) -> None:
        suite = of(suite_of, np.diag([4.0, 2, 0, 1]).tolist(), np.diag([0.0, 0, 1, 0]).tolist())
        result = sum_update(suite, "subspace_boosting", beta=beta)
        assert np.linalg.svd(result, compute_uv=False) == pytest.approx(expected, abs=1e-5)
        assert np.count_nonzero(np.abs(result) > 1e-5) == 4  # the directions stay the axes

    @given(seeds, st.floats(0, 1))
    def test_follows_its_formula(self, synthetic_suite: Make, seed: int, beta: float) -> None:
        suite = synthetic_suite(3, seed=seed, dtype=torch.float64)
        base = states(suite)[1]
        plain = merge(suite, "task_arithmetic")
        result = chain(suite, "task_arithmetic", ("subspace_boosting", {"beta": beta}))
        for name in suite.matrices:
            shape = base[name].shape
            update = (plain[name].numpy() - base[name]).reshape(shape[0], -1)
            expected = base[name] + boost(update, beta).reshape(shape)
            assert result[name].numpy() == pytest.approx(expected, abs=1e-9), name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_an_update_of_low_rank_keeps_its_rank(
        self, synthetic_suite: Make, dtype: torch.dtype
    ) -> None:
        suite = synthetic_suite(2, shapes={"w.weight": (40, 30)}, seed=1, dtype=dtype)
        parameters = {"rank": 3, "scale": 1.0}
        step = ("subspace_boosting", {"beta": 0.0})
        result = chain(suite, "low_rank_task_arithmetic", step, parameters=parameters)
        update = result["w.weight"].double().numpy() - states(suite)[1]["w.weight"]
        S = np.linalg.svd(update, compute_uv=False)
        assert S[:6] == pytest.approx([S[0]] * 6, rel=1e-3)
        assert S[6:].max() < 1e-4 * S[0]


class TestSvc:
    def test_by_hand(self, suite_of: Make) -> None:
        # Each direction is of one task: s = (1, 0), so γ = 2 / (1 + 1/2).
        apart = of(suite_of, [[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 3.0]])
        expected = np.diag([8 / 3, 4.0])
        assert sum_update(apart, "svc") == pytest.approx(expected, abs=1e-5)
        # A floor of 2/T = 1 makes γ = 2 / (1 + 1).
        assert sum_update(apart, "svc", floor=2.0) == pytest.approx(np.diag([2.0, 3.0]), abs=1e-5)
        # One shared direction: Δ = 4, s = (4, 4/3), γ = 2 / (16/3), so 1.5 in place of 4.
        shared = of(suite_of, [[1.0, 0.0], [0.0, 0.0]], [[3.0, 0.0], [0.0, 0.0]])
        assert sum_update(shared, "svc") == pytest.approx(np.diag([1.5, 0.0]), abs=1e-5)
        # Opposite ones: Δ = 2, s = (−2, 2/3) counts (1/2, 2/3): γ = 2 / (7/6).
        against = of(suite_of, [[-1.0, 0.0], [0.0, 0.0]], [[3.0, 0.0], [0.0, 0.0]])
        assert sum_update(against, "svc") == pytest.approx(np.diag([24 / 7, 0.0]), abs=1e-5)

    @given(seeds, st.integers(1, 4), st.sampled_from([0.5, 1.0, 3.0]))
    def test_follows_its_formula(
        self, synthetic_suite: Make, seed: int, T: int, floor: float
    ) -> None:
        suite = synthetic_suite(T, seed=seed, dtype=torch.float64)
        experts, base = states(suite)
        plain = merge(suite, "task_arithmetic")
        result = chain(suite, "task_arithmetic", ("svc", {"floor": floor}))
        for name in suite.matrices:
            rows = (base[name].shape[0], -1)
            update = (plain[name].numpy() - base[name]).reshape(rows)
            taus = [(e[name] - base[name]).reshape(rows) for e in experts]
            expected = base[name] + calibrate(update, taus, floor).reshape(base[name].shape)
            assert result[name].numpy() == pytest.approx(expected, abs=1e-8), name

    def test_task_vectors_are_about_the_recipes_origin(self, synthetic_suite: Make) -> None:
        suite = synthetic_suite(3, seed=2, dtype=torch.float64)
        experts, _ = states(suite)
        plain = merge(suite, "cart", rank=2)
        result = chain(suite, "cart", ("svc", {}), parameters={"rank": 2})
        name = "blocks.0.mlp.fc2.weight"
        mean = sum(e[name] for e in experts) / 3
        centred = [e[name] - mean for e in experts]
        expected = mean + calibrate(plain[name].numpy() - mean, centred, 1.0)
        # CART's factors are float32, so its small directions are not exact.
        assert result[name].numpy() == pytest.approx(expected, abs=1e-4)

    def test_per_task_weights_scale_what_a_task_should_contribute(self, suite_of: Make) -> None:
        suite = of(suite_of, [[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]])
        fields = {"weights": {"t0": 3.0}, "parameters": {"scale": 1}}
        result = chain(suite, "task_arithmetic", ("svc", {}), **fields)["w.weight"]
        # Δ = 3 + 1; s = (4/3, 4): γ = 2 / (16/3).
        assert result.tolist() == [[pytest.approx(1.5), 0], [0, 0]]

    @given(seeds, st.floats(1, 10))
    def test_equal_experts_come_back_whatever_the_scale(
        self, suite_of: Make, seed: int, scale: float
    ) -> None:
        tau = np.random.default_rng(seed).normal(size=(4, 3)).tolist()
        suite = of(suite_of, tau, tau, tau)
        step = ("svc", {})
        result = chain(suite, "task_arithmetic", step, parameters={"scale": scale})["w.weight"]
        assert result.numpy() == pytest.approx(np.array(tau), abs=1e-4)

    def test_rounding_is_no_contribution_of_a_task(self, suite_of: Make) -> None:
        # The second task left the first's direction alone but for the rounding of its weights.
        base = torch.full((2, 2), 1.0)
        first, second = base.clone(), base.clone()
        first[0, 0] += 2.0
        second[1, 1] += 3.0
        second[0] *= 1 + 2**-23
        suite = suite_of({"a": {"w.weight": first}, "b": {"w.weight": second}}, {"w.weight": base})
        step = ("svc", {})
        result = chain(suite, "task_arithmetic", step, parameters={"scale": 1})["w.weight"]
        expected = [[1 + 8 / 3, 1], [1, 1 + 4.0]]
        assert result.numpy() == pytest.approx(np.array(expected), rel=1e-4)


POSTS = ("subspace_boosting", "svc")


@pytest.mark.parametrize("post", POSTS)
@pytest.mark.parametrize("method", ["average", "task_arithmetic", "cart", "tsv_m", "ties"])
def test_only_weight_matrices_change(synthetic_suite: Make, post: str, method: str) -> None:
    suite = synthetic_suite(3, seed=3)
    before, after = merge(suite, method), chain(suite, method, (post, {}))
    assert KERNEL in suite.matrices
    for name, value in after.items():
        assert value.shape == before[name].shape
        assert value.dtype == before[name].dtype
        assert bool(value.double().isfinite().all())
        if name not in suite.matrices or method == "average":  # the average is its own origin
            assert torch.equal(value, before[name]), name
    if method != "average":
        assert not torch.equal(after[KERNEL], before[KERNEL])


@pytest.mark.parametrize("post", POSTS)
def test_nothing_merged_stays_nothing(
    suite_of: Make, synthetic_states: Callable, post: str
) -> None:
    _, base = synthetic_states([], seed=3)
    suite = suite_of(dict.fromkeys("abc", base), base)
    assert_same(chain(suite, "task_arithmetic", (post, {})), states(suite)[1], 1e-6)
    zero = {key: torch.zeros_like(value) for key, value in base.items()}
    result = chain(suite_of({"a": zero, "b": zero}, zero), "task_arithmetic", (post, {}))
    assert not any(value.any() for value in result.values())


@pytest.mark.parametrize("post", POSTS)
@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_tiny_and_huge_weights(
    suite_of: Make, synthetic_states: Callable, post: str, factor: float
) -> None:
    members, base = synthetic_states(["a", "b", "c"], seed=6, counter=False)
    plain = chain(suite_of(members, base), "task_arithmetic", (post, {}))

    def scaled(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: (value.double() * factor).float() for key, value in state.items()}

    suite = suite_of({t: scaled(s) for t, s in members.items()}, scaled(base))
    for key, value in chain(suite, "task_arithmetic", (post, {})).items():
        got = value.double().numpy() / factor
        np.testing.assert_allclose(got, plain[key].numpy(), rtol=1e-3, atol=1e-3, err_msg=key)


def test_a_chain_is_applied_in_its_order(suite_of: Make) -> None:
    suite = of(suite_of, [[4.0, 0.0], [0.0, 1.0]], [[4.0, 0.0], [0.0, 0.0]])
    boost, svc = ("subspace_boosting", {"beta": 0.0}), ("svc", {})
    one = {"parameters": {"scale": 1}}
    # Σ τ = diag(8, 1). SVC: s = (2, 2) and (1, 0) give diag(4, 4/3); boosted, 4 and 4.
    first = chain(suite, "task_arithmetic", svc, boost, **one)["w.weight"]
    assert first.numpy() == pytest.approx(np.diag([4.0, 4.0]), abs=1e-5)
    # Boosted to 8 and 8 first: along e2 s = (8, 0), γ = 2 / 8.5.
    second = chain(suite, "task_arithmetic", boost, svc, **one)["w.weight"]
    assert second.numpy() == pytest.approx(np.diag([4.0, 16 / 8.5]), abs=1e-5)


class TestEqualSingularValues:
    """Where singular values are equal, single directions mean nothing, and a recipe says so."""

    @staticmethod
    def said(method: str, *steps: tuple[str, dict[str, float]]) -> list[str]:
        then = [{"method": name, "parameters": parameters} for name, parameters in steps]
        return make_recipe({"method": method, "then": then}).warnings(["a", "b", "c"])

    def test_the_declaration_is_true(self, synthetic_suite: Make) -> None:
        # Every method whose updates come out with one singular value says that they do.
        suite = synthetic_suite(3, seed=5)
        base = states(suite)[1][KERNEL]
        for name, method in methods().items():
            if method.learns or method.indexed or method.tasks or not method.origins:
                continue
            update = (merge(suite, name)[KERNEL].numpy() - base).reshape(len(base), -1)
            S = np.linalg.svd(update, compute_uv=False)
            live = S[S > 1e-4 * S[0]]
            assert (live[-1] > 0.999 * live[0]) == method.isotropic, name

    @pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
    def test_a_method_that_makes_them_equal(self, method: str) -> None:
        (text,) = self.said(method, ("svc", {}))
        assert get_method(method).title in text
        assert "SVC" in text

    def test_a_step_that_makes_them_equal(self) -> None:
        boost = ("subspace_boosting", {"beta": 0.01})
        assert "Subspace Boosting" in self.said("task_arithmetic", boost, ("svc", {}))[0]
        assert "Subspace Boosting" in self.said("iso_c", boost, ("svc", {}))[0]
        assert self.said("task_arithmetic", ("subspace_boosting", {"beta": 1.0}), ("svc", {})) == []

    def test_what_is_well_posed_is_not_warned_of(self) -> None:
        assert self.said("iso_c", ("subspace_boosting", {})) == []
        assert self.said("tsv_m", ("svc", {})) == []
        assert self.said("iso_c") == []
        assert len(self.said("iso_c", ("svc", {}), ("svc", {}))) == 1  # γ tells them apart again
