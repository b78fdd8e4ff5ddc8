"""PCB-Merging in both variants, against float64 references and by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from merge_core.suites.suite import Suite
from tests.merge_core.float64_reference import assert_same, merge
from tests.merge_core.sparse_reference import (
    matrix,
    of_vectors,
    pcb,
    pcb_weights,
    run,
)

Make = Callable[..., Suite]
States = Callable[..., tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]]

seeds = st.integers(0, 10_000)
experts = st.integers(1, 5)
scales = st.floats(-2, 3).map(lambda x: round(x, 3))
shares = st.floats(0, 1).map(lambda x: round(x, 3))
VARIANTS = ("paper", "code")
HAND = ([[1.0, 4.0], [-6.0, 0.0]], [[3.0, -2.0], [1.0, 5.0]])


@pytest.mark.parametrize("variant", VARIANTS)
@given(seeds, experts, scales, st.floats(0.001, 1))
def test_pcb_follows_both_variants(
    synthetic_suite: Make, variant: str, seed: int, T: int, scale: float, density: float
) -> None:
    suite = synthetic_suite(T, seed=seed)
    got = merge(suite, "pcb", variant=variant, density=density, scale=scale)
    assert_same(got, pcb(suite, density, scale, variant), 1e-4)


def test_pcb_code_by_hand(suite_of: Make) -> None:
    # One task, τ = (1, 2, 3, 4): tails clip to [1, 3], intra exp(((|τ|−1)/2)²), inter tanh(τ²).
    # Half is kept: the threshold is the third score (int(4·0.5) = 2), the fourth the largest.
    # Scores 3 and 4 differ only by tanh(9) and tanh(16): weights 0 and 1; 4 is clipped to 3.
    suite = of_vectors(suite_of, [[0.25, 0.5], [0.75, 1.0]])
    got = matrix(suite, "pcb", variant="code", density=0.5, scale=1)
    assert got == [[0.0, 0.0], [0.0, 0.75]]


def test_pcb_paper_by_hand(suite_of: Make) -> None:
    # τ_1 = (2, 1), τ_2 = (1, 2). Norm(τ_1²) = (1, 0), Norm(τ_1 τ_2) = (0, 0), T = 2:
    # β_1 ∝ (e², 1)/(e² + 1) · ((e, 1)/(e + 1) + (1, 1)/2), β_2 the same reversed.
    e = np.e
    strong = e**2 / (e**2 + 1) * (e / (e + 1) + 0.5)
    weak = 1 / (e**2 + 1) * (1 / (e + 1) + 0.5)
    mean = (strong * 2 + weak * 1) / (strong + weak)
    suite = of_vectors(suite_of, [[2.0, 1.0]], [[1.0, 2.0]])
    got = matrix(suite, "pcb", density=1, scale=1)
    np.testing.assert_allclose(got, [[mean, mean]], rtol=1e-6)
    # Half of two entries: each keeps its own 2.
    assert matrix(suite, "pcb", density=0.5, scale=1) == [[2.0, 2.0]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_pcbs_task_weights_come_after_the_balancing(synthetic_suite: Make, variant: str) -> None:
    suite = synthetic_suite(3, seed=4)
    got = run(
        suite,
        "pcb",
        parameters={"variant": variant, "density": 0.4},
        weights={"task0": 2.0, "task2": 0.5},
    )
    assert_same(got, pcb(suite, 0.4, 1.2, variant, (2.0, 1.0, 0.5)), 1e-4)


def test_pcbs_tanh_is_not_scale_free_but_the_papers_softmax_is(suite_of: Make) -> None:
    taus = [torch.randn(8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    moves = {}
    for variant in VARIANTS:
        small, large = (
            torch.tensor(
                matrix(
                    of_vectors(suite_of, *[(f * tau).tolist() for tau in taus]),
                    "pcb",
                    variant=variant,
                    density=0.5,
                )
            )
            / f
            for f in (0.01, 10)
        )
        moves[variant] = (small - large).abs().max().item()
    assert moves["paper"] < 1e-5
    assert moves["code"] > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_task_that_changed_nothing_takes_no_part_in_pcb(
    suite_of: Make, synthetic_states: States, variant: str
) -> None:
    members, base = synthetic_states(["a"], seed=4, counter=False)
    settings = {"variant": variant, "density": 1.0, "scale": 1.0}
    got = merge(suite_of({"a": members["a"], "idle": base}, base), "pcb", **settings)
    if variant == "paper":
        assert_same(got, {k: v.double().numpy() for k, v in members["a"].items()}, 1e-5)
    assert all(torch.isfinite(value).all() for value in got.values())
    assert any(not torch.equal(got[key], base[key]) for key in base)


@pytest.mark.parametrize("tail", ["outlier", "student"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_outlier_leaves_the_ranks_right(suite_of: Make, variant: str, tail: str) -> None:
    # Norm's range is the outlier's, so that all other scores lie within some 1e-4 of each other.
    source = np.random.default_rng(5)
    if tail == "outlier":
        taus = source.normal(size=(3, 300, 300))
        taus[:, 0, 0] = 100
    else:
        taus = source.standard_t(2, size=(3, 300, 300))
    base = torch.tensor(source.normal(size=(300, 300)), dtype=torch.float32)
    members = {f"t{i}": {"w.weight": base + torch.tensor(t).float()} for i, t in enumerate(taus)}
    suite = suite_of(members, {"w.weight": base})
    # Differences in float64: in the reference's float32 ones the ranks are others.
    exact = np.stack([(e["w.weight"].double() - base.double()).ravel() for e in members.values()])
    beta, whole = pcb_weights(exact, 0.1, variant)
    expected = (beta * whole).sum(axis=0) / np.maximum(beta.sum(axis=0), 1e-300)
    got = merge(suite, "pcb", variant=variant, density=0.1, scale=1.0)["w.weight"] - base
    error = np.linalg.norm(got.double().numpy().ravel() - expected) / np.linalg.norm(expected)
    assert error < 1e-6  # of two roundings to float32; a single entry more is 1e-3 and up
