"""SLERP, Karcher mean and Model Stock: by hand, against scipy, and what holds on the sphere."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.spatial import geometric_slerp

from merge_core.errors import RecipeError, SuiteError
from merge_core.merging.recipe import make_recipe
from merge_core.methods import get_method
from merge_core.methods.karcher import mean_direction
from merge_core.suites.suite import Suite
from tests.merge_core.float64_reference import assert_same, average, merge, states
from tests.merge_core.spectral_reference import SPECTRAL_REFERENCES, karcher, model_stock, slerp

Make = Callable[..., Suite]
seeds = st.integers(0, 10_000)
places = st.floats(0, 1).map(lambda x: round(x, 3))
GEOMETRIC = ("slerp", "karcher", "model_stock")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def of(suite_of: Make, *vectors: Sequence[float], base: Sequence[float] | None = None) -> Suite:
    """A suite of one parameter of which each expert has the given values."""
    start = torch.tensor(base if base is not None else [0.0] * len(vectors[0]))
    experts = {f"t{i}": {"w": torch.tensor(v)} for i, v in enumerate(vectors)}
    return suite_of(experts, {"w": start.float()})


def merge_values(suite: Suite, method: str, **parameters: object) -> list[float]:
    return merge(suite, method, **parameters)["w"].tolist()


class TestSlerp:
    def test_by_hand(self, suite_of: Make) -> None:
        half = np.sqrt(0.5)
        square = of(suite_of, [1.0, 0.0], [0.0, 1.0])
        assert merge_values(square, "slerp") == pytest.approx([half, half])
        assert merge_values(square, "slerp", t=0.0) == pytest.approx([1, 0])
        assert merge_values(square, "slerp", t=1.0) == pytest.approx([0, 1], abs=1e-7)
        assert merge_values(square, "slerp", t=1 / 3) == pytest.approx([np.cos(np.pi / 6), 0.5])
        # Lengths are not made equal: sin 45° of each.
        assert merge_values(of(suite_of, [2.0, 0.0], [0.0, 1.0]), "slerp") == pytest.approx(
            [2 * half, half]
        )

    @given(seeds, places)
    def test_unit_vectors_against_scipy(self, suite_of: Make, seed: int, t: float) -> None:
        a, b = np.random.default_rng(seed).normal(size=(2, 5))
        a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
        suite = suite_of({"a": {"w": torch.tensor(a)}, "b": {"w": torch.tensor(b)}})
        assert merge_values(suite, "slerp", t=t) == pytest.approx(
            geometric_slerp(a, b, t), abs=1e-12
        )

    @given(seeds, places)
    def test_follows_its_formula_tensor_by_tensor(
        self, synthetic_suite: Make, seed: int, t: float
    ) -> None:
        suite = synthetic_suite(2, seed=seed, spread=1.5, with_base=False)
        assert_same(merge(suite, "slerp", t=t), slerp(suite, t))

    @pytest.mark.parametrize(
        ("first", "second", "middle"),
        [
            ([1.0, 2.0], [3.0, 6.0], [2.0, 4.0]),  # one direction
            ([1.0, 2.0], [-1.0, -2.0], [0.0, 0.0]),  # opposite ones
            ([0.0, 0.0], [1.0, 4.0], [0.5, 2.0]),  # a zero tensor
            ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
            ([100.0, 1.0], [100.0, -1.0], [100.0, 0.0]),  # a cosine of 0.9998
        ],
    )
    def test_is_linear_where_no_arc_is_defined(
        self, suite_of: Make, first: list[float], second: list[float], middle: list[float]
    ) -> None:
        assert merge_values(of(suite_of, first, second), "slerp") == pytest.approx(middle)

    def test_keeps_an_arc_just_below_the_limit(self, suite_of: Make) -> None:
        # At a cosine of 0.999 the arc's midpoint is still a unit vector, the chord's is not.
        angle = np.arccos(0.999)
        suite = of(suite_of, [1.0, 0.0], [np.cos(angle), np.sin(angle)])
        assert np.linalg.norm(merge_values(suite, "slerp")) == pytest.approx(1, abs=1e-7)

    @pytest.mark.parametrize("T", [1, 3])
    def test_takes_two_experts(self, synthetic_suite: Make, T: int) -> None:
        with pytest.raises(SuiteError, match="merges 2 experts"):
            merge(synthetic_suite(T), "slerp")


class TestKarcher:
    def test_by_hand(self, suite_of: Make) -> None:
        third = 1 / np.sqrt(3)
        corners = of(suite_of, [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0])
        assert merge_values(corners, "karcher") == pytest.approx([third] * 3)
        # Mean length 2 at 45°, whichever is longer.
        assert merge_values(of(suite_of, [3.0, 0.0], [0.0, 1.0]), "karcher") == pytest.approx(
            [np.sqrt(2), np.sqrt(2)]
        )
        # On a circle the mean direction is the mean angle: 0°, 0° and 90° give 30°.
        twice = of(suite_of, [1.0, 0.0], [1.0, 0.0], [0.0, 1.0])
        assert merge_values(twice, "karcher") == pytest.approx([np.cos(np.pi / 6), 0.5])

    @given(seeds)
    def test_two_of_one_length_give_slerps_midpoint(self, suite_of: Make, seed: int) -> None:
        a, b = np.random.default_rng(seed).normal(size=(2, 6))
        b *= np.linalg.norm(a) / np.linalg.norm(b)
        suite = suite_of({"a": {"w": torch.tensor(a)}, "b": {"w": torch.tensor(b)}})
        assert merge_values(suite, "karcher") == pytest.approx(
            merge_values(suite, "slerp"), abs=1e-9
        )

    @given(seeds, st.integers(1, 6))
    def test_follows_its_formula_tensor_by_tensor(
        self, synthetic_suite: Make, seed: int, T: int
    ) -> None:
        suite = synthetic_suite(T, seed=seed, with_base=False)
        assert_same(merge(suite, "karcher"), karcher(suite))

    @given(seeds)
    def test_no_direction_has_a_smaller_sum_of_squared_angles(self, seed: int) -> None:
        units = np.random.default_rng(seed).normal(size=(4, 3)) + 1
        units /= np.linalg.norm(units, axis=1, keepdims=True)

        def cost(x: np.ndarray) -> float:
            return (np.arccos(np.clip(units @ x / np.linalg.norm(x), -1, 1)) ** 2).sum()

        mean = mean_direction(torch.tensor(units), 500, 1e-13)
        assert mean is not None
        found = minimize(cost, units.sum(axis=0), tol=1e-12)
        assert cost(mean.numpy()) <= found.fun + 1e-9
        assert mean.numpy() == pytest.approx(found.x / np.linalg.norm(found.x), abs=1e-4)

    @pytest.mark.parametrize("spread", [0, 1e-12, 1e-8, 1e-4, 0.3, 5])
    @pytest.mark.parametrize("n", [1, 2, 3, 40])
    def test_the_span_of_the_experts_is_as_good_as_their_space(
        self, suite_of: Make, n: int, spread: float
    ) -> None:
        # Equal, near and far experts, more of them than directions, one of them twice.
        source = np.random.default_rng(7)
        thetas = source.normal(size=n) + spread * source.normal(size=(6, n))
        thetas = np.vstack([thetas, thetas[:1]])
        lengths = np.linalg.norm(thetas, axis=1)
        units = torch.tensor(thetas / lengths[:, None])
        mean = mean_direction(units, 50, 1e-10)  # the recipe's own settings
        assert mean is not None
        suite = suite_of({f"t{i}": {"w": torch.tensor(theta)} for i, theta in enumerate(thetas)})
        expected = lengths.mean() * mean.numpy()
        np.testing.assert_allclose(
            merge_values(suite, "karcher"), expected, rtol=0, atol=1e-14 * lengths.max()
        )

    def test_a_zero_tensor_has_a_length_but_no_direction(self, suite_of: Make) -> None:
        assert merge_values(of(suite_of, [2.0, 0.0], [0.0, 0.0]), "karcher") == pytest.approx(
            [1, 0]
        )
        assert merge_values(of(suite_of, [0.0, 0.0], [0.0, 0.0]), "karcher") == [0, 0]

    def test_directions_that_cancel_give_the_average(self, suite_of: Make) -> None:
        assert merge_values(of(suite_of, [3.0, 0.0], [-1.0, 0.0]), "karcher") == [1, 0]

    def test_iterations_and_tolerance_bound_the_work(self) -> None:
        units = torch.nn.functional.normalize(
            torch.randn(5, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            + 0.6,
            dim=1,
        )
        once, full = mean_direction(units, 1, 0), mean_direction(units, 1000, 0)
        assert once is not None
        assert full is not None
        assert not torch.allclose(once, full, atol=1e-6)
        assert torch.equal(mean_direction(units, 1000, 1.0), once)


@pytest.mark.parametrize(("given", "taken"), [(7, 7), (7.0, 7), ("7", 7), (1e4, 10_000)])
def test_whole_numbers_are_taken_from_sliders_and_links(given: object, taken: int) -> None:
    recipe = make_recipe({"method": "karcher", "parameters": {"iterations": given}})
    assert recipe.parameters["iterations"] == taken
    assert isinstance(recipe.parameters["iterations"], int)


@pytest.mark.parametrize("given", ["many", "nan", float("inf"), None, 0, 6.6, [1]])
def test_what_is_no_whole_number_in_range_is_refused(given: object) -> None:
    with pytest.raises(RecipeError, match="iterations"):
        make_recipe({"method": "karcher", "parameters": {"iterations": given}})


class TestModelStock:
    @pytest.mark.parametrize(
        ("taus", "t"),
        [
            ([[1.0, 0.0], [0.0, 1.0]], 0.0),  # orthogonal: the base
            ([[1.0, 0.0], [1.0, np.sqrt(3)]], 2 / 3),  # 60°: 2·½ / (1·½ + 1)
            ([[1.0, 0.0], [-1.0, 0.0]], 0.0),  # opposite: the base
            ([[1.0, 2.0], [1.0, 2.0]], 1.0),  # equal: the expert
            ([[1.0, 0.0], [3.0, 0.0]], 1.0),  # one direction: the average
            ([[1.0, 0.0], [0.0, 0.0]], 0.0),  # no angle with a zero vector
            ([[5.0, 1.0]], 1.0),  # one expert: itself
            ([[0.0, 0.0], [0.0, 0.0]], 0.0),
            # three, mean cosine (1 + 0 + 0)/3: 1 / (2/3 + 1)
            ([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], 0.6),
        ],
    )
    def test_by_hand(self, suite_of: Make, taus: list[list[float]], t: float) -> None:
        base = np.array([10.0, -4.0])
        suite = of(suite_of, *[(base + x).tolist() for x in taus], base=base.tolist())
        expected = base + t * np.mean(taus, axis=0)
        assert merge_values(suite, "model_stock") == pytest.approx(expected, abs=1e-5)

    @given(seeds, st.integers(1, 5))
    def test_follows_its_formula_tensor_by_tensor(
        self, synthetic_suite: Make, seed: int, T: int
    ) -> None:
        suite = synthetic_suite(T, seed=seed)
        assert_same(merge(suite, "model_stock"), model_stock(suite))

    @given(seeds, st.integers(2, 5))
    def test_it_is_the_nearest_point_to_the_centre_that_its_paper_seeks(
        self, suite_of: Make, seed: int, N: int
    ) -> None:
        # Experts on a shell: centre μ plus deviations of one length, orthogonal to it and to
        # each other. The method knows neither, yet projects μ onto the span of the experts.
        rng = np.random.default_rng(seed)
        Q = np.linalg.qr(rng.normal(size=(9, N + 1)))[0].T
        centre, base = rng.uniform(0.5, 3) * Q[0], rng.normal(size=9)
        taus = centre + rng.uniform(0.5, 3) * Q[1:]
        suite = suite_of(
            {f"t{i}": {"w": torch.tensor(base + x)} for i, x in enumerate(taus)},
            {"w": torch.tensor(base)},
        )
        weights = np.linalg.lstsq(taus.T, centre, rcond=None)[0]
        assert merge_values(suite, "model_stock") == pytest.approx(
            base + taus.T @ weights, abs=1e-10
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIC)
def test_every_dtype_and_shape(synthetic_suite: Make, name: str, dtype: torch.dtype) -> None:
    suite = synthetic_suite(2, dtype=dtype, seed=21)
    parameters, reference = SPECTRAL_REFERENCES[name]
    result = merge(suite, name, **parameters)
    assert_same(result, reference(suite), 1e-12 if dtype == torch.float64 else 1e-5)
    for key in suite.parameters:
        assert result[key].shape == suite.expert("task0").info(key).shape


@pytest.mark.parametrize(
    ("name", "T"),
    [(n, T) for n in GEOMETRIC for T in (1, 2, 4) if get_method(n).tasks in (None, T)],
)
def test_equal_experts_are_their_own_merge(
    suite_of: Make, synthetic_suite: Make, name: str, T: int
) -> None:
    one = synthetic_suite(1, seed=5)
    state = {n: one.expert("task0").tensor(n) for n in one.expert("task0")}
    base = {n: one.base.tensor(n) for n in one.base}
    suite = suite_of({f"t{i}": state for i in range(T)}, base)
    assert_same(merge(suite, name), states(suite)[0][0], 1e-6)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_the_order_of_the_experts_does_not_matter(
    suite_of: Make, synthetic_states: Callable, name: str
) -> None:
    members, base = synthetic_states(["a", "b", "c"], seed=8)
    orders = itertools.permutations("ab" if name == "slerp" else "abc")
    first, *others = [merge(suite_of({t: members[t] for t in o}, base), name) for o in orders]
    expected = {k: v.double().numpy() for k, v in first.items() if v.is_floating_point()}
    for other in others:
        assert_same(other, expected, 1e-5)


def test_only_model_stock_needs_the_base_and_moves_with_it(
    suite_of: Make, synthetic_states: Callable
) -> None:
    members, base = synthetic_states(["a", "b"], seed=9, dtype=torch.float64, counter=False)
    there = {t: {k: v + 3 for k, v in s.items()} for t, s in members.items()}
    moved = suite_of(there, {k: v + 3 for k, v in base.items()})
    here = {k: v.numpy() + 3 for k, v in merge(suite_of(members, base), "model_stock").items()}
    assert_same(merge(moved, "model_stock"), here, 1e-9)
    assert [get_method(n).needs_base() for n in GEOMETRIC] == [False, False, True]


def test_karcher_and_slerp_are_near_the_average_of_close_experts(synthetic_suite: Make) -> None:
    suite = synthetic_suite(2, seed=2, spread=1e-3)
    for name in ("karcher", "slerp"):
        assert_same(merge(suite, name), average(suite), 1e-5)
