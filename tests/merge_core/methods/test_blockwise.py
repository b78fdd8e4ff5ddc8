"""Inner products and weighted sums of whole tensors, block by block, against NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_core.factors.store import FactorStore
from merge_core.methods import blockwise
from merge_core.methods.blockwise import gram, weighted_sum
from merge_core.suites.suite import Suite
from merge_core.task_vectors import TensorGroup, TensorGroups
from tests.merge_core.float64_reference import Array, states

Make = Callable[..., Suite]
SHAPES = {"w": (5, 7), "kernel": (2, 3, 2, 2), "scalar": (), "nothing": (0, 3)}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def parts(suite: Suite) -> list[tuple[TensorGroup, Array, Array]]:
    """Each parameter with its experts, T x entries, and its base."""
    experts, base = states(suite)
    return [
        (group, np.stack([e[group.name].ravel() for e in experts]), base[group.name].ravel())
        for group in TensorGroups(suite, None, FactorStore(), keep=True).members
    ]


@pytest.mark.parametrize("block", [3, 1 << 14])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("origin", [None, "base", "average"])
def test_gram_is_the_matrix_of_inner_products(
    synthetic_suite: Make,
    monkeypatch: pytest.MonkeyPatch,
    origin: Literal["base", "average"] | None,
    dtype: torch.dtype,
    block: int,
) -> None:
    monkeypatch.setattr(blockwise, "BLOCK", block)
    for group, experts, base in parts(synthetic_suite(4, SHAPES, dtype=dtype, counter=False)):
        about = {None: 0, "base": base, "average": experts.mean(axis=0)}[origin]
        expected = (experts - about) @ (experts - about).T
        np.testing.assert_allclose(gram(group, origin), expected, rtol=1e-13, atol=1e-13)


def test_gram_of_near_experts_is_as_sure_as_their_differences(suite_of: Make) -> None:
    base = torch.linspace(0.5, 1, 50)
    step = torch.finfo(torch.float32).eps
    members = {t: {"w": base + i * step} for i, t in enumerate("abc")}
    (group, experts, start), *_ = parts(suite_of(members, {"w": base}))
    expected = (experts - start) @ (experts - start).T
    np.testing.assert_allclose(gram(group, "base"), expected, rtol=1e-14)


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.sampled_from(DTYPES))
def test_a_weighted_sum_is_rounded_once(
    synthetic_suite: Make, weights: list[float], dtype: torch.dtype
) -> None:
    for group, experts, _ in parts(synthetic_suite(3, SHAPES, dtype=dtype, counter=False)):
        got = weighted_sum(group, torch.tensor(weights, dtype=torch.float64))
        assert got.shape == group.info.shape
        assert got.dtype == group.average.dtype
        tolerance = torch.finfo(got.dtype).eps
        expected = (np.array(weights) @ experts).reshape(got.shape)
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=10 * 2**-52)
