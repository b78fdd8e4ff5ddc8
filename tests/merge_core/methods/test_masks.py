"""TALL-masks, Consensus and EMR: formulas, hand-worked examples, identities, storage."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from merge_core.factors.store import FactorStore
from merge_core.methods import blockwise, get_method
from merge_core.methods.declaration import Run
from merge_core.progress import Progress
from merge_core.suites.suite import Suite
from merge_core.task_vectors import TensorGroups
from tests.merge_core.float64_reference import assert_same, merge, states, task_arithmetic
from tests.merge_core.sparse_reference import INDEXED_REFERENCES, consensus, emr, run, tall

Make = Callable[..., Suite]
States = Callable[..., tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]]
INDEXED = tuple(INDEXED_REFERENCES)

seeds = st.integers(0, 10_000)
experts = st.integers(1, 5)
thresholds = st.floats(0, 3).map(lambda x: round(x, 3))


def of_vectors(suite_of: Make, *taus: list[list[float]], base: float = 0.0) -> Suite:
    start = torch.full_like(torch.tensor(taus[0]), base)
    members = {f"t{i}": {"w.weight": start + torch.tensor(tau)} for i, tau in enumerate(taus)}
    return suite_of(members, {"w.weight": start})


def matrix(suite: Suite, method: str, task: str | None = None, **parameters: Any):
    return run(suite, method, task, parameters=parameters)["w.weight"].tolist()


@given(seeds, experts, thresholds, st.floats(-1, 2))
def test_consensus_follows_its_formula(
    synthetic_suite: Make, seed: int, T: int, threshold: float, scale: float
) -> None:
    suite = synthetic_suite(T, seed=seed)
    got = merge(suite, "consensus", threshold=threshold, scale=scale)
    assert_same(got, consensus(suite, threshold, scale))


@given(seeds, experts, thresholds)
def test_tall_masks_follow_their_formula(
    synthetic_suite: Make, seed: int, T: int, threshold: float
) -> None:
    suite = synthetic_suite(T, seed=seed)
    for place, task in enumerate(suite.tasks):
        got = run(suite, "tall_masks", task, parameters={"threshold": threshold})
        assert_same(got, tall(suite, threshold, place))


@given(seeds, experts)
def test_emr_follows_its_formula(synthetic_suite: Make, seed: int, T: int) -> None:
    suite = synthetic_suite(T, seed=seed)
    for place, task in enumerate(suite.tasks):
        assert_same(run(suite, "emr", task), emr(suite, place))


@pytest.mark.parametrize("name", INDEXED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_change_the_inputs_only(
    synthetic_suite: Make, name: str, dtype: torch.dtype
) -> None:
    suite = synthetic_suite(dtype=dtype, seed=11)
    parameters, reference = INDEXED_REFERENCES[name]
    for place, task in enumerate(suite.tasks):
        got = run(suite, name, task, parameters=parameters)
        assert_same(got, reference(suite, place), 1e-4)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert all(got[key].dtype == wide for key in states(suite)[1])


def test_tall_masks_by_hand(suite_of: Make) -> None:
    # τ_MTL = (4, 2, −5, 5); what the others add, for the first task: (3, −2, 1, 5).
    suite = of_vectors(suite_of, [[1.0, 4.0], [-6.0, 0.0]], [[3.0, -2.0], [1.0, 5.0]])
    # λ = 1: |1| ≥ 3 no, 4 ≥ 2 yes, 6 ≥ 1 yes, 0 ≥ 5 no; for the second 3 ≥ 1, 2 ≥ 4 no, no, yes.
    assert matrix(suite, "tall_masks", "t0", threshold=1) == [[0.0, 2.0], [-5.0, 0.0]]
    assert matrix(suite, "tall_masks", "t1", threshold=1) == [[4.0, 0.0], [0.0, 5.0]]
    # λ = 1/3 lets the first in by equality (1 ≥ 3/3), and the second's −2 (2 ≥ 4/3).
    assert matrix(suite, "tall_masks", "t0", threshold=0.25) == [[4.0, 2.0], [-5.0, 0.0]]
    assert matrix(suite, "tall_masks", "t1", threshold=0.5) == [[4.0, 2.0], [0.0, 5.0]]
    # Both are active in the first two entries at λ = 1/4, in the second alone at λ = 1/2.
    assert matrix(suite, "consensus", threshold=0.25, scale=1) == [[4.0, 2.0], [0.0, 0.0]]
    assert matrix(suite, "consensus", threshold=0.5, scale=0.5) == [[0.0, 1.0], [0.0, 0.0]]


def test_emr_by_hand(suite_of: Make) -> None:
    # Signs of (4, 2, −5, 5); largest agreeing: (3, 4, −6, 5).
    suite = of_vectors(suite_of, [[1.0, 4.0], [-6.0, 0.0]], [[3.0, -2.0], [1.0, 5.0]], base=1.0)
    # First: mask (1, 1, 1, 0), λ = 11/13. Second: mask (1, 0, 0, 1), λ = 11/8.
    first, second = (np.array(matrix(suite, "emr", t)) - 1 for t in ("t0", "t1"))
    np.testing.assert_allclose(first, 11 / 13 * np.array([[3, 4], [-6, 0]]), rtol=1e-6)
    np.testing.assert_allclose(second, 11 / 8 * np.array([[3, 0], [0, 5]]), rtol=1e-6)


def test_emrs_rescaling_is_over_the_model_not_the_tensor(suite_of: Make) -> None:
    zero = {"a": torch.zeros(1), "b": torch.zeros(3)}
    members = {
        "s": {"a": torch.tensor([1.0]), "b": torch.tensor([1.0, 1.0, 1.0])},
        "t": {"a": torch.tensor([5.0]), "b": torch.tensor([1.0, 1.0, 1.0])},
    }
    got = run(suite_of(members, zero), "emr", "s")
    # λ_s = 4 / (5 + 3), whatever the tensors' own ratios 1/5 and 1 are.
    assert got["a"].tolist() == [2.5]
    assert got["b"].tolist() == [0.5, 0.5, 0.5]


@given(seeds, experts)
def test_emr_keeps_each_tasks_mean_magnitude_and_signs(
    synthetic_suite: Make, seed: int, T: int
) -> None:
    suite = synthetic_suite(T, seed=seed)
    members, base = states(suite)
    for own, task in zip(members, suite.tasks, strict=True):
        got = run(suite, "emr", task)
        update = {n: got[n].double().numpy() - b for n, b in base.items()}
        before = sum(np.abs(own[n] - b).sum() for n, b in base.items())
        after = sum(np.abs(u).sum() for u in update.values())
        np.testing.assert_allclose(after, before, rtol=1e-4)
        for n, b in base.items():
            assert (update[n] * (own[n] - b) >= 0).all()


@given(seeds, st.integers(1, 4))
def test_equal_experts_and_a_single_one_give_that_expert(
    suite_of: Make, synthetic_states: States, seed: int, T: int
) -> None:
    members, base = synthetic_states(["only"], seed=seed)
    suite = suite_of({f"t{i}": members["only"] for i in range(T)}, base)
    expected = states(suite)[0][0]
    assert_same(run(suite, "emr", f"t{T - 1}"), expected, 1e-5)
    # |τ| ≥ λ (T − 1) |τ|: every entry is active while λ ≤ 1/(T − 1), and τ_MTL = T τ.
    settings = {"threshold": 0.99 / max(1, T - 1), "scale": 1 / T}
    assert_same(merge(suite, "consensus", **settings), expected, 1e-5)
    if T == 1:
        for threshold in (0.0, 0.4, 10.0):
            got = run(suite, "tall_masks", "t0", parameters={"threshold": threshold})
            assert_same(got, expected, 1e-5)
            assert_same(merge(suite, "consensus", threshold=threshold, scale=1), expected, 1e-5)


@given(seeds, experts)
def test_without_a_threshold_nothing_is_masked(synthetic_suite: Make, seed: int, T: int) -> None:
    suite = synthetic_suite(T, seed=seed)
    assert_same(merge(suite, "consensus", threshold=0, scale=0.4), task_arithmetic(suite, 0.4))
    for task in suite.tasks:
        got = run(suite, "tall_masks", task, parameters={"threshold": 0})
        assert_same(got, task_arithmetic(suite, 1.0))


def test_disjoint_tasks_are_told_apart_exactly(suite_of: Make) -> None:
    # Tasks that change different entries: each gets its own back, and no entry is shared.
    taus = [[[3.0, 0.0], [0.0, 0.0]], [[0.0, -2.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 4.0]]]
    suite = of_vectors(suite_of, *taus, base=0.5)
    for t, tau in enumerate(taus):
        expected = (torch.tensor(tau) + 0.5).tolist()
        assert matrix(suite, "tall_masks", f"t{t}") == expected
        assert matrix(suite, "emr", f"t{t}") == expected
    assert matrix(suite, "consensus", scale=1) == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("name", INDEXED)
def test_the_order_of_the_experts_does_not_matter(
    suite_of: Make, synthetic_states: States, name: str
) -> None:
    members, base = synthetic_states(["a", "b", "c"], seed=8)
    for task in members:
        merged = [
            run(suite_of({t: members[t] for t in order}, base), name, task)
            for order in itertools.permutations("abc")
        ]
        expected = {k: merged[0][k].double().numpy() for k in base if k in states_of(merged[0])}
        for other in merged[1:]:
            assert_same(other, expected, 1e-5)


def states_of(state: dict[str, Tensor]) -> list[str]:
    return [key for key, value in state.items() if value.is_floating_point()]


@pytest.mark.parametrize("name", INDEXED)
def test_moving_base_and_experts_together_moves_the_model_by_as_much(
    suite_of: Make, synthetic_states: States, name: str
) -> None:
    dtype = torch.float64
    members, base = synthetic_states(["a", "b", "c"], seed=9, dtype=dtype, counter=False)
    _, shift = synthetic_states([], seed=77, dtype=dtype, counter=False)

    def moved(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value + shift[key] for key, value in state.items()}

    here = run(suite_of(members, base), name, "b")
    there = run(suite_of({t: moved(s) for t, s in members.items()}, moved(base)), name, "b")
    assert_same(there, {k: v.numpy() for k, v in moved(here).items()}, 1e-6)


@pytest.mark.parametrize("factor", [1e-25, 1e25])
@pytest.mark.parametrize("name", INDEXED)
def test_tiny_and_huge_weights_are_masked_like_ordinary_ones(
    suite_of: Make, synthetic_states: States, name: str, factor: float
) -> None:
    members, base = synthetic_states(["a", "b", "c"], seed=6, counter=False)
    plain = run(suite_of(members, base), name, "a")

    def scaled(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: (value.double() * factor).float() for key, value in state.items()}

    suite = suite_of({t: scaled(s) for t, s in members.items()}, scaled(base))
    for key, value in run(suite, name, "a").items():
        got = value.double().numpy() / factor
        np.testing.assert_allclose(got, plain[key].numpy(), rtol=1e-4, atol=1e-4, err_msg=key)


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2, 3, 2, 2), (0, 3)], ids=str)
@pytest.mark.parametrize("name", [*INDEXED, "consensus"])
def test_every_shape_has_a_defined_result(
    suite_of: Make, name: str, shape: tuple[int, ...]
) -> None:
    base = {"w.weight": torch.ones(shape)}
    for factors in ((1.5,), (1.0,), (1.5, 1.5), (1.5, 0.5), (1.0, 2.0, 1.0)):
        members = {f"t{i}": {"w.weight": f * torch.ones(shape)} for i, f in enumerate(factors)}
        suite = suite_of(members, base)
        for task in suite.tasks if name in INDEXED else (None,):
            got = run(suite, name, task)["w.weight"]
            assert got.shape == shape
            assert torch.isfinite(got).all()
            # An even vote, and a task that changed nothing, leave the base to EMR.
            if name == "emr" and factors in ((1.5, 0.5), (1.0,)):
                assert torch.equal(got, base["w.weight"])


def test_neither_blocks_nor_streaming_change_emr(synthetic_suite: Make, monkeypatch) -> None:
    suite = synthetic_suite(3, seed=2)
    whole, streamed = run(suite, "emr", "task1"), run(suite, "emr", "task1", keep=False)
    monkeypatch.setattr(blockwise, "BLOCK", 7)
    blocked = run(suite, "emr", "task1")
    for key, value in whole.items():
        assert torch.equal(value, streamed[key])
        torch.testing.assert_close(value, blocked[key], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("T", [1, 3, 8, 9])
def test_storage_counts_base_unified_vector_and_masks(synthetic_suite: Make, T: int) -> None:
    shapes = {"a.weight": (5, 3), "b": (), "c": (8,)}
    suite = synthetic_suite(T, shapes=shapes, seed=1)
    groups = TensorGroups(suite, None, FactorStore())
    bytes_of = {}
    for name in INDEXED:
        method = get_method(name)
        state = None
        if method.prepare is not None:
            state = method.prepare(groups, method.parameters(), Run(), Progress())
        assert method.storage is not None
        bytes_of[name] = sum(
            method.storage(group, method.parameters(), Run(state=state))
            for group in groups
            if group.info.is_floating
        )
    # Two numbers of two bytes for each of the 24 entries; masks fill whole bytes per parameter.
    masks = sum(-(-n * T // 8) for n in (15, 1, 8))
    assert bytes_of == {"tall_masks": 4 * 24 + masks, "emr": 4 * 24 + masks + 2 * T}
