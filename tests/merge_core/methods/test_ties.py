"""TIES: hand-worked examples, and the exact threshold over the whole model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from merge_core.factors.store import FactorStore
from merge_core.methods.declaration import Run
from merge_core.methods.selection import count_kept
from merge_core.methods.sparse import TiesParameters, thresholds
from merge_core.progress import Progress
from merge_core.suites.suite import Suite
from merge_core.task_vectors import TensorGroups
from tests.merge_core.float64_reference import assert_same, merge, states, ties_limits

Make = Callable[..., Suite]


def of_vectors(suite_of: Make, *taus: list[list[float]], base: float = 0.0) -> Suite:
    """A suite of one parameter whose task vectors are these matrices."""
    start = torch.full_like(torch.tensor(taus[0]), base)
    experts = {f"t{i}": {"w.weight": start + torch.tensor(tau)} for i, tau in enumerate(taus)}
    return suite_of(experts, {"w.weight": start})


def merge_matrix(suite: Suite, **parameters: object) -> list[list[float]]:
    return merge(suite, "ties", **parameters)["w.weight"].tolist()


@pytest.mark.parametrize("trim", ["global", "tensor"])
def test_by_hand_without_trimming(suite_of: Make, trim: str) -> None:
    # entry by entry: (1, 3) agree -> 2; (4, −2) elect + -> 4; (−6, 1) elect − -> −6; (0, 5) -> 5
    suite = of_vectors(suite_of, [[1.0, 4.0], [-6.0, 0.0]], [[3.0, -2.0], [1.0, 5.0]])
    assert merge_matrix(suite, density=1.0, trim=trim) == [[2.0, 4.0], [-6.0, 5.0]]
    assert merge_matrix(suite, density=1.0, scale=0.5, trim=trim) == [[1.0, 2.0], [-3.0, 2.5]]


@pytest.mark.parametrize("trim", ["global", "tensor"])
def test_by_hand_with_half_of_the_entries(suite_of: Make, trim: str) -> None:
    # kept: {4, −6} of the first, {3, 5} of the second; no entry meets another.
    suite = of_vectors(suite_of, [[1.0, 4.0], [-6.0, 0.0]], [[3.0, -2.0], [1.0, 5.0]])
    assert merge_matrix(suite, density=0.5, trim=trim) == [[3.0, 4.0], [-6.0, 5.0]]
    # 0.7 of 4 is 2.8: the floor keeps two as well.
    assert merge_matrix(suite, density=0.7, trim=trim) == [[3.0, 4.0], [-6.0, 5.0]]


def test_the_sign_is_elected_by_mass_not_by_count(suite_of: Make) -> None:
    suite = of_vectors(suite_of, [[5.0, 1.0]], [[-2.0, 1.0]], [[-2.0, -4.0]])
    # 5 − 2 − 2 > 0 elects + although two of three say −; 1 + 1 − 4 < 0 elects −.
    assert merge_matrix(suite, density=1.0) == [[5.0, -4.0]]


def test_an_even_vote_changes_nothing(suite_of: Make) -> None:
    suite = of_vectors(suite_of, [[2.0, 1.0]], [[-2.0, 1.0]], base=10.0)
    assert merge_matrix(suite, density=1.0) == [[10.0, 11.0]]


def test_the_mean_is_over_those_that_agree_not_over_all(suite_of: Make) -> None:
    suite = of_vectors(suite_of, [[2.0]], [[4.0]], [[0.0]], [[-1.0]])
    assert merge_matrix(suite, density=1.0) == [[3.0]]


def test_global_and_tensor_trims_differ_where_layers_differ(suite_of: Make) -> None:
    zero = torch.zeros(4)
    tau = {"loud.weight": torch.tensor([9.0, 8.0, 7.0, 6.0]), "quiet.weight": 0.1 * torch.ones(4)}
    tau["quiet.weight"][2] = 0.5
    suite = suite_of({"t": tau}, {"loud.weight": zero, "quiet.weight": zero})
    everywhere = merge(suite, "ties", density=0.5, trim="global")
    each = merge(suite, "ties", density=0.25, trim="tensor")
    assert everywhere["loud.weight"].tolist() == [9.0, 8.0, 7.0, 6.0]
    assert everywhere["quiet.weight"].tolist() == [0.0] * 4
    assert each["loud.weight"].tolist() == [9.0, 0.0, 0.0, 0.0]
    assert each["quiet.weight"].tolist() == [0.0, 0.0, 0.5, 0.0]


@pytest.mark.parametrize("trim", ["global", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_density_one_keeps_every_entry_and_zero_none(
    synthetic_suite: Make, trim: str, dtype: torch.dtype
) -> None:
    suite = synthetic_suite(1, dtype=dtype, seed=1)
    expert, base = states(suite)[0][0], states(suite)[1]
    assert_same(merge(suite, "ties", density=1.0, trim=trim), expert, 1e-6)
    assert_same(merge(suite, "ties", density=0.0, trim=trim), base, 1e-12)


@pytest.mark.parametrize("trim", ["global", "tensor"])
def test_a_tiny_density_keeps_the_single_largest_entry(suite_of: Make, trim: str) -> None:
    suite = of_vectors(suite_of, [[1.0, -4.0], [3.0, 2.0]])
    assert merge_matrix(suite, density=1e-9, trim=trim) == [[0.0, -4.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("density", "total", "kept"),
    [(0.0, 10, 0), (1.0, 10, 10), (0.29, 100, 29), (1e-12, 10, 1), (0.999, 10, 9), (0.5, 1, 1),
     (1.0, 0, 0), (0.2, 0, 0)],
)  # fmt: skip
def test_a_density_keeps_the_floor_and_at_least_one(density: float, total: int, kept: int) -> None:
    assert count_kept(density, total) == kept


def find_limits(suite: Suite, density: float) -> list[float]:
    groups = TensorGroups(suite, None, FactorStore())
    state = thresholds(groups, TiesParameters(density=density), Run(), Progress())
    assert state is not None
    return state.tolist()


def sort_limits(suite: Suite, density: float) -> list[float]:
    experts, base = states(suite)
    rows = [
        np.concatenate([(e[n] - base[n]).astype(np.float32).ravel() for n in e]) for e in experts
    ]
    return ties_limits(np.stack(rows).astype(float), density).tolist()


# Magnitudes that share their upper or lower 16 bits, repeat, vanish, or are subnormal.
awkward = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1.0000001, -1.0000001, 1.0000002, 1.0078125, 2.0, 65536.0, -65537.0,
     3e38, -3e38, 1e-45, -1e-45, 1e-40, 1.17549435e-38, 0.1, -0.1, 0.10000001]
)  # fmt: skip
any_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    st.lists(st.one_of(awkward, any_float32), min_size=12, max_size=12),
    st.one_of(st.sampled_from([0.0, 1.0, 1e-9, 0.5, 0.2, 11 / 12, 1 / 12]), st.floats(0, 1)),
)
def test_the_threshold_is_the_full_sorts(
    suite_of: Make, entries: list[float], density: float
) -> None:
    values = torch.tensor(entries, dtype=torch.float32)
    zero = {"a.weight": torch.zeros(2, 2), "b": torch.zeros(2), "n": torch.tensor(3)}
    experts = {
        t: {"a.weight": row[:4].reshape(2, 2), "b": row[4:], "n": torch.tensor(7)}
        for t, row in (("x", values[:6]), ("y", values[6:]))
    }
    suite = suite_of(experts, zero)
    assert find_limits(suite, density) == sort_limits(suite, density)


@pytest.mark.parametrize("density", [0.0, 1e-9, 0.01, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_threshold_is_the_full_sorts_on_a_model(
    synthetic_suite: Make, density: float, dtype: torch.dtype
) -> None:
    shapes = {"a.weight": (70, 60), "b.weight": (30, 20, 3), "c": (500,), "d": ()}
    suite = synthetic_suite(3, shapes=shapes, seed=5, dtype=dtype, spread=0.01)
    # float64 differences are rounded once to float32; for narrower weights that is exact.
    assert find_limits(suite, density) == sort_limits(suite, density)


def test_float64_task_vectors_are_ranked_as_finely_as_float32_allows(suite_of: Make) -> None:
    tau: Tensor = torch.tensor([0.1, 0.2, 0.3, 0.7, 1.1, 1.3], dtype=torch.float64)
    suite = suite_of({"t": {"w": tau}}, {"w": torch.zeros(6, dtype=torch.float64)})
    for trim in ("global", "tensor"):
        for kept in range(1, 7):
            merged = merge(suite, "ties", density=kept / 6, trim=trim)["w"]
            assert merged.dtype == torch.float64
            assert merged.tolist() == [0.0] * (6 - kept) + tau[6 - kept :].tolist()
