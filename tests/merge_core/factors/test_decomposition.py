"""The two contracts of decompositions, against numpy in float64: truncations and directions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge_core.factors import store as store_module
from merge_core.factors.decomposition import (
    decompose,
    gram,
    leading_side,
    leading_triplets,
    truncation_errors,
)
from merge_core.factors.low_rank import decompose_product, sum_of_truncations
from merge_core.factors.store import TOLERANCE, FactorStore, TaskMatrix

R = 160


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectrum(kind: str, r: int = R) -> Tensor:
    i = torch.arange(1, r + 1, dtype=torch.float64)
    return {
        "decaying": i**-0.7,
        "flat": torch.linspace(1, 0.5, r, dtype=torch.float64),
        "steep": torch.exp(-i / 8) + 1e-5,
        "cliff": torch.where(i <= 5, 1.0 + 0.1 / i, 1e-3 / i),
        "equal": torch.ones(r, dtype=torch.float64),
        "low rank": torch.where(i <= 5, 1.0 / i, 0.0),
        "pairs": 1 / torch.div(i + 1, 2, rounding_mode="floor"),
    }[kind]


def matrix(kind: str, m: int, n: int, seed: int = 0) -> Tensor:
    """m x n in float32 with this spectrum, at the size of task vectors."""
    r = min(m, n)
    U = torch.linalg.qr(normal(m, r, seed=seed)).Q
    V = torch.linalg.qr(normal(n, r, seed=seed + 1)).Q
    return (1e-3 * (U * spectrum(kind, r)) @ V.T).float()


def truth(A: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.linalg.svd(A.double().numpy(), full_matrices=False)


def best(A: Tensor, k: int) -> np.ndarray:
    U, S, Vt = truth(A)
    return np.asarray((U[:, :k] * S[:k]) @ Vt[:k])


def of(A: Tensor, name: str = "expert", floor: float = 0.0) -> TaskMatrix:
    B = A.T if A.shape[0] <= A.shape[1] else A
    shape = A.shape[0], A.shape[1]
    return TaskMatrix(
        (name, "average", "w"), shape, A.dtype, lambda dtype, part: B[part].to(dtype), lambda: floor
    )


def largest_error(got: Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got.double().numpy() - expected) / np.linalg.norm(expected))


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices take the float32 route too, so that the tests are quick."""
    monkeypatch.setattr(store_module, "SMALL", 2)


SHAPES = [(R, R), (3 * R, R), (R, 2 * R)]


@pytest.mark.parametrize("kind", ["decaying", "flat", "steep", "cliff", "pairs", "low rank"])
@pytest.mark.parametrize("count", [R // 8, R // 4])
def test_the_error_of_a_truncation_is_within_its_bound(kind: str, count: int) -> None:
    for seed, shape in enumerate(SHAPES):
        A = matrix(kind, *shape, seed=seed)
        B = A.T if shape[0] <= shape[1] else A
        side = leading_side(B, count)
        assert side.vectors.shape == (count, R)
        _, S, _ = truth(A)
        clear = S[:count] > 3e-4 * S[0]  # whose squares float32 sees beside the first one's
        np.testing.assert_allclose(side.S.numpy()[clear], S[:count][clear], rtol=1e-4)
        for k in range(1, count + 1):
            if S[k - 1] - S[k] < 1e-7 * S[0]:
                continue  # the truth itself is one of many
            V = side.vectors[:k].double()
            error = largest_error(B.double() @ V.T @ V, best(B, k))
            assert error <= float(side.errors[k - 1]), (shape, k)


@pytest.mark.parametrize("kind", ["decaying", "flat", "steep"])
def test_the_bound_is_good_enough_where_it_is_needed(kind: str) -> None:
    """A bound of everything would be right and of no use: usual ranks stay in float32."""
    for shape in SHAPES:
        A = matrix(kind, *shape)
        side = leading_side(A.T if shape[0] <= shape[1] else A, R // 8)
        assert float(side.errors[int(0.08 * R) - 1]) < TOLERANCE


def test_directions_that_cannot_be_told_apart_are_not_called_exact() -> None:
    side = leading_side(matrix("equal", R, R), R // 8)
    assert float(side.errors[:-1].min()) > 0.1
    tied = leading_side(matrix("pairs", R, R), R // 8).errors
    assert float(tied[2]) > TOLERANCE > float(tied[1])


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(0, 99))
def test_bounds_cover_a_perturbation_of_their_size(q: int, seed: int) -> None:
    """A symmetric matrix whose directions mix by e_ij: the first order that the bound speaks of."""
    source = np.random.default_rng(seed)
    theta = np.sort(source.uniform(0.5, 2.0, 2 * q))[::-1]
    if np.diff(-theta).min() < 1e-3:
        return
    E = source.normal(size=(2 * q, 2 * q)) * 1e-9
    E = (E + E.T) / 2
    E[:q, :q] = 0  # settled among themselves
    _, columns = np.linalg.eigh(np.diag(theta) + E)
    V = columns[:, ::-1][:, :q]
    residual = np.linalg.norm(np.diag(theta) @ V - V * theta[:q], axis=0)
    errors = truncation_errors(
        torch.tensor(theta[:q].copy()), torch.tensor(residual), 0.0, 0.0
    ).numpy()
    B = np.diag(np.sqrt(theta))
    for k in range(1, q):
        exact = np.diag(np.where(np.arange(2 * q) < k, np.sqrt(theta), 0))
        error = np.linalg.norm(B @ V[:, :k] @ V[:, :k].T - exact) / np.linalg.norm(exact)
        assert error <= errors[k - 1]


@pytest.mark.parametrize("share", [0.02, 0.08, 0.12, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["decaying", "flat", "steep", "low rank"])
def test_a_merged_update_is_that_of_float64(tmp_path: Path, kind: str, share: float) -> None:
    k, store = max(1, int(share * R)), FactorStore(tmp_path)
    matrices = [matrix(kind, 2 * R, R, seed=10 * t) for t in range(3)]
    held = [store.truncations(of(A, f"expert {t}"), k) for t, A in enumerate(matrices)]
    got = sum_of_truncations(held, k, lambda: torch.stack(matrices).sum(0))
    assert largest_error(got, np.sum([best(A, k) for A in matrices], axis=0)) < TOLERANCE


def test_what_float32_cannot_cut_is_decomposed_in_float64_and_kept_so(tmp_path: Path) -> None:
    A, store = of(matrix("pairs", R, R)), FactorStore(tmp_path)
    assert not store.truncations(A, 2).whole
    assert store.decompositions == 1
    k = 3  # between two equal values
    assert store.truncations(A, k).whole
    assert store.decompositions == 2
    for again in (store, FactorStore(tmp_path)):
        before = again.decompositions
        assert again.truncations(A, 2).whole
        assert again.decompositions == before


@pytest.mark.parametrize("shape", SHAPES)
def test_other_ranks_do_not_decompose_again(tmp_path: Path, shape: tuple[int, int]) -> None:
    A, store = matrix("decaying", *shape), FactorStore(tmp_path)
    made = []
    for k in (5, 12, 3, 30, 5, 70, 120, R, 5):
        for where in (store, FactorStore(tmp_path)):
            got = where.truncations(of(A), k)
            assert got.error(k) <= TOLERANCE
            assert largest_error(got.truncate(k), best(A, k)) <= TOLERANCE
        made.append(store.decompositions)
    # An eighth of the directions, a quarter, and then all of them.
    assert made == [1, 1, 1, 2, 2, 3, 3, 3, 3]
    assert not list(tmp_path.rglob("*.tmp"))


def test_spectra_and_directions_come_from_what_is_stored_whole(tmp_path: Path) -> None:
    A, store = matrix("steep", 2 * R, R), FactorStore(tmp_path)
    _, S, _ = truth(A)
    np.testing.assert_allclose(store.singular_values(of(A)).numpy(), S, rtol=1e-6)
    assert store.decompositions == 1
    store.directions(of(A))
    made = store.decompositions
    fresh = FactorStore(tmp_path)
    np.testing.assert_allclose(fresh.singular_values(of(A)).numpy(), S, rtol=1e-6)
    assert fresh.truncations(of(A), 40).error(40) < TOLERANCE
    assert (fresh.decompositions, store.decompositions) == (0, made)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["decaying", "flat", "steep", "cliff"])
def test_directions_are_each_right_by_themselves(
    tmp_path: Path, kind: str, shape: tuple[int, int]
) -> None:
    A, store = matrix(kind, *shape), FactorStore(tmp_path)
    U, S, Vt = truth(A)
    for k in (None, 40):
        found = store.directions(of(A), k)
        q = min(k or R, R)
        assert found.rank == q
        np.testing.assert_allclose(found.S.numpy(), S[:q], rtol=1e-6)
        for side, exact in ((found.U, U[:, :q]), (found.V, Vt[:q].T)):
            dots = np.abs(np.sum(side.double().numpy() * exact, axis=0))
            np.testing.assert_allclose(dots, 1, atol=1e-6)
            identity = side.double().T @ side.double()
            np.testing.assert_allclose(identity.numpy(), np.eye(q), atol=2e-6)


def test_directions_below_the_gram_matrix_are_found_by_lapack(tmp_path: Path) -> None:
    """σ from 1 to 1e-9 in float64: each direction to what float32 stores of it."""
    values = torch.logspace(0, -9, 10, dtype=torch.float64)
    U, V = (torch.linalg.qr(normal(n, 10, seed=n)).Q for n in (60, 40))
    A = (U * values) @ V.T
    for shape in ((60, 40), (40, 60)):
        store = FactorStore(tmp_path / str(shape))
        found = store.directions(of(A if shape[0] > shape[1] else A.T), 10)
        left, right = (found.U, found.V) if shape[0] > shape[1] else (found.V, found.U)
        np.testing.assert_allclose(found.S.numpy(), values.numpy(), rtol=1e-6)
        for got, exact in ((left, U), (right, V)):
            dots = (got.double() * exact).sum(dim=0).abs()
            np.testing.assert_allclose(dots.numpy(), 1, atol=1e-6)


def test_directions_below_the_floor_are_dropped_at_every_number_asked_for(tmp_path: Path) -> None:
    A, store = matrix("steep", 2 * R, R), FactorStore(tmp_path)
    _, S, _ = truth(A)
    for live in (3, 20, 60):
        floor = float(S[live - 1] + S[live]) / 2
        for k in (None, R, live, live - 1):
            assert store.directions(of(A, floor=floor), k).rank == min(live, k or R)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 8), st.integers(0, 99))
def test_gram_matrices_are_products(m: int, n: int, block: int, seed: int) -> None:
    B = normal(m, n, seed=seed)
    np.testing.assert_allclose(gram(B, block).numpy(), B.numpy().T @ B.numpy(), atol=1e-12)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 14), st.integers(0, 99))
def test_directions_of_a_product_are_those_of_the_matrix(m: int, n: int, q: int, seed: int) -> None:
    left, right = normal(m, q, seed=seed), normal(q, n, seed=seed + 1)
    A = (left @ right).numpy()
    found, exact = decompose_product(left, right), np.linalg.svd(A, compute_uv=False)
    assert found.rank == min(m, n, q)
    np.testing.assert_allclose(found.pad(min(m, n)).S.numpy(), exact, atol=1e-12 * max(1, q))
    for k in range(min(m, n) + 1):
        U, S, Vt = np.linalg.svd(A, full_matrices=False)
        head = found.head(k)
        rebuilt = (head.U * head.S) @ head.V.T
        np.testing.assert_allclose(rebuilt.numpy(), (U[:, :k] * S[:k]) @ Vt[:k], atol=1e-9)


def test_the_folder_is_kept_within_its_limit_and_the_oldest_goes_first(tmp_path: Path) -> None:
    def ask(store: FactorStore, t: int) -> None:
        store.directions(of(matrix("decaying", R, R, t), f"expert {t}"))

    ask(FactorStore(tmp_path), 0)
    one = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    store = FactorStore(tmp_path, disk_bytes=5 * one)
    for t in range(9):
        ask(store, t)
    held = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert one < held <= 5 * one
    fresh = FactorStore(tmp_path)
    ask(fresh, 7)
    assert fresh.decompositions == 0
    ask(fresh, 0)
    assert fresh.decompositions == 1


@pytest.mark.parametrize("shape", [(90, 40), (40, 90), (50, 50), (6, 4)])
@pytest.mark.parametrize("kind", ["falling", "low rank", "zero"])
def test_leading_triplets_are_numpys(shape: tuple[int, int], kind: str) -> None:
    count, r = 3, min(shape)
    source = np.random.default_rng(4)
    values = {
        "falling": 0.8 ** np.arange(r),
        "low rank": (np.arange(r) < 2).astype(float),  # fewer than are asked for
        "zero": np.zeros(r),
    }[kind]
    U, V = (np.linalg.qr(source.standard_normal((side, r)))[0] for side in shape)
    A = (U * values) @ V.T
    found = leading_triplets(torch.from_numpy(A), count)
    left, S, right = (part.numpy() for part in found)
    np.testing.assert_allclose(S, np.linalg.svd(A, compute_uv=False)[:count], atol=1e-14)
    for side in (left, right):
        np.testing.assert_allclose(side.T @ side, np.eye(count), atol=1e-13)
    # Values that differ by a fifth: vectors are off by a few roundings over that distance.
    np.testing.assert_allclose(
        (left * S) @ right.T,
        (U * values)[:, :count] @ V[:, :count].T,
        atol=1e-13 if kind != "low rank" else 1e-12,
    )


def test_a_long_side_is_made_orthonormal_where_it_is_not() -> None:
    source = torch.Generator().manual_seed(3)
    U, V = (
        torch.linalg.qr(torch.randn(side, 30, generator=source).double()).Q for side in (300, 30)
    )
    S = torch.logspace(0, -3.5, 30).double()  # of the Gram matrix, seven digits
    A = (U * S) @ V.T
    strict, loose = decompose(A), decompose(A, defect=1e-3)
    eye = torch.eye(30).double()
    defects = [float((f.U.T @ f.U - eye).norm()) for f in (strict, loose)]
    assert defects[0] < 1e-13 < defects[1] < 1e-3
