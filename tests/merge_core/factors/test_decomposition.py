"""Decompositions in float32: against float64's, and as good as they say that they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge_core.factors import decomposition
from merge_core.factors.decomposition import Cut, Side, cut, extended, gram, short_side
from merge_core.factors.low_rank import SideFactors, factors_of_product, sum_of_truncations
from merge_core.factors.store import TOLERANCE, FactorStore
from merge_core.factors.tridiagonal import Reduction

R = 160


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectrum(kind: str, r: int = R) -> Tensor:
    i = torch.arange(1, r + 1, dtype=torch.float64)
    return {
        "decaying": i**-0.7,
        "flat": torch.linspace(1, 0.5, r, dtype=torch.float64),
        "steep": torch.exp(-i / 8) + 1e-5,
        "equal": torch.ones(r, dtype=torch.float64),
        "low rank": torch.where(i <= 5, 1.0, 0.0),
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


def factors(A: Tensor, side: Side | None = None) -> SideFactors:
    side = side or short_side(A)
    return SideFactors(side.vectors, side.S, tuple(A.shape), partial(tall(A), torch.float32))


def tall(A: Tensor) -> Callable[[torch.dtype, slice], Tensor]:
    """Rows of A, or of its transpose where that is not the shorter."""
    B = A.T if A.shape[0] <= A.shape[1] else A
    return lambda dtype, part: B[part].to(dtype)


def ready(A: Tensor, k: int, tolerance: float, wanted: int | None = None) -> Cut:
    side = short_side(A, wanted=wanted)
    return cut(side, partial(tall(A), torch.float32), max(A.shape), k, tolerance)


@pytest.fixture(autouse=True)
def small_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices take the float32 route too, so that the tests are quick."""
    monkeypatch.setattr(decomposition, "FAST_FROM", 2)


SHAPES = [(R, R), (3 * R, R), (R, 2 * R)]
KINDS = ["decaying", "flat", "steep", "equal", "low rank", "pairs"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [None, 0, 7, R // 4])
def test_values_and_vectors_of_the_fast_route(
    kind: str, shape: tuple[int, int], wanted: int | None
) -> None:
    A = matrix(kind, *shape)
    U, S, Vt = truth(A)
    side = short_side(A, wanted=wanted)
    assert side.noise > 0  # it is the fast route
    # Of steep spectra and of low rank, many values are small: rough where vectors are wanted.
    steep = kind in ("steep", "low rank")
    reduced = wanted is not None and (wanted > 0 or not steep)
    assert (side.reduction is not None) == reduced
    assert side.rough == (reduced and steep)
    if side.rough:
        clear = S > 0.005 * S[0]
        np.testing.assert_allclose(side.S.numpy()[clear], S[clear], rtol=5e-3)
        assert side.S.numpy()[~clear].max(initial=0) < 0.006 * S[0]
        return
    if reduced and kind != "equal":
        made = side.vectors
        assert wanted <= len(made) < R
        whole = extended(side, R)
        assert torch.equal(whole.vectors[: len(made)], made)
        assert torch.equal(whole.vectors, extended(short_side(A, wanted=0), R).vectors)
        assert whole.reduction is None
        side = whole
    if len(side.vectors) < R:
        np.testing.assert_allclose(side.S.numpy(), S, rtol=2e-4, atol=5e-6 * S[0])
        return
    assert torch.all(side.S[:-1] >= side.S[1:])
    np.testing.assert_allclose(side.S.numpy(), S, rtol=2e-4, atol=5e-6 * S[0])
    identity = side.vectors.double() @ side.vectors.double().T
    np.testing.assert_allclose(identity.numpy(), np.eye(R), atol=1e-5)
    short = U if shape[0] <= shape[1] else Vt.T
    if kind == "decaying":  # distinct values: the leading vectors are those of the truth
        dots = np.abs(np.sum(side.vectors[:5].double().numpy() * short.T[:5], axis=1))
        np.testing.assert_allclose(dots, 1, atol=1e-6)
    peaks = side.vectors.gather(1, side.vectors.abs().argmax(1, keepdim=True))
    assert bool((peaks > 0).all())


# How many directions are kept, and how many vectors are at hand (None: all of them).
HELD = [(k, None) for k in (1, 2, 3, 12, 40, 80, 150)]
HELD += [(k, k + more) for k in (1, 2, 3, 12, 33) for more in (0, R // 8)]


@pytest.mark.parametrize("kind", ["decaying", "flat", "steep", "pairs"])
@pytest.mark.parametrize(("k", "held"), HELD)
@pytest.mark.parametrize("tolerance", [1.0, 0.0], ids=["as it is", "turned back"])
def test_the_estimated_error_is_about_the_true_one(
    kind: str, k: int, held: int | None, tolerance: float
) -> None:
    for seed, shape in enumerate(SHAPES):
        A = matrix(kind, *shape, seed=seed)
        U, S, Vt = truth(A)
        if k < len(S) and S[k - 1] - S[k] < 1e-9 * S[0]:
            continue  # the truth itself is one of many
        exact = (U[:, :k] * S[:k]) @ Vt[:k]
        found = ready(A, k, tolerance, held)
        estimate = found.error
        got = factors(A, found.side).truncated(k).double().numpy()
        if found.long is not None:  # it is the product that it says it is
            long = (A.T if shape[0] <= shape[1] else A) @ found.side.vectors[:k].T
            torch.testing.assert_close(found.long, long, rtol=1e-5, atol=1e-8)
        error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
        # Three of its own, and what float32 products round anyway.
        rounding = 2e-6 if held is None else 3e-6
        assert error <= 3 * estimate + rounding, (shape, estimate)
        if S[k - 1] > 0.01 * S[0]:  # below, the noise of the large values is too cautious
            assert estimate <= 30 * error + 2e-6, (shape, error)


def test_directions_that_cannot_be_told_apart_are_not_called_exact() -> None:
    A = matrix("equal", R, R)
    assert ready(A, 10, 1e-4).error > 0.1
    assert ready(A, R, 1e-4).error == 0


@pytest.mark.parametrize("share", [0.02, 0.08, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["decaying", "flat", "steep", "low rank"])
def test_a_merged_update_is_that_of_float64(tmp_path: Path, kind: str, share: float) -> None:
    k, store = max(1, int(share * R)), FactorStore(tmp_path)
    matrices = [matrix(kind, 2 * R, R, seed=10 * t) for t in range(3)]
    expected = np.zeros((2 * R, R))
    for A in matrices:
        U, S, Vt = truth(A)
        expected += (U[:, :k] * S[:k]) @ Vt[:k]
    held = [
        store.get(f"expert {t}", "average", "w", tall(A), (2 * R, R), k)
        for t, A in enumerate(matrices)
    ]
    got = sum_of_truncations(held, k, lambda: torch.stack(matrices).sum(0)).double().numpy()
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 1e-4


def test_what_float32_cannot_cut_is_decomposed_in_float64_and_kept_so(tmp_path: Path) -> None:
    A, store = matrix("pairs", R, R), FactorStore(tmp_path)
    assert store.get("e", "o", "w", tall(A), (R, R)).sure_at == 0
    assert store.get("e", "o", "w", tall(A), (R, R), 2).sure_at == 2
    assert store.decompositions == 1
    k = 3  # between two equal values
    assert ready(A, k, TOLERANCE).error > TOLERANCE
    assert store.get("e", "o", "w", tall(A), (R, R), k).sure_at is None
    assert store.decompositions == 2
    for again in (store, FactorStore(tmp_path)):
        before = again.decompositions
        assert again.get("e", "o", "w", tall(A), (R, R), 2).sure_at is None
        assert again.decompositions == before


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_and_pages_never_decompose_again(tmp_path: Path, shape: tuple[int, int]) -> None:
    A, store = matrix("flat", *shape), FactorStore(tmp_path)
    U, S, Vt = truth(A)

    def get(k: int | None, where: FactorStore = store) -> SideFactors:
        return where.get("e", "o", "w", tall(A), shape, k)

    def size() -> int:
        return sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())

    np.testing.assert_allclose(get(None).S.numpy(), S, rtol=1e-4)
    sizes = [size()]
    for k in (5, 30, 70, 120, R, 5):
        best = (U[:, :k] * S[:k]) @ Vt[:k]
        for where in (store, FactorStore(tmp_path)):
            before = where.decompositions
            got = get(k, where).truncated(k).double().numpy()
            assert np.linalg.norm(got - best) <= 1e-4 * np.linalg.norm(best)
            assert where.decompositions == before
        sizes.append(size())
    assert store.decompositions == 1
    # Vectors are kept when they were made, in eights; the reduction goes when all are there.
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3]
    whole = 4 * R * (R + 1)
    assert whole <= sizes[-1] < whole + 1000
    assert get(None).head().U.shape == (shape[0], R)


@pytest.mark.parametrize("kind", ["steep", "low rank"])
def test_small_values_are_rough_only_until_they_are_looked_at(tmp_path: Path, kind: str) -> None:
    A, store = matrix(kind, 2 * R, R), FactorStore(tmp_path)
    U, S, Vt = truth(A)
    k = 5  # as many as have a weight, of low rank
    first = store.get("e", "o", "w", tall(A), (2 * R, R), k)
    assert first.rough
    # What is looked at beyond the cut brings vectors of its own, and spoils nothing.
    best = (U[:, :k] * S[:k]) @ Vt[:k]
    for looked_at in (k, 30, R):
        assert first.right(looked_at).shape == (R, looked_at)
        got = first.truncated(k).double().numpy()
        assert np.linalg.norm(got - best) <= 1e-4 * np.linalg.norm(best)
    assert store.decompositions == 2
    for k in (None, 5, R // 2):
        for where in (store, FactorStore(tmp_path)):
            again = where.get("e", "o", "w", tall(A), (2 * R, R), k)
            assert not again.rough
            np.testing.assert_allclose(again.S.numpy(), S, rtol=2e-4, atol=5e-6 * S[0])


def test_vectors_are_made_when_they_are_looked_at(tmp_path: Path) -> None:
    A, store = matrix("flat", R, 2 * R), FactorStore(tmp_path)
    U, _, _ = truth(A)
    held = store.get("e", "o", "w", tall(A), (R, 2 * R))
    for k in (3, 50, R):
        head = held.head(k)
        dots = np.abs(np.sum(head.U.double().numpy() * U[:, :k], axis=0))
        # Neighbours 0.3 % apart mix a little in float32; see sure_at.
        assert dots.min() > 0.999
        np.testing.assert_allclose((head.V.T @ head.V).numpy(), np.eye(k), atol=1e-5)
    assert store.decompositions == 1


@pytest.mark.parametrize("fault", ["no eigenvalues", "no vectors", "wrong vectors"])
def test_what_a_reduction_cannot_give_is_decomposed_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    A, store = matrix("flat", R, R), FactorStore(tmp_path)

    def fails(*_: object) -> None:
        raise ArithmeticError

    if fault == "no eigenvalues":
        monkeypatch.setattr(decomposition, "reduced", fails)
    elif fault == "no vectors":
        monkeypatch.setattr(Reduction, "eigenvectors", fails)
    else:
        made = Reduction.eigenvectors
        monkeypatch.setattr(Reduction, "eigenvectors", lambda *given: 1.1 * made(*given))
    U, S, Vt = truth(A)
    got = store.get("e", "o", "w", tall(A), (R, R), 20).truncated(20).double().numpy()
    best = (U[:, :20] * S[:20]) @ Vt[:20]
    assert np.linalg.norm(got - best) <= 1e-4 * np.linalg.norm(best)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 8), st.integers(0, 99))
def test_gram_matrices_are_products(m: int, n: int, block: int, seed: int) -> None:
    B = normal(m, n, seed=seed)
    np.testing.assert_allclose(gram(B, block).numpy(), B.numpy().T @ B.numpy(), atol=1e-12)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 14), st.integers(0, 99))
def test_factors_of_a_product_are_those_of_the_matrix(m: int, n: int, q: int, seed: int) -> None:
    left, right = normal(m, q, seed=seed), normal(q, n, seed=seed + 1)
    A = (left @ right).numpy()
    product = factors_of_product(left, right)
    np.testing.assert_allclose(
        product.S.numpy(), np.linalg.svd(A, compute_uv=False), atol=1e-5 * max(1, q)
    )
    for k in range(min(m, n) + 1):
        U, S, Vt = np.linalg.svd(A, full_matrices=False)
        best = (U[:, :k] * S[:k]) @ Vt[:k]
        np.testing.assert_allclose(product.truncated(k).numpy(), best, atol=1e-3)
        head = product.head(k)
        assert head.U.shape == (m, k)
        assert head.V.shape == (n, k)
        rebuilt = (head.U * head.S) @ head.V.T
        np.testing.assert_allclose(rebuilt.numpy(), best, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_long_side_is_orthonormal_and_zero_where_there_is_nothing(
    shape: tuple[int, int],
) -> None:
    held = factors(matrix("low rank", *shape))
    head = held.head()
    for side in (head.U, head.V):
        identity = (side[:, :5].T @ side[:, :5]).numpy()
        np.testing.assert_allclose(identity, np.eye(5), atol=1e-5)
    assert int((held.S > 0).sum()) == 5
    long = head.U if shape[0] > shape[1] else head.V
    assert not long[:, 5:].any()


def test_the_folder_is_kept_within_its_limit_and_the_oldest_goes_first(tmp_path: Path) -> None:
    store = FactorStore(tmp_path)
    store.get("expert 0", "average", "w", tall(matrix("decaying", R, R)), (R, R))
    one = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    store = FactorStore(tmp_path, disk_bytes=5 * one)
    for t in range(9):
        store.get(f"expert {t}", "average", "w", tall(matrix("decaying", R, R, t)), (R, R))
    held = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert one < held <= 5 * one
    fresh = FactorStore(tmp_path)
    fresh.get("expert 7", "average", "w", tall(matrix("decaying", R, R, 7)), (R, R))
    assert fresh.decompositions == 0
    fresh.get("expert 0", "average", "w", tall(matrix("decaying", R, R, 0)), (R, R))
    assert fresh.decompositions == 1
