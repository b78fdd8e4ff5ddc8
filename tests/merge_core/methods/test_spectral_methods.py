"""Iso-CTS, WUDI and KnOTS: by hand, against float64 references, and their identities."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from merge_core.methods.iso_cts import split
from merge_core.methods.wudi import descend, normal_equations
from merge_core.suites.suite import Suite
from tests.merge_core.float64_reference import (
    assert_same,
    average,
    iso_c,
    merge,
    states,
    task_arithmetic,
)
from tests.merge_core.spectral_reference import SPECTRAL_REFERENCES, iso_cts, knots, wudi, wudi_of

Make = Callable[..., Suite]
Matrix = Sequence[Sequence[float]]
seeds = st.integers(0, 10_000)
experts = st.integers(1, 5)
scales = st.floats(-2, 3).map(lambda x: round(x, 3))
shares = st.floats(0, 1).map(lambda x: round(x, 3))
SPECTRAL = ("iso_cts", "wudi", "knots")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def of(suite_of: Make, *taus: Matrix, base: float = 0.0) -> Suite:
    """A suite of one matrix whose task vectors are these."""
    start = torch.full_like(torch.tensor(taus[0]), base)
    return suite_of(
        {f"t{i}": {"w.weight": start + torch.tensor(tau)} for i, tau in enumerate(taus)},
        {"w.weight": start},
    )


def merge_matrix(suite: Suite, method: str, **parameters: Any) -> np.ndarray:
    return merge(suite, method, **parameters)["w.weight"].double().numpy()


class TestIsoCts:
    @given(seeds, experts, shares, scales)
    def test_follows_its_formula(
        self, synthetic_suite: Make, seed: int, T: int, common: float, scale: float
    ) -> None:
        suite = synthetic_suite(T, seed=seed)
        result = merge(suite, "iso_cts", common=common, scale=scale)
        assert_same(result, iso_cts(suite, common, scale), 1e-4)

    def test_by_hand(self, suite_of: Make) -> None:
        # Σ τ = diag(8, 6, 2, 4): the common half is e1, e2; outside it the tasks keep e3 and e4.
        suite = of(suite_of, np.diag([8.0, 0, 2, 0]).tolist(), np.diag([0.0, 6, 0, 4]).tolist())
        assert merge_matrix(suite, "iso_cts", common=0.5) == pytest.approx(5 * np.eye(4), abs=1e-6)
        assert merge_matrix(suite, "iso_cts", common=0.5, scale=2.0) == pytest.approx(
            10 * np.eye(4), abs=1e-5
        )
        # Opposite tasks cancel in Σ τ = diag(2, 0, …) but keep their own directions.
        u = np.diag([1.0, 0, 0, 0])
        own = np.diag([0.0, 3, 0, 0])
        suite = of(suite_of, (u + own).tolist(), (u - own).tolist())
        kept = merge_matrix(suite, "iso_cts", common=0.5)
        # mean of (2, 0; 3, 3) = 2; ±e2 e2ᵀ of the two tasks cancel again, the zero ones are dropped
        assert kept == pytest.approx(2 * u, abs=1e-6)

    @given(seeds, experts, scales)
    def test_with_all_directions_common_it_is_iso_c(
        self, synthetic_suite: Make, seed: int, T: int, scale: float
    ) -> None:
        suite = synthetic_suite(T, seed=seed)
        result = merge(suite, "iso_cts", common=1.0, scale=scale)
        assert_same(result, iso_c(suite, scale), 1e-4)

    @given(seeds)
    def test_the_spectrum_is_flat(self, synthetic_suite: Make, seed: int) -> None:
        suite = synthetic_suite(2, shapes={"w.weight": (9, 6)}, seed=seed, dtype=torch.float64)
        base = states(suite)[1]["w.weight"]
        S = np.linalg.svd(merge_matrix(suite, "iso_cts", common=0.5) - base, compute_uv=False)
        assert S.std() < 1e-9 * S.mean()

    @pytest.mark.parametrize(
        ("r", "tasks", "common", "expected"),
        [
            (10, 2, 0.8, (8, 1)),
            (768, 8, 0.8, (616, 19)),  # 154 / 8 = 19.25
            (768, 20, 0.8, (608, 8)),  # 7.7 rounds up
            (10, 3, 1.0, (10, 0)),
            (10, 6, 0.0, (4, 1)),  # 10 / 6 rounds to 2, of which six do not fit
            (6, 3, 0.0, (0, 2)),
            (2, 8, 0.8, (2, 0)),
            (10, 1, 0.29, (2, 8)),
        ],
    )
    def test_directions_are_divided_as_the_authors_do(
        self, r: int, tasks: int, common: float, expected: tuple[int, int]
    ) -> None:
        assert split(r, tasks, common) == expected


class TestTsvM:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("T", [1, 2, 3, 20])
    def test_all_directions_are_the_authors_rule(
        self, synthetic_suite: Make, T: int, dtype: torch.dtype
    ) -> None:
        suite = synthetic_suite(T, seed=3, dtype=dtype)
        merged = merge(suite, "tsv_m", directions="all")
        thetas, base = states(suite)
        for name in suite.matrices:
            start = base[name].reshape(len(base[name]), -1)
            k = min(start.shape) // T  # none where there are more tasks than directions
            parts = [np.linalg.svd(e[name].reshape(start.shape) - start) for e in thetas]
            U = np.hstack([U[:, :k] for U, _, _ in parts])
            V = np.hstack([Vt[:k].T for _, _, Vt in parts])
            S = np.concatenate([S[:k] for _, S, _ in parts])
            polar = [X @ np.linalg.inv(np.real(sqrtm(X.T @ X))) if k else X for X in (U, V)]
            expected = start + (polar[0] * S) @ polar[1].T
            got = merged[name].double().numpy().reshape(start.shape)
            np.testing.assert_allclose(got, expected, atol=1e-5)

    def test_directions_without_weight_take_part_only_where_asked(self, suite_of: Make) -> None:
        # Two rank-1 updates of 4 x 4: floor(4/2) is 2, and the second direction has no weight.
        first, second = np.zeros((4, 4)), np.zeros((4, 4))
        first[0, 0], second[0] = 2.0, [1.0, 1.0, 0, 0]
        suite = of(suite_of, first.tolist(), second.tolist())
        resolved = merge_matrix(suite, "tsv_m")
        # Both left directions are e_1: its polar factor gives each 1/√2 of it.
        u = np.array([2.0, np.sqrt(2)]) / np.sqrt(2)
        v = np.array([[1, np.sqrt(0.5)], [0, np.sqrt(0.5)]])
        values, Q = np.linalg.eigh(v.T @ v)
        right = v @ (Q / np.sqrt(values)) @ Q.T
        assert resolved[0, :2] == pytest.approx(right @ u, abs=1e-5)
        # In general those without weight turn the others.
        source = np.random.default_rng(0)
        taus = [np.outer(*source.normal(size=(2, 8))).tolist() for _ in range(2)]
        found = [
            merge_matrix(of(suite_of, *taus), "tsv_m", directions=d) for d in ("all", "resolved")
        ]
        assert not np.allclose(*found, atol=1e-2)


class TestWudi:
    @given(seeds, experts, st.sampled_from(["squared", "plain"]))
    def test_the_closed_form_is_the_least_squares_solution(
        self, synthetic_suite: Make, seed: int, T: int, norm: str
    ) -> None:
        suite = synthetic_suite(T, seed=seed, dtype=torch.float64)
        assert_same(merge(suite, "wudi", norm=norm, cut=1e-10), wudi(suite, norm), 1e-6)

    def test_the_default_leaves_weak_inputs_out(self, synthetic_suite: Make) -> None:
        # As the authors' descent does; what is kept is the minimum on the strong directions.
        suite = synthetic_suite(4, seed=2, dtype=torch.float64)
        thetas, base = states(suite)
        merged = merge(suite, "wudi")
        for name in suite.matrices:
            rows = (len(base[name]), -1)
            taus = [(e[name] - base[name]).reshape(rows) for e in thetas]
            G = sum(t.T @ t / np.linalg.norm(t) ** 2 for t in taus)
            values, Q = np.linalg.eigh(G)
            strong = Q[:, values > 0.01 * values[-1]]
            B = sum(t @ t.T @ t / np.linalg.norm(t) ** 2 for t in taus)
            inside = np.linalg.solve(strong.T @ G @ strong, (B @ strong).T).T @ strong.T
            got = merged[name].numpy().reshape(rows) - base[name].reshape(rows)
            np.testing.assert_allclose(got, inside, atol=1e-8)

    def test_by_hand(self, suite_of: Make) -> None:
        # Both read the first input only; G is that direction, with weights 2/2 and 9/9.
        taus = [[1.0, 0.0], [1.0, 0.0]], [[3.0, 0.0], [0.0, 0.0]]
        assert merge_matrix(of(suite_of, *taus), "wudi") == pytest.approx(
            np.array([[2, 0], [0.5, 0]]), abs=1e-6
        )
        # Divided by the norm alone, they weigh 2/√2 and 9/3.
        w = np.sqrt(2)
        assert merge_matrix(of(suite_of, *taus), "wudi", norm="plain") == pytest.approx(
            np.array([[w + 9, 0], [w, 0]]) / (w + 3), abs=1e-6
        )

    def test_tasks_that_read_other_inputs_add_up(self, suite_of: Make) -> None:
        suite = of(suite_of, [[2.0, 0.0], [1.0, 0.0]], [[0.0, 3.0], [0.0, -1.0]], base=5.0)
        expected = 5 + np.array([[2.0, 3.0], [1.0, -1.0]])
        for solver in ("closed", "descent"):
            assert merge_matrix(suite, "wudi", solver=solver) == pytest.approx(expected, abs=1e-5)

    def test_the_cut_leaves_weak_inputs_at_the_base(self, suite_of: Make) -> None:
        # One task whose G has eigenvalues of 1 to 0.01.
        suite = of(suite_of, [[1.0, 0.0], [0.0, 0.1]], base=2.0)
        for cut, kept in ((1e-10, 0.1), (0.005, 0.1), (0.02, 0.0)):
            expected = 2 + np.diag([1.0, kept])
            assert merge_matrix(suite, "wudi", cut=cut) == pytest.approx(expected, abs=1e-5)

    @given(seeds)
    def test_an_expert_that_is_the_base_changes_nothing(self, suite_of: Make, seed: int) -> None:
        taus = np.random.default_rng(seed).normal(size=(2, 4, 3)).tolist()
        zero = np.zeros((4, 3)).tolist()
        with_it = merge_matrix(of(suite_of, *taus, zero), "wudi")
        assert with_it == pytest.approx(merge_matrix(of(suite_of, *taus), "wudi"), abs=1e-6)

    @pytest.mark.parametrize("norm", ["squared", "plain"])
    def test_the_descent_is_the_papers(self, norm: str) -> None:
        # PyTorch's Adam and automatic gradient on the loss as it is written.
        tau = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        X = torch.nn.Parameter(tau.sum(dim=0))
        optimiser = torch.optim.Adam([X], lr=1e-2)
        sizes = tau.flatten(1).norm(dim=1) ** (2 if norm == "squared" else 1)
        for _ in range(25):
            optimiser.zero_grad()
            products = (X - tau) @ tau.transpose(1, 2)
            (products.square().sum(dim=(1, 2)) / sizes).sum().backward()
            optimiser.step()
        A, B = normal_equations(tau, norm)
        ours = descend(tau.sum(dim=0), A, B, 1e-2, 25)
        torch.testing.assert_close(ours, X.detach(), rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("norm", ["squared", "plain"])
    def test_the_closed_form_is_the_limit_of_the_descent(self, norm: str) -> None:
        tau = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        A, B = normal_equations(tau, norm)
        X = descend(tau.sum(dim=0), A, B, 1e-2, 2000)
        X = descend(X, A, B, 1e-4, 2000)
        expected = wudi_of(list(tau.numpy()), norm)
        assert X.numpy() == pytest.approx(expected, abs=1e-5)

    def test_the_parameters_of_the_descent_reach_it(self, synthetic_suite: Make) -> None:
        suite = synthetic_suite(3, seed=4, dtype=torch.float64)
        summed = task_arithmetic(suite, 1.0)
        start = {name: summed[name] for name in suite.matrices}
        assert_same(merge(suite, "wudi", solver="descent", steps=0), start, 1e-12)
        # One step of Adam moves every entry by the learning rate.
        once = merge(suite, "wudi", solver="descent", steps=1, learning_rate=1e-3)
        for name, value in start.items():
            step = np.abs(once[name].numpy() - value)
            assert step == pytest.approx(np.full_like(step, 1e-3), rel=1e-3)
        far = merge(suite, "wudi", solver="descent", steps=4000, learning_rate=1e-2)
        assert_same(far, {n: wudi(suite)[n] for n in ("blocks.0.attn.qkv.weight",)}, 2e-2)

    @given(seeds, st.floats(0.1, 10))
    def test_it_scales_with_the_task_vectors(
        self, suite_of: Make, seed: int, factor: float
    ) -> None:
        taus = np.random.default_rng(seed).normal(size=(3, 4, 5))
        plain = merge_matrix(of(suite_of, *taus.tolist()), "wudi")
        scaled = merge_matrix(of(suite_of, *(factor * taus).tolist()), "wudi")
        assert scaled == pytest.approx(factor * plain, rel=1e-4, abs=1e-4 * factor)


class TestKnots:
    @given(
        seeds, experts, st.sampled_from(["paper", "code"]),
        st.sampled_from(["ties", "task_arithmetic"]), shares, scales,
    )  # fmt: skip
    def test_follows_its_formula(
        self, synthetic_suite: Make, seed: int, T: int, variant: str, rule: str, density: float,
        scale: float,
    ) -> None:  # fmt: skip
        suite = synthetic_suite(T, seed=seed, dtype=torch.float64)
        settings = {"rule": rule, "variant": variant, "density": density, "scale": scale}
        assert_same(merge(suite, "knots", **settings), knots(suite, **settings), 1e-6)

    def test_by_hand(self, suite_of: Make) -> None:
        # [3 0 4 0] = 5 · [.6 0 .8 0]: the tasks hold .6 and .8 of one direction.
        suite = of(suite_of, [[3.0, 0.0], [0.0, 0.0]], [[4.0, 0.0], [0.0, 0.0]])
        for variant in ("paper", "code"):
            assert merge_matrix(suite, "knots", variant=variant) == pytest.approx(
                np.array([[3.5, 0], [0, 0]]), abs=1e-6
            )
        summed = merge_matrix(suite, "knots", rule="task_arithmetic")
        assert summed == pytest.approx(np.array([[7.0, 0], [0, 0]]), abs=1e-6)

    def test_the_paper_counts_directions_alike_and_the_code_by_their_strength(
        self, suite_of: Make
    ) -> None:
        # diag(4, 3) turned: V holds cos, sin of 20° and 0°, ΣV four and three times as much.
        c, s = np.cos(0.35), np.sin(0.35)
        tau = np.array([[4.0, 0], [0, 0.5]]) @ np.array([[c, s], [-s, c]])
        suite = of(suite_of, tau.tolist())
        # Half of V: both cosines. Half of Σ V: both entries of the strong direction.
        assert merge_matrix(suite, "knots", density=0.5) == pytest.approx(
            np.array([[4 * c, 0], [0, 0.5 * c]]), abs=1e-5
        )
        assert merge_matrix(suite, "knots", density=0.5, variant="code") == pytest.approx(
            np.array([[4 * c, 4 * s], [0, 0]]), abs=1e-5
        )

    def test_entries_that_a_task_did_not_change_do_not_vote(self, suite_of: Make) -> None:
        # Each task reads inputs of its own: nothing meets, so the mean is each one's own part.
        rng = np.random.default_rng(2)
        first, second = rng.normal(size=(2, 5, 4))
        first[:, 2:] = 0
        second[:, :2] = 0
        suite = of(suite_of, first.tolist(), second.tolist())
        for variant in ("paper", "code"):
            result = merge_matrix(suite, "knots", density=1.0, variant=variant)
            assert result == pytest.approx(first + second, abs=1e-5)

    @given(seeds, experts, scales, st.sampled_from(["paper", "code"]))
    def test_with_task_arithmetic_the_basis_does_not_matter(
        self, synthetic_suite: Make, seed: int, T: int, scale: float, variant: str
    ) -> None:
        suite = synthetic_suite(T, seed=seed)
        full = task_arithmetic(suite, scale)
        result = merge(suite, "knots", rule="task_arithmetic", scale=scale, variant=variant)
        assert_same(result, {name: full[name] for name in suite.matrices}, 2e-5)

    @pytest.mark.parametrize("variant", ["paper", "code"])
    @pytest.mark.parametrize("seed", range(4))
    def test_rounding_of_low_rank_updates_is_no_direction(
        self, suite_of: Make, seed: int, variant: str
    ) -> None:
        # Rank-2 updates written as float32 weights: 3 tasks hold 6 directions, not 24.
        rng = np.random.default_rng(seed)
        base = rng.normal(size=(24, 30))
        updates = [rng.normal(size=(24, 2)) @ rng.normal(size=(2, 30)) for _ in range(3)]
        suite = suite_of(
            {f"t{i}": {"w.weight": torch.tensor(base + u).float()} for i, u in enumerate(updates)},
            {"w.weight": torch.tensor(base).float()},
        )
        result = merge(suite, "knots", variant=variant)
        expected = knots(suite, variant=variant, rank=6)
        # A trimmed entry may flip at the threshold in the noise of float32: compare in norm.
        got, value = result["w.weight"].double().numpy(), expected["w.weight"]
        assert np.linalg.norm(got - value) < 2e-2 * np.linalg.norm(value - base)


def test_spectral_methods_give_one_expert_back(synthetic_suite: Make) -> None:
    suite = synthetic_suite(1, seed=6)
    expected = states(suite)[0][0]
    for method, parameters in [
        ("wudi", {}),
        ("wudi", {"solver": "descent"}),
        ("knots", {"density": 1.0}),
        ("knots", {"density": 1.0, "variant": "code"}),
        ("knots", {"rule": "task_arithmetic"}),
    ]:
        assert_same(merge(suite, method, **parameters), expected, 5e-5)


@pytest.mark.parametrize("T", [2, 3, 5])
def test_equal_experts_are_their_own_merge(
    suite_of: Make, synthetic_states: Callable, T: int
) -> None:
    members, base = synthetic_states(["only"], seed=7)
    suite = suite_of({f"t{i}": members["only"] for i in range(T)}, base)
    expected = states(suite)[0][0]
    for method, parameters in [
        ("wudi", {}),
        ("knots", {"density": 1.0}),
        ("knots", {"rule": "task_arithmetic", "scale": 1 / T}),
    ]:
        assert_same(merge(suite, method, **parameters), expected, 5e-5)
    # One task's directions are the common ones: nothing is left outside them but itself.
    assert_same(merge(suite, "iso_cts", common=1.0, scale=1 / T), iso_c(suite, 1 / T), 1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECTRAL)
def test_every_dtype_and_shape(synthetic_suite: Make, name: str, dtype: torch.dtype) -> None:
    suite = synthetic_suite(3, dtype=dtype, seed=22)
    parameters, reference = SPECTRAL_REFERENCES[name]
    result = merge(suite, name, **parameters)
    assert_same(result, reference(suite), 1e-8 if dtype == torch.float64 else 1e-4)
    for key in suite.parameters:
        assert result[key].shape == suite.expert("task0").info(key).shape


@pytest.mark.parametrize("zeros", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "parameters", "reference"),
    [
        ("iso_cts", {}, lambda s: iso_cts(s, 0.8, 1.0)),
        ("iso_cts", {"common": 0.3}, lambda s: iso_cts(s, 0.3, 1.0)),
        ("wudi", {"cut": 1e-10}, wudi),
        ("wudi", {"norm": "plain", "cut": 1e-10}, lambda s: wudi(s, "plain")),
        ("wudi", {"solver": "descent"}, None),
        ("knots", {}, knots),
        ("knots", {"variant": "code"}, lambda s: knots(s, variant="code")),
    ],
)
def test_experts_that_are_the_base_give_defined_results(
    suite_of: Make,
    synthetic_states: Callable,
    name: str,
    parameters: dict[str, Any],
    reference: Callable | None,
    zeros: int,
) -> None:
    members, base = synthetic_states(["a", "b", "c"], seed=3, dtype=torch.float64)
    suite = suite_of(dict(members, **dict.fromkeys("abc"[:zeros], base)), base)
    result = merge(suite, name, **parameters)
    assert all(bool(v.double().isfinite().all()) for v in result.values())
    if zeros == 3:
        assert_same(result, states(suite)[1], 1e-6)
    elif reference is not None:
        assert_same(result, reference(suite), 1e-6)


@pytest.mark.parametrize("name", SPECTRAL)
def test_order_and_base_do_not_matter(
    suite_of: Make, synthetic_states: Callable, name: str
) -> None:
    dtype = torch.float64
    members, base = synthetic_states(["a", "b", "c"], seed=8, dtype=dtype, counter=False)
    parameters = SPECTRAL_REFERENCES[name][0]
    first, *others = [
        merge(suite_of({t: members[t] for t in order}, base), name, **parameters)
        for order in itertools.permutations("abc")
    ]
    for other in others:
        assert_same(other, {k: v.numpy() for k, v in first.items()}, 1e-7)
    moved = suite_of(
        {t: {k: v + 2 for k, v in s.items()} for t, s in members.items()},
        {k: v + 2 for k, v in base.items()},
    )
    assert_same(
        merge(moved, name, **parameters), {k: v.numpy() + 2 for k, v in first.items()}, 1e-6
    )


@pytest.mark.parametrize("name", SPECTRAL)
def test_what_is_no_weight_matrix_is_averaged(synthetic_suite: Make, name: str) -> None:
    suite = synthetic_suite(3, seed=1)
    mean = average(suite)
    others = {key: mean[key] for key in mean if key not in suite.matrices}
    assert others
    assert_same(merge(suite, name), others, 1e-6)
