"""Methods to which every direction counts alike, on matrices whose directions do not: the same
answer at every size, and what the stored numbers do not resolve left out.

References are float64 decompositions of the stored numbers themselves, by LAPACK through numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.suites.suite import Suite

Make = Callable[..., Suite]
NAME = "l0.attn.qkv.weight"


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steep_matrix(m: int, n: int, seed: int, end: float) -> Tensor:
    """m x n with singular values from 1 to `end`² of min(m, n), in equal ratios."""
    r = min(m, n)
    U, V = (torch.linalg.qr(normal(side, r, seed=seed + side)).Q for side in (m, n))
    return (U * torch.logspace(0, np.log10(end), r, dtype=torch.float64)) @ V.T


def tsv_m(updates: Sequence[np.ndarray], k: int, live: Callable[[np.ndarray], int]) -> np.ndarray:
    """TSV-M's update of one matrix (arXiv:2412.00081, algorithm 1), of the leading directions."""
    left, values, right = [], [], []
    for update in updates:
        U, S, Vt = np.linalg.svd(update, full_matrices=False)
        q = min(k, live(S))
        left.append(U[:, :q])
        values.append(S[:q])
        right.append(Vt[:q].T)

    def polar(X: np.ndarray) -> np.ndarray:
        P, D, Qt = np.linalg.svd(X, full_matrices=False)
        kept = D > 1e-6 * D[0]
        return (P[:, kept] @ Qt[kept]).astype(np.float64)

    U, V = polar(np.concatenate(left, axis=1)), polar(np.concatenate(right, axis=1))
    return np.asarray((U * np.concatenate(values)) @ V.T)


def merged_update(suite: Suite, origin: str = "base") -> np.ndarray:
    recipe = make_recipe({"method": "tsv_m", "origin": origin})
    merged = MergeSession(suite, None, FactorStore()).merge(recipe)[NAME].double().numpy()
    return np.asarray(merged - origin_of(suite, origin))


def origin_of(suite: Suite, origin: str) -> np.ndarray:
    if origin == "base":
        assert suite.base is not None
        return suite.base.tensor(NAME).double().numpy()
    experts = [suite.expert(task).tensor(NAME) for task in suite.tasks]
    # As the merge's own origin: the average as rounded to float32.
    return torch.stack(experts).double().mean(dim=0).float().double().numpy()


def updates_of(suite: Suite, origin: str = "base") -> list[np.ndarray]:
    origin_ = origin_of(suite, origin)
    return [suite.expert(task).tensor(NAME).double().numpy() - origin_ for task in suite.tasks]


@pytest.mark.parametrize("last", [8e-3, 2e-3, 7e-4, 5e-5])
@pytest.mark.parametrize("shape", [(640, 576), (64, 48)])
def test_tsv_m_of_steep_spectra(suite_of: Make, shape: tuple[int, int], last: float) -> None:
    """The k-th direction down to `last` of the first, which counts as much as the first."""
    r, T = min(shape), 3
    k = r // T
    base = 0.02 * normal(*shape, seed=1)
    experts = {
        f"t{t}": {NAME: (base.float().double() + steep_matrix(*shape, 10 * t, last**T)).float()}
        for t in range(T)
    }
    suite = suite_of(experts, {NAME: base.float()})
    expected = tsv_m(updates_of(suite), k, len)
    got = merged_update(suite)
    assert np.linalg.norm(got - expected) < 1e-3 * np.linalg.norm(expected)


def lora_suite(suite_of: Make, d: int, rank: int, T: int, dtype: torch.dtype) -> Suite:
    """LoRA experts merged into weights of a dtype, as `merge_and_unload` leaves them."""
    base = (normal(d, d, seed=2) / d**0.5).to(dtype)
    experts = {}
    for t in range(T):
        thin = normal(d, rank, seed=20 + t) @ normal(rank, d, seed=40 + t) / d
        experts[f"t{t}"] = {NAME: (base.double() + thin).to(dtype)}
    return suite_of(experts, {NAME: base})


@pytest.mark.parametrize(
    ("d", "rank", "T"), [(768, 16, 8), (768, 16, 2), (640, 5, 3), (32, 2, 8), (32, 4, 2)]
)
def test_tsv_m_of_merged_adapters_keeps_their_ranks_only(
    suite_of: Make, d: int, rank: int, T: int
) -> None:
    suite = lora_suite(suite_of, d, rank, T, torch.float32)
    k = d // T
    assert k >= rank
    expected = tsv_m(updates_of(suite), k, lambda S: rank)
    got = merged_update(suite)
    assert np.linalg.norm(got - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("d", [48, 600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_halves_resolve_is_less(suite_of: Make, d: int, dtype: torch.dtype) -> None:
    """Rounding to 16 bits leaves 1e-3 of the weights: directions above it count, those do not."""
    T, rank = 2, 4
    suite = lora_suite(suite_of, d, rank, T, dtype)
    expected = tsv_m(updates_of(suite), d // T, lambda S: rank)
    got = merged_update(suite)
    # The result is written in 16 bits again: half an ε of the weights, of norm √d.
    rounding = torch.finfo(dtype).eps * d**0.5
    assert np.linalg.norm(got - expected) < 0.01 * np.linalg.norm(expected) + rounding


@pytest.mark.parametrize("d", [32, 512])
def test_tsv_m_of_merged_adapters_about_the_average(suite_of: Make, d: int) -> None:
    """All centred vectors lie in half of the space: the tasks' directions are twice as many."""
    rank, T = d // 8, 4
    suite = lora_suite(suite_of, d, rank, T, torch.float32)
    expected = tsv_m(updates_of(suite, "average"), d // T, lambda S: rank * T)
    got = merged_update(suite, "average")
    # The smallest kept values and gaps are some thousandths of the first.
    assert np.linalg.norm(got - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("shape", [(640, 576), (64, 48)])
def test_iso_c_of_steep_spectra(suite_of: Make, shape: tuple[int, int]) -> None:
    base = 0.02 * normal(*shape, seed=1)
    experts = {
        f"t{t}": {NAME: (base.float().double() + steep_matrix(*shape, 10 * t, 1e-4)).float()}
        for t in range(2)
    }
    suite = suite_of(experts, {NAME: base.float()})
    U, S, Vt = np.linalg.svd(np.sum(updates_of(suite), axis=0), full_matrices=False)
    recipe = make_recipe({"method": "iso_c"})
    merged = MergeSession(suite, None, FactorStore()).merge(recipe)[NAME].double().numpy()
    expected = S.mean() * U @ Vt
    got = merged - origin_of(suite, "base")
    assert np.linalg.norm(got - expected) < 1e-5 * np.linalg.norm(expected)
