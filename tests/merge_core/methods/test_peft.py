"""TIES, DARE and Task Arithmetic against PEFT's merge utilities, which share no code with ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor

from merge_core.suites.suite import Suite
from tests.merge_core.float64_reference import merge

Make = Callable[..., Suite]
SHAPE = (6, 7)
NAME = "w.weight"


def draw_suite(suite_of: Make, T: int, seed: int) -> tuple[Suite, Tensor, list[Tensor]]:
    """A suite of one matrix, its base, and its task vectors."""
    source = torch.Generator().manual_seed(seed)
    base = torch.randn(SHAPE, generator=source)
    experts = [base + torch.randn(SHAPE, generator=source) for _ in range(T)]
    members = {f"t{i}": {NAME: expert} for i, expert in enumerate(experts)}
    return suite_of(members, {NAME: base}), base, [expert - base for expert in experts]


@given(st.integers(0, 999), st.integers(1, 5), st.floats(-2, 2))
def test_task_arithmetic(suite_of: Make, seed: int, T: int, scale: float) -> None:
    suite, base, taus = draw_suite(suite_of, T, seed)
    theirs = base + merge_utils.task_arithmetic(taus, torch.full((T,), scale))
    ours = merge(suite, "task_arithmetic", scale=scale)[NAME]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 999), st.integers(1, 5), st.sampled_from([0.1, 0.2, 0.5, 0.9, 1.0]))
def test_ties(suite_of: Make, seed: int, T: int, density: float) -> None:
    suite, base, taus = draw_suite(suite_of, T, seed)
    theirs = base + merge_utils.ties(taus, torch.ones(T), density)
    ours = merge(suite, "ties", density=density, trim="tensor")[NAME]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "theirs"),
    [("dare_task_arithmetic", merge_utils.dare_linear), ("dare_ties", merge_utils.dare_ties)],
)
@pytest.mark.parametrize("T", [2, 3, 5])
@pytest.mark.parametrize("drop", [0.2, 0.5, 0.9])
def test_dare_with_the_same_coins(
    suite_of: Make,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    theirs: Callable[..., Tensor],
    T: int,
    drop: float,
) -> None:
    """Our coins, read off each expert by itself, are thrown for PEFT too."""
    suite, base, taus = draw_suite(suite_of, T, seed=T)
    coins = [
        (merge(suite, "dare_task_arithmetic", (task,), drop=drop, scale=1)[NAME] - base).abs()
        > 1e-6
        for task in suite.tasks
    ]
    assert 0 < sum(int(coin.sum()) for coin in coins) < T * taus[0].numel()
    thrown = iter(coins)
    monkeypatch.setattr(merge_utils.torch, "bernoulli", lambda like: next(thrown).to(like.dtype))
    wanted = base + theirs(taus, torch.ones(T), density=1 - drop)
    ours = merge(suite, method, drop=drop, scale=1)[NAME]
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
