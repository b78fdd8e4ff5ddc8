"""Every method against its formula in float64, and what holds for all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_core.methods import get_method, methods
from merge_core.suites.suite import Suite
from tests.merge_core import sparse_reference, spectral_reference
from tests.merge_core.float64_reference import (
    assert_same,
    average,
    cart,
    iso_c,
    low_rank_task_arithmetic,
    merge,
    states,
    task_arithmetic,
    ties,
    tsv_m,
)
from tests.merge_core.sparse_reference import SPARSE_REFERENCES
from tests.merge_core.spectral_reference import SPECTRAL_REFERENCES

Make = Callable[..., Suite]
States = Callable[..., tuple[dict[str, Any], dict[str, torch.Tensor]]]
COUNTER = "bn.num_batches_tracked"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

seeds = st.integers(0, 10_000)
experts = st.integers(1, 5)
scales = st.floats(-2, 3).map(lambda x: round(x, 3))
shares = st.floats(0.01, 1).map(lambda x: round(x, 3))


def share(rho: float) -> Callable[[int], int]:
    return lambda r: max(1, int(rho * r + 1e-9))


@given(seeds, experts)
def test_the_average_is_the_mean_of_the_experts(synthetic_suite: Make, seed: int, T: int) -> None:
    suite = synthetic_suite(T, seed=seed, with_base=False)
    assert_same(merge(suite, "average"), average(suite), 1e-6)


@given(seeds, experts, scales)
def test_task_arithmetic_follows_its_formula(
    synthetic_suite: Make, seed: int, T: int, scale: float
) -> None:
    suite = synthetic_suite(T, seed=seed)
    assert_same(merge(suite, "task_arithmetic", scale=scale), task_arithmetic(suite, scale))


@given(seeds, experts, scales, shares)
def test_cart_follows_its_formula_at_every_share(
    synthetic_suite: Make, seed: int, T: int, scale: float, rho: float
) -> None:
    suite = synthetic_suite(T, seed=seed, with_base=False)
    assert_same(merge(suite, "cart", rank=rho, scale=scale), cart(suite, share(rho), scale))


@given(seeds, st.integers(1, 12), scales)
def test_cart_follows_its_formula_at_every_whole_rank(
    synthetic_suite: Make, seed: int, k: int, scale: float
) -> None:
    suite = synthetic_suite(4, seed=seed)
    assert_same(merge(suite, "cart", rank=k, scale=scale), cart(suite, lambda r: min(k, r), scale))


@given(seeds, experts, scales, shares)
def test_low_rank_task_arithmetic_follows_its_formula(
    synthetic_suite: Make, seed: int, T: int, scale: float, rho: float
) -> None:
    suite = synthetic_suite(T, seed=seed)
    merged = merge(suite, "low_rank_task_arithmetic", rank=rho, scale=scale)
    assert_same(merged, low_rank_task_arithmetic(suite, share(rho), scale))


@given(seeds, experts, scales)
def test_tsv_m_follows_its_formula(synthetic_suite: Make, seed: int, T: int, scale: float) -> None:
    suite = synthetic_suite(T, seed=seed)
    assert_same(merge(suite, "tsv_m", scale=scale), tsv_m(suite, scale), 1e-4)


@given(seeds, experts, scales)
def test_iso_c_follows_its_formula(synthetic_suite: Make, seed: int, T: int, scale: float) -> None:
    suite = synthetic_suite(T, seed=seed)
    assert_same(merge(suite, "iso_c", scale=scale), iso_c(suite, scale), 1e-4)


@given(seeds, experts, scales, st.floats(0, 1), st.sampled_from(["global", "tensor"]))
def test_ties_follows_its_algorithm_with_both_trims(
    synthetic_suite: Make, seed: int, T: int, scale: float, density: float, trim: str
) -> None:
    suite = synthetic_suite(T, seed=seed)
    merged = merge(suite, "ties", density=density, scale=scale, trim=trim)
    assert_same(merged, ties(suite, density, scale, trim))


REFERENCES: dict[str, tuple[dict[str, Any], Callable[[Suite], dict[str, np.ndarray]]]] = {
    "average": ({}, average),
    "task_arithmetic": ({"scale": 0.4}, lambda s: task_arithmetic(s, 0.4)),
    "ties": ({"density": 0.3, "scale": 1.2}, lambda s: ties(s, 0.3, 1.2, "global")),
    "low_rank_task_arithmetic": (
        {"rank": 2, "scale": 0.4},
        lambda s: low_rank_task_arithmetic(s, lambda r: min(2, r), 0.4),
    ),
    "tsv_m": ({}, lambda s: tsv_m(s, 1.0)),
    "iso_c": ({}, lambda s: iso_c(s, 1.0)),
    "cart": ({"rank": 2}, lambda s: cart(s, lambda r: min(2, r), 1.0)),
    **SPARSE_REFERENCES,
    # SLERP takes two experts: see test_geometric_methods.
    **{name: entry for name, entry in SPECTRAL_REFERENCES.items() if name != "slerp"},
}


def test_every_registered_method_has_a_reference() -> None:
    learning = {name for name, method in methods().items() if method.learns is not None}
    indexed = {name for name, method in methods().items() if method.indexed}
    assert indexed == {*sparse_reference.INDEXED_REFERENCES, *spectral_reference.INDEXED_REFERENCES}
    assert set(methods()) == {*REFERENCES, "slerp"} | indexed | learning


def test_methods_are_listed_in_the_order_of_their_place() -> None:
    places = [m.order for m in methods().values()]
    assert places == sorted(places)
    assert all(get_method(name).name == name for name in methods())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", REFERENCES)
def test_a_dtype_changes_the_precision_of_the_inputs_not_of_the_merge(
    synthetic_suite: Make, name: str, dtype: torch.dtype
) -> None:
    # Half-precision experts are merged in float32: the reference sees the same rounded inputs.
    suite = synthetic_suite(dtype=dtype, seed=11)
    parameters, reference = REFERENCES[name]
    merged = merge(suite, name, **parameters)
    assert_same(merged, reference(suite), 1e-4)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    for key in suite.parameters:
        assert torch.isfinite(merged[key].double()).all()
        assert merged[key].shape == suite.expert("task0").info(key).shape
        assert merged[key].dtype == (torch.int64 if key == COUNTER else working)


def test_plain_methods_keep_the_precision_of_float64_weights(synthetic_suite: Make) -> None:
    suite = synthetic_suite(dtype=torch.float64)
    assert_same(merge(suite, "average"), average(suite), 1e-14)
    assert_same(merge(suite, "task_arithmetic"), task_arithmetic(suite, 0.3), 1e-14)
    assert_same(merge(suite, "iso_c"), iso_c(suite, 1.0), 1e-12)


@pytest.mark.parametrize(
    "dtypes",
    [
        ("float16", "bfloat16", "float32", "float32"),
        ("float64", "float64", "float64", "float32"),
        ("float32", "float32", "float32", "float64"),
        ("float64", "float32", "float32", "float32"),
        ("bfloat16", "float32", "float64", "float32"),
    ],
    ids=",".join,
)
@pytest.mark.parametrize("name", REFERENCES)
def test_members_of_different_dtypes_are_merged_at_the_widest(
    suite_of: Make, synthetic_states: States, name: str, dtypes: tuple[str, ...]
) -> None:
    members, base = synthetic_states(["a", "b", "c"], seed=2)
    mixed = [
        {k: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for k, v in state.items()}
        for dtype, state in zip(dtypes, [*members.values(), base], strict=True)
    ]
    suite = suite_of(dict(zip(members, mixed, strict=False)), mixed[-1])
    parameters, reference = REFERENCES[name]
    assert_same(merge(suite, name, **parameters), reference(suite), 1e-4)


@pytest.mark.parametrize(
    ("name", "with_base"),
    [(n, b) for n in REFERENCES for b in (True, False) if b or not methods()[n].needs_base()],
)
def test_integer_buffers_come_from_the_base_else_from_the_first_expert(
    synthetic_suite: Make, name: str, with_base: bool
) -> None:
    merged = merge(synthetic_suite(with_base=with_base), name, **REFERENCES[name][0])
    assert merged[COUNTER].dtype == torch.int64
    assert merged[COUNTER].item() == (100 if with_base else 101)


def digests(suite: Suite) -> dict[Path, str]:
    files = suite.root.glob("*.safetensors")
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("name", REFERENCES)
def test_no_method_changes_its_inputs(synthetic_suite: Make, name: str) -> None:
    suite = synthetic_suite(seed=4)
    before, held = digests(suite), states(suite)
    first = {k: v.clone() for k, v in merge(suite, name, **REFERENCES[name][0]).items()}
    after = states(suite)
    for old, new in zip([*held[0], held[1]], [*after[0], after[1]], strict=True):
        assert all(np.array_equal(old[key], new[key]) for key in old)
    assert digests(suite) == before
    again = merge(suite, name, **REFERENCES[name][0])
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("name", REFERENCES)
def test_experts_equal_to_the_base_give_it_back(
    suite_of: Make, synthetic_states: States, name: str
) -> None:
    _, base = synthetic_states([], seed=3)
    suite = suite_of(dict.fromkeys("abc", base), base)
    merged = merge(suite, name, **REFERENCES[name][0])
    assert_same(merged, states(suite)[1], 1e-6)


@pytest.mark.parametrize("name", REFERENCES)
def test_an_all_zero_model_stays_zero(suite_of: Make, synthetic_states: States, name: str) -> None:
    _, base = synthetic_states([], seed=3)
    zero = {key: torch.zeros_like(value) for key, value in base.items()}
    for key, value in merge(suite_of({"a": zero, "b": zero}, zero), name).items():
        assert not value.any(), key


@pytest.mark.parametrize("factor", [1e-25, 1e25])
@pytest.mark.parametrize("name", REFERENCES)
def test_tiny_and_huge_weights_merge_like_ordinary_ones(
    suite_of: Make, synthetic_states: States, name: str, factor: float
) -> None:
    # Every rule is homogeneous: merging c·θ gives c times what merging θ gives.
    members, base = synthetic_states(["a", "b", "c"], seed=6, counter=False)
    plain = merge(suite_of(members, base), name, **REFERENCES[name][0])

    def scaled(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: (value.double() * factor).float() for key, value in state.items()}

    suite = suite_of({t: scaled(s) for t, s in members.items()}, scaled(base))
    for key, value in merge(suite, name, **REFERENCES[name][0]).items():
        got = value.double().numpy() / factor
        np.testing.assert_allclose(got, plain[key].numpy(), rtol=1e-4, atol=1e-4, err_msg=key)
