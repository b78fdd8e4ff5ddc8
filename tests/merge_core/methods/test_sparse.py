"""TIES, DARE and Breadcrumbs: formulas, hand-worked examples, identities."""

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
from merge_core.methods import get_method
from merge_core.methods.sparse import FAMILY
from merge_core.suites.suite import Suite
from tests.merge_core.float64_reference import assert_same, merge, states, task_arithmetic, ties
from tests.merge_core.sparse_reference import (
    SETTINGS,
    SPARSE_REFERENCES,
    breadcrumbs,
    dare,
    matrix,
    of_vectors,
    pcb,
    run,
    ties_sum,
)

Make = Callable[..., Suite]
States = Callable[..., tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]]

seeds = st.integers(0, 10_000)
experts = st.integers(1, 5)
scales = st.floats(-2, 3).map(lambda x: round(x, 3))
shares = st.floats(0, 1).map(lambda x: round(x, 3))
VARIANTS = ("paper", "code")
HAND = ([[1.0, 4.0], [-6.0, 0.0]], [[3.0, -2.0], [1.0, 5.0]])


# Formulas


@given(seeds, experts, scales, shares, st.sampled_from(["global", "tensor"]))
def test_ties_sums_what_agrees_where_asked(
    synthetic_suite: Make, seed: int, T: int, scale: float, density: float, trim: str
) -> None:
    suite = synthetic_suite(T, seed=seed)
    got = merge(suite, "ties", density=density, scale=scale, trim=trim, combine="sum")
    assert_same(got, ties_sum(suite, density, scale, trim))


@given(seeds, experts, scales, st.floats(0, 0.99))
def test_dare_follows_its_formulas(
    synthetic_suite: Make, seed: int, T: int, scale: float, drop: float
) -> None:
    suite = synthetic_suite(T, seed=seed, spread=0.03)
    got = merge(suite, "dare_task_arithmetic", drop=drop, scale=scale)
    assert_same(got, dare(suite, drop, scale), 1e-4)
    for how in ("mean", "sum"):
        got = merge(suite, "dare_ties", drop=drop, scale=scale, combine=how)
        assert_same(got, dare(suite, drop, scale, how), 1e-4)


@given(seeds, experts, scales, shares, shares)
def test_breadcrumbs_follows_its_formula(
    synthetic_suite: Make, seed: int, T: int, scale: float, small: float, large: float
) -> None:
    suite = synthetic_suite(T, seed=seed)
    got = merge(suite, "breadcrumbs", drop_small=small, drop_large=large, scale=scale)
    assert_same(got, breadcrumbs(suite, small, large, scale))


@pytest.mark.parametrize("name", SPARSE_REFERENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_change_the_inputs_only(
    synthetic_suite: Make, name: str, dtype: torch.dtype
) -> None:
    suite = synthetic_suite(dtype=dtype, seed=11)
    parameters, reference = SPARSE_REFERENCES[name]
    merged = merge(suite, name, **parameters)
    assert_same(merged, reference(suite), 1e-4)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(merged[key].dtype == wide for key in suite.parameters if key in states(suite)[1])


def test_the_family_has_one_row_per_method() -> None:
    for name, row in FAMILY.items():
        fields = get_method(name).parameters.model_fields
        assert ("combine" in fields) == row.elect
        assert bool(get_method(name).draws) == name.startswith("dare")


# By hand


def test_ties_by_hand_with_a_disjoint_sum(suite_of: Make) -> None:
    # entry by entry: (1, 3) agree: 4; (4, −2) elect +: 4; (−6, 1) elect −: −6; (0, 5): 5
    suite = of_vectors(suite_of, *HAND)
    assert matrix(suite, "ties", density=1, combine="sum") == [[4.0, 4.0], [-6.0, 5.0]]
    assert matrix(suite, "ties", density=1, combine="mean") == [[2.0, 4.0], [-6.0, 5.0]]


def test_breadcrumbs_by_hand(suite_of: Make) -> None:
    # Of 4 entries a quarter goes at either end: {0, −6} of the first, {1, 5} of the second.
    suite = of_vectors(suite_of, *HAND, base=10.0)
    half = matrix(suite, "breadcrumbs", drop_small=0.25, drop_large=0.25, scale=0.5)
    assert half == [[12.0, 11.0], [10.0, 10.0]]
    # Only the largest: −6 and 5. Only the smallest half: {1, 0}, {−2, 1}.
    top = matrix(suite, "breadcrumbs", drop_small=0, drop_large=0.25, scale=1)
    assert top == [[14.0, 12.0], [11.0, 10.0]]
    low = matrix(suite, "breadcrumbs", drop_small=0.5, drop_large=0, scale=1)
    assert low == [[13.0, 14.0], [4.0, 15.0]]


def test_breadcrumbs_shares_are_of_each_tensor(suite_of: Make) -> None:
    zero = {"loud": torch.zeros(4), "quiet": torch.zeros(4)}
    tau = {"loud": torch.tensor([9.0, 8, 7, 6]), "quiet": torch.tensor([0.1, 0.2, 0.3, 0.4])}
    got = merge(suite_of({"t": tau}, zero), "breadcrumbs", drop_small=0.5, drop_large=0.25, scale=1)
    assert got["loud"].tolist() == [0, 8, 0, 0]
    assert got["quiet"].tolist() == [0, 0, pytest.approx(0.3), 0]


def test_breadcrumbs_that_drops_everything_gives_the_base(synthetic_suite: Make) -> None:
    suite = synthetic_suite(3, seed=1)
    got = merge(suite, "breadcrumbs", drop_small=0.6, drop_large=0.6)
    small = {n: v for n, v in states(suite)[1].items() if v.size > 1}
    assert_same(got, small, 1e-7)


# DARE


def test_dare_keeps_an_entry_whole_or_not_at_all(suite_of: Make) -> None:
    tau = torch.randn(100, 80, generator=torch.Generator().manual_seed(1))
    suite = suite_of({"t": {"w": tau}}, {"w": torch.zeros(100, 80)})
    got = merge(suite, "dare_task_arithmetic", drop=0.75, scale=1)["w"]
    kept = got != 0
    torch.testing.assert_close(got[kept], 4 * tau[kept])
    # 8000 coins: a standard deviation of 0.0048
    assert abs(kept.double().mean().item() - 0.25) < 0.02
    # The coins know nothing of the entries, of each other's rows, or of their columns.
    assert abs(kept.double().mean(dim=0).std().item() - (0.25 * 0.75 / 100) ** 0.5) < 0.01
    assert abs(kept.double().mean(dim=1).std().item() - (0.25 * 0.75 / 80) ** 0.5) < 0.01


def test_the_expectation_of_dare_is_task_arithmetic(synthetic_suite: Make) -> None:
    suite = synthetic_suite(2, seed=3, counter=False)
    draws = [
        run(suite, "dare_task_arithmetic", parameters={"drop": 0.5, "scale": 0.4}, seed=seed)
        for seed in range(400)
    ]
    plain = task_arithmetic(suite, 0.4)
    for name, expected in plain.items():
        mean = torch.stack([d[name] for d in draws]).double().mean(dim=0).numpy()
        # An entry's deviation is 0.4·|τ| per task (p/(1−p) = 1), over 20 in the mean; 5 of these.
        np.testing.assert_allclose(mean, expected, atol=5 * 0.4 * 1.5 / 20)


@pytest.mark.parametrize("name", ["dare_task_arithmetic", "dare_ties"])
def test_the_seed_decides_the_coins(synthetic_suite: Make, name: str) -> None:
    suite = synthetic_suite(3, seed=5)
    first, again, other = (run(suite, name, seed=seed) for seed in (7, 7, 8))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_the_coins_depend_on_names_alone(suite_of: Make, synthetic_states: States) -> None:
    members, base = synthetic_states(["a", "b", "c"], seed=8, counter=False)
    settings = {"parameters": {"drop": 0.5, "scale": 1}}
    one = suite_of(members, base)
    alone = {
        t: run(one, "dare_task_arithmetic", tasks=[t], keep=False, **settings) for t in members
    }
    whole = run(one, "dare_task_arithmetic", **settings)
    turned = run(
        suite_of({t: members[t] for t in "cab"}, dict(reversed(base.items()))),
        "dare_task_arithmetic",
        **settings,
    )
    for name, start in base.items():
        total = start + sum(alone[t][name] - start for t in members)
        torch.testing.assert_close(whole[name], total, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(turned[name], whole[name], atol=1e-5, rtol=1e-5)
    coins = {t: {n: alone[t][n] != base[n] for n in base} for t in members}
    # Neither two tasks nor two parameters of one shape share their coins.
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(coins["a"][name], coins["b"][name])
    tied = suite_of(
        {"a": {"x": torch.ones(64), "y": torch.ones(64)}},
        {"x": torch.zeros(64), "y": torch.zeros(64)},
    )
    got = run(tied, "dare_task_arithmetic", **settings)
    assert not torch.equal(got["x"], got["y"])


@given(seeds, experts)
def test_dare_without_dropping_is_the_method_it_feeds(
    synthetic_suite: Make, seed: int, T: int
) -> None:
    suite = synthetic_suite(T, seed=seed)
    plain = merge(suite, "dare_task_arithmetic", drop=0, scale=0.4)
    assert_same(plain, task_arithmetic(suite, 0.4))
    assert_same(merge(suite, "dare_ties", drop=0), ties(suite, 1.0, 1.0, "global"))


# Identities


@given(seeds)
def test_one_expert_gives_itself_back(synthetic_suite: Make, seed: int) -> None:
    suite = synthetic_suite(1, seed=seed)
    expected = states(suite)[0][0]
    for method, parameters in [
        ("ties", {"density": 1, "combine": "sum"}),
        ("dare_task_arithmetic", {"drop": 0, "scale": 1}),
        ("dare_ties", {"drop": 0}),
        ("breadcrumbs", {"drop_small": 0, "drop_large": 0, "scale": 1}),
        ("pcb", {"density": 1, "scale": 1}),
    ]:
        assert_same(merge(suite, method, **parameters), expected, 1e-5)


@given(seeds, st.integers(1, 4))
def test_equal_experts_give_that_expert(
    suite_of: Make, synthetic_states: States, seed: int, T: int
) -> None:
    members, base = synthetic_states(["only"], seed=seed)
    suite = suite_of({f"t{i}": members["only"] for i in range(T)}, base)
    expected = states(suite)[0][0]
    for method, parameters in [
        ("ties", {"density": 1, "combine": "sum", "scale": 1 / T}),
        ("dare_task_arithmetic", {"drop": 0, "scale": 1 / T}),
        ("dare_ties", {"drop": 0}),
        ("breadcrumbs", {"drop_small": 0, "drop_large": 0, "scale": 1 / T}),
        ("pcb", {"density": 1, "scale": 1}),
    ]:
        assert_same(merge(suite, method, **parameters), expected, 1e-5)


@pytest.mark.parametrize("method", ["ties", "dare_task_arithmetic", "dare_ties", "breadcrumbs"])
def test_a_tasks_weight_scales_its_task_vector(
    suite_of: Make, synthetic_states: States, method: str
) -> None:
    members, base = synthetic_states(["a", "b"], seed=4, counter=False)
    doubled = {k: base[k] + 2 * (v - base[k]) for k, v in members["a"].items()}
    weighted = run(suite_of(members, base), method, weights={"a": 2.0})
    direct = run(suite_of(members | {"a": doubled}, base), method)
    assert_same(weighted, {k: v.double().numpy() for k, v in direct.items()}, 1e-5)


@pytest.mark.parametrize("method", ["dare_ties", "breadcrumbs", "ties"])
def test_the_average_can_be_the_origin(synthetic_suite: Make, method: str) -> None:
    suite = synthetic_suite(3, seed=6)
    zero = run(suite, method, origin="average", parameters={"scale": 0})
    mean = {n: sum(e[n] for e in states(suite)[0]) / 3 for n in states(suite)[0][0]}
    assert_same(zero, mean, 1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2, 3, 2, 2), (0, 3)], ids=str)
@pytest.mark.parametrize(("method", "parameters"), SETTINGS)
def test_every_shape_has_a_defined_result(
    suite_of: Make, method: str, parameters: dict[str, Any], shape: tuple[int, ...]
) -> None:
    base = {"w.weight": torch.ones(shape)}
    for factors in ((1.5,), (1.0,), (1.5, 1.5), (1.5, 0.5), (1.0, 2.0, 1.0)):
        members = {f"t{i}": {"w.weight": f * torch.ones(shape)} for i, f in enumerate(factors)}
        got = merge(suite_of(members, base), method, **parameters)["w.weight"]
        assert got.shape == shape
        assert torch.isfinite(got).all()
        if set(factors) == {1.0}:
            assert torch.equal(got, base["w.weight"])


# Overrides


@pytest.mark.parametrize(
    ("method", "changed"),
    [("ties", {"density": 0.5}), ("pcb", {"density": 0.5}), ("pcb", {"variant": "code"})],
)
def test_an_override_cannot_change_what_is_measured_over_the_model(
    synthetic_suite: Make, method: str, changed: dict[str, Any]
) -> None:
    override = {"match": "blocks.*", "parameters": changed}
    with pytest.raises(RecipeError, match="override"):
        run(synthetic_suite(2), method, overrides=[override])


def test_an_override_may_change_the_rest(synthetic_suite: Make) -> None:
    suite = synthetic_suite(3, seed=2)
    key = "blocks.0.mlp.fc2.weight"

    def one(method: str, usual: dict[str, Any], changed: dict[str, Any]) -> dict[str, Tensor]:
        override = {"match": key, "parameters": changed}
        return run(suite, method, parameters=usual, overrides=[override])

    got = one("pcb", {"scale": 1.0}, {"scale": 0.5})[key]
    assert_same({key: got}, {key: pcb(suite, 0.1, 0.5, "paper")[key]}, 1e-4)
    got = one("ties", {"trim": "tensor", "density": 0.2}, {"density": 0.6})[key]
    assert_same({key: got}, {key: ties(suite, 0.6, 1.0, "tensor")[key]}, 1e-5)
    # A recipe of the global trim may take single tensors by themselves.
    got = one("ties", {"density": 0.2}, {"trim": "tensor", "density": 0.6})[key]
    assert_same({key: got}, {key: ties(suite, 0.6, 1.0, "tensor")[key]}, 1e-5)
