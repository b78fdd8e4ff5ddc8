"""Σ C_t = 0 about the average: even votes and ± pairs are decided exactly, in any order."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from merge_core.means import centre
from merge_core.merging.recipe import make_recipe
from merge_core.methods import methods
from merge_core.suites.suite import Suite
from tests.merge_core.sparse_reference import run

Make = Callable[..., Suite]
State = dict[str, Tensor]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
MATRIX = "blocks.0.mlp.fc1.weight"
SHAPES = {MATRIX: (24, 20), "norm.bias": (37,)}
# Recipes whose exact answer for two experts is their average.
UNMOVED: list[tuple[str, dict[str, Any]]] = [
    ("ties", {"density": 0.2}),
    ("ties", {"density": 0.2, "trim": "tensor", "combine": "sum"}),
    ("ties", {"density": 1}),
    ("dare_ties", {"drop": 0}),
    ("dare_task_arithmetic", {"drop": 0}),
    ("breadcrumbs", {}),
    ("tsv_m", {}),
    ("cart", {"rank": 0.2, "scale": 3}),
]
# And those in which every entry is kept, for any number of experts.
EVERYTHING = [("ties", {"density": 1}), ("dare_ties", {"drop": 0})]


def experts_of(seed: int, T: int, dtype: torch.dtype, spread: float = 0.1) -> dict[str, State]:
    """Random experts, rounded to what is stored."""
    source = np.random.default_rng(seed)
    base = {name: source.normal(size=shape) for name, shape in SHAPES.items()}
    return {
        f"task{t}": {
            name: torch.tensor(value + spread * source.normal(size=value.shape)).to(dtype)
            for name, value in base.items()
        }
        for t in range(T)
    }


def mean_of(experts: dict[str, State], name: str) -> np.ndarray:
    return np.mean([e[name].double().numpy() for e in experts.values()], axis=0)


def far(merged: State, experts: dict[str, State]) -> float:
    """‖result − average‖ / ‖C_1‖ over the model."""
    first = next(iter(experts.values()))
    moved = [merged[n].double().numpy() - mean_of(experts, n) for n in SHAPES]
    own = [first[n].double().numpy() - mean_of(experts, n) for n in SHAPES]
    return float(np.hypot(*map(np.linalg.norm, moved)) / np.hypot(*map(np.linalg.norm, own)))


@pytest.mark.parametrize(("name", "parameters"), UNMOVED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_experts_give_their_average(
    suite_of: Make, name: str, parameters: dict[str, Any], dtype: torch.dtype
) -> None:
    experts = experts_of(0, 2, dtype)
    fields = {} if name == "cart" else {"origin": "average"}
    merged = run(suite_of(experts), name, parameters=parameters, **fields)
    # One rounding of the average, and one of the result: an ulp of weights ten times as large as
    # the task vectors.
    limit = 1e-13 if dtype == torch.float64 else 2e-6
    if name in ("tsv_m", "cart"):  # directions are kept in float32
        limit = 2e-6
    assert far(merged, experts) < limit


@given(
    st.integers(0, 1000), st.integers(2, 6), st.sampled_from(DTYPES), st.sampled_from(EVERYTHING)
)
def test_a_vote_of_all_entries_is_even(
    suite_of: Make, seed: int, T: int, dtype: torch.dtype, case: tuple[str, dict[str, Any]]
) -> None:
    name, parameters = case
    experts = experts_of(seed, T, dtype)
    merged = run(suite_of(experts), name, parameters=parameters, origin="average")
    assert far(merged, experts) < 3e-6


def elected_exactly(experts: dict[str, State], name: str) -> np.ndarray:
    """TIES at density 0.5 of one tensor about its average, in fractions."""
    members = [e[name].double().numpy().ravel().tolist() for e in experts.values()]
    T, n = len(members), len(members[0])
    exact = [[Fraction(x) for x in row] for row in members]
    means = [sum(column) / T for column in zip(*exact, strict=True)]
    tau = [[x - m for x, m in zip(row, means, strict=True)] for row in exact]
    limits = [sorted(map(abs, row))[n - max(1, n // 2)] for row in tau]
    out = []
    for j in range(n):
        kept = [row[j] for row, limit in zip(tau, limits, strict=True) if abs(row[j]) >= limit]
        total = sum(kept)
        agreeing = [x for x in kept if x * total > 0]
        mean = sum(agreeing, Fraction()) / max(1, len(agreeing))
        out.append(float(means[j] + mean))
    return np.array(out)


@given(st.integers(0, 1000), st.integers(2, 5), st.sampled_from([torch.float16, torch.bfloat16]))
def test_ties_about_the_average_is_right_in_fractions(
    suite_of: Make, seed: int, T: int, dtype: torch.dtype
) -> None:
    # Coarse numbers tie often, in votes and at the thresholds.
    experts = experts_of(seed, T, dtype, spread=0.02)
    parameters = {"density": 0.5, "trim": "tensor"}
    merged = run(suite_of(experts), "ties", parameters=parameters, origin="average")
    for name in SHAPES:
        expected = elected_exactly(experts, name)
        np.testing.assert_allclose(merged[name].double().ravel(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [*EVERYTHING, ("ties", {}), ("breadcrumbs", {}), ("tsv_m", {})],
    ids=str,
)
def test_the_order_of_the_experts_changes_nothing(
    suite_of: Make, name: str, parameters: dict[str, Any]
) -> None:
    experts = experts_of(7, 5, torch.float32)
    orders = list(permutations(experts))[::37]
    found = [
        run(
            suite_of({task: experts[task] for task in order}),
            name,
            parameters=parameters,
            origin="average",
        )
        for order in orders
    ]
    for other in found[1:]:
        for key in SHAPES:
            torch.testing.assert_close(other[key], found[0][key], rtol=0, atol=3e-6)


@given(st.integers(0, 1000), st.integers(1, 6), st.floats(-6, 6))
def test_centred_vectors_sum_to_zero_in_any_order(seed: int, T: int, size: float) -> None:
    source = np.random.default_rng(seed)
    members = torch.tensor(source.normal(size=(T, 50)) * 10**size + source.normal(size=50))
    for stored in (members, members.float()):
        vectors, turned = centre(stored), centre(stored.flip(0)).flip(0)
        # Some roundings of the differences, whatever the size of the numbers themselves.
        limit = 4 * T * 2.0**-53 * float((stored[:, None] - stored).abs().max()) + 1e-300
        assert float(vectors.sum(dim=0).abs().max()) <= T * limit
        assert float((vectors - turned).abs().max()) <= limit


def test_rescaled_votes_are_even_too(suite_of: Make) -> None:
    # Rows of one sign pattern: all coins of an entry fall alike where p is 0, and 1/(1 − p) is 1;
    # weights that are alike leave the sum at zero.
    experts = experts_of(3, 4, torch.float32)
    weights = dict.fromkeys(experts, 0.3)
    merged = run(
        suite_of(experts), "ties", parameters={"density": 1}, origin="average", weights=weights
    )
    assert far(merged, experts) < 3e-6


def test_a_vote_that_is_not_even_is_counted(suite_of: Make) -> None:
    # Of three experts two agree against the third, by one unit in the last place.
    step = 2.0**-23
    experts = {
        "a": {"norm.bias": torch.tensor([1.0 + step, 1.0])},
        "b": {"norm.bias": torch.tensor([1.0, 1.0])},
        "c": {"norm.bias": torch.tensor([1.0, 1.0])},
    }
    zero = {"norm.bias": torch.tensor([1.0, 1.0])}
    merged = run(suite_of(experts, zero), "ties", parameters={"density": 1})
    assert merged["norm.bias"].tolist() == [1.0 + step, 1.0]


class TestWarnings:
    """Where the exact answer is the average, a recipe says so before the merge."""

    @pytest.mark.parametrize(("name", "parameters"), UNMOVED)
    def test_two_experts(self, name: str, parameters: dict[str, Any]) -> None:
        fields = {} if name == "cart" else {"origin": "average"}
        recipe = make_recipe({"method": name, "parameters": parameters, **fields})
        (text,) = recipe.warnings(["a", "b"])
        assert "average" in text

    @pytest.mark.parametrize(("name", "parameters"), EVERYTHING)
    def test_everything_kept(self, name: str, parameters: dict[str, Any]) -> None:
        recipe = make_recipe({"method": name, "parameters": parameters, "origin": "average"})
        assert "sum to zero" in recipe.warnings(["a", "b", "c"])[0]

    def test_nothing_is_said_where_something_moves(self) -> None:
        tasks = ["a", "b"]
        for document in (
            {"method": "ties"},
            {"method": "ties", "origin": "average", "weights": {"a": 2.0}},
            {"method": "dare_ties", "origin": "average"},
        ):
            assert make_recipe(document).warnings(tasks) == []
        assert make_recipe({"method": "ties", "origin": "average"}).warnings("abc") == []

    def test_every_method_can_be_asked(self) -> None:
        for name, method in methods().items():
            assert isinstance(method.warnings(2, None), list)  # before parameters are chosen
            for origin in (None, *method.origins):
                recipe = make_recipe({"method": name, "origin": origin})
                assert isinstance(recipe.warnings(["a", "b"]), list)
