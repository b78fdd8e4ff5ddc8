"""Decompositions against numpy in float64, and the identities they must satisfy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from merge_core.factors.decomposition import Route, decompose, singular_values, whole_side
from merge_core.factors.low_rank import (
    Truncations,
    as_matrix,
    count_directions,
    orthogonalize,
    resolution,
    sum_of_truncations,
)

ROUTES: tuple[Route, ...] = ("gram", "svd")
FLOAT64 = 2.0**-53


def random(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_spectrum(m: int, n: int, values: list[float], seed: int = 0) -> Tensor:
    """A matrix with these singular values, made of Householder-free QR bases."""
    k = len(values)
    U, V = torch.linalg.qr(random(m, k, seed))[0], torch.linalg.qr(random(n, k, seed + 1))[0]
    return U @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ V.T


CASES: dict[str, Tensor] = {
    "tall": random(9, 4),
    "wide": random(4, 9),
    "square": random(6, 6),
    "one row": random(1, 7),
    "one column": random(7, 1),
    "one entry": torch.tensor([[-3.0]], dtype=torch.float64),
    "rank two of five": with_spectrum(8, 5, [3.0, 2.0]),
    "wide of rank one": with_spectrum(3, 8, [2.0]),
    "zero": torch.zeros(4, 6, dtype=torch.float64),
    "repeated values": with_spectrum(7, 4, [2.0, 2.0, 2.0, 1.0]),
    "identity": torch.eye(5, dtype=torch.float64),
    "tiny": 1e-30 * random(5, 7),
    "huge": 1e30 * random(7, 5),
    "squares beneath float64": 1e-200 * random(5, 7),
    "squares beyond float64": 1e200 * random(7, 5),
    "entries from 1e-30 to 1e30": torch.diag(torch.tensor([1e30, 1.0, 1e-30]).double()),
    "steep": with_spectrum(8, 6, [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5]),
    "one zero column": random(5, 4) * torch.tensor([1.0, 0.0, 1.0, 1.0]),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def matrix(request: pytest.FixtureRequest) -> Tensor:
    return CASES[request.param]


def test_directions_agree_with_numpy(matrix: Tensor) -> None:
    """As many as numpy finds beyond rounding, each value to float64's precision of the first."""
    expected = np.linalg.svd(matrix.numpy(), compute_uv=False)
    slack = FLOAT64 * max(matrix.shape) * expected[0]
    found = decompose(matrix)
    assert found.rank == int((expected > slack).sum()) or expected[found.rank - 1] < 10 * slack
    padded = found.pad(min(matrix.shape)).S.numpy()
    # Eigenvalues of the Gram matrix are asked for values beyond 1e-4 of the first only, where
    # n ε σ_1² of them is at most 1e4 n ε σ_1 of a value.
    np.testing.assert_allclose(padded, expected, rtol=0, atol=1e4 * slack)


def test_singular_values_alone_agree_with_numpy(matrix: Tensor) -> None:
    expected = np.linalg.svd(matrix.numpy(), compute_uv=False)
    got = singular_values(matrix).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-8 * expected[0])


def test_directions_have_the_declared_shapes_order_and_dtype(matrix: Tensor) -> None:
    found = decompose(matrix.float() if matrix.abs().max() < 1e30 else matrix)
    (m, n), q = matrix.shape, found.rank
    assert q <= min(m, n)
    assert (found.U.shape, found.S.shape, found.V.shape) == ((m, q), (q,), (n, q))
    assert {found.U.dtype, found.S.dtype, found.V.dtype} == {torch.float64}
    assert (found.S > 0).all()
    assert (found.S[:-1] >= found.S[1:]).all()


def test_both_sides_are_orthonormal(matrix: Tensor) -> None:
    found = decompose(matrix)
    eye = torch.eye(found.rank, dtype=torch.float64)
    for side in (found.U, found.V):
        torch.testing.assert_close(side.T @ side, eye, rtol=0, atol=1e-12)


def test_all_directions_give_the_matrix_back(matrix: Tensor) -> None:
    found = decompose(matrix)
    error = ((found.U * found.S) @ found.V.T - matrix).abs().max()
    assert error <= 1e-13 * float(matrix.abs().max())


def test_the_largest_entry_of_each_vector_on_the_short_side_is_positive(matrix: Tensor) -> None:
    found = decompose(matrix)
    for column in (found.U if matrix.shape[0] <= matrix.shape[1] else found.V).numpy().T:
        assert column[np.argmax(np.abs(column))] > 0


@pytest.mark.parametrize("least", [1e-3, 2e-5, 1e-7, 1e-10])
@pytest.mark.parametrize("shape", [(12, 6), (6, 12), (6, 6)])
def test_small_directions_are_right_by_themselves(least: float, shape: tuple[int, int]) -> None:
    values = np.geomspace(1.0, least, 6)
    A = with_spectrum(*shape, list(values))
    U, _, Vt = np.linalg.svd(A.numpy())
    found = decompose(A)
    for i in range(6):
        # A triplet is perturbed by ε σ_1 over the distance to its neighbour, about its own value.
        slack = 100 * FLOAT64 / values[i]
        assert abs(abs(found.U[:, i].numpy() @ U[:, i]) - 1) < slack
        assert abs(abs(found.V[:, i].numpy() @ Vt[i]) - 1) < slack
        assert found.U[:, i] @ A @ found.V[:, i] == pytest.approx(values[i], rel=1e2 * slack)


def test_what_lies_below_the_floor_is_dropped() -> None:
    A = with_spectrum(9, 6, [1.0, 0.5, 0.1, 3e-6, 2e-6])
    assert decompose(A).rank == 5
    for floor, kept in ((1e-6, 5), (2.5e-6, 4), (4e-6, 3), (0.2, 2), (2.0, 0)):
        assert decompose(A, floor).rank == kept
    head = decompose(A, 4e-6)
    torch.testing.assert_close((head.U * head.S) @ head.V.T, A, rtol=0, atol=4e-6)


def test_padding_adds_zeros_and_heads_take_away() -> None:
    found = decompose(with_spectrum(4, 3, [2.0, 1.0]))
    padded = found.pad(3)
    assert (padded.U.shape, padded.S.shape, padded.V.shape) == ((4, 3), (3,), (3, 3))
    assert not padded.U[:, 2].any()
    assert not padded.V[:, 2].any()
    assert padded.S[2] == 0
    assert torch.equal(padded.head(2).U, found.U)
    assert found.pad(1).rank == found.head(1).rank == 1


def test_a_known_matrix_gives_its_known_directions() -> None:
    # [[3, 0], [0, -4]]: σ = (4, 3), u = e2, e1 with positive peaks, v = -e2, e1.
    found = decompose(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
    torch.testing.assert_close(found.S, torch.tensor([4.0, 3.0]).double())
    torch.testing.assert_close(found.U, torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double())
    torch.testing.assert_close(found.V, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double())


def truncations(A: Tensor, route: Route = "gram") -> Truncations:
    """Of all directions of a float64 matrix, with float32's factors."""
    B = A.T if A.shape[0] <= A.shape[1] else A
    side = whole_side(B, route)
    return Truncations(side.vectors, side.errors, A.shape, lambda part: B[part].float(), True)


@given(
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(0, 10),
    st.integers(0, 99),
    st.sampled_from(ROUTES),
)
def test_truncations_obey_eckart_young(m: int, n: int, k: int, seed: int, route: Route) -> None:
    A = random(m, n, seed)
    kept = truncations(A, route).truncate(k).double()
    values = np.linalg.svd(A.numpy(), compute_uv=False)
    # Factors in float32: a few n unit roundoffs of the norm.
    slack = 1e-5 * values[0]
    error = A - kept
    np.testing.assert_allclose(error.norm(), np.sqrt((values[k:] ** 2).sum()), atol=slack)
    spectral = np.linalg.norm(error.numpy(), 2)
    np.testing.assert_allclose(spectral, values[k] if k < len(values) else 0, atol=slack)
    assert np.linalg.matrix_rank(kept.numpy(), tol=slack) <= k


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 9), st.integers(0, 99))
def test_head_and_tail_add_up_to_the_matrix(m: int, n: int, k: int, seed: int) -> None:
    A = random(m, n, seed)
    terms = truncations(A)
    parts = [left @ right.T for left, right in (terms.head(k), terms.tail(k))]
    np.testing.assert_allclose(sum(parts).numpy(), A.numpy(), atol=1e-4)


@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
def test_sums_of_truncations_equal_the_sum_one_by_one_at_every_rank(
    T: int, m: int, n: int, seed: int
) -> None:
    matrices = [random(m, n, 7 * seed + t) for t in range(T)]
    total = torch.stack(matrices).sum(0).float()
    terms = [truncations(A) for A in matrices]
    for k in range(min(m, n) + 2):  # both sides of r/2, r and beyond
        expected = np.zeros((m, n))
        for A in matrices:
            U, S, Vt = np.linalg.svd(A.numpy(), full_matrices=False)
            expected += (U[:, :k] * S[:k]) @ Vt[:k]
        got = sum_of_truncations(terms, k, lambda: total)
        # Float32 products of entries of about 3, a few dozen of them.
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-4, err_msg=f"k={k}")


def test_a_full_sum_is_a_copy_that_may_be_changed() -> None:
    total = torch.ones(2, 2)
    sum_of_truncations([truncations(total.double())], 2, lambda: total).zero_()
    assert total.sum() == 4


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
def test_orthogonalize_is_the_polar_factor(m: int, n: int, seed: int) -> None:
    X = random(m, n, seed)
    Q = orthogonalize(X)
    gram = Q.T @ Q if m >= n else Q @ Q.T
    torch.testing.assert_close(gram, torch.eye(min(m, n)).double(), rtol=0, atol=1e-9)
    H = Q.T @ X if m >= n else X @ Q.T  # symmetric and positive: what makes Q the nearest one
    torch.testing.assert_close(H, H.T, rtol=0, atol=1e-9)
    assert torch.linalg.eigvalsh(H).min() > -1e-9


def test_orthogonalize_leaves_missing_directions_out() -> None:
    X = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]).double()
    torch.testing.assert_close(orthogonalize(X), X / 2)
    assert orthogonalize(torch.zeros(3, 2)).abs().max() == 0


@pytest.mark.parametrize(
    ("rank", "r", "k"),
    [
        (0.29, 100, 29), (0.57, 100, 57), (0.07, 100, 7), (1.1e-9, 768, 1), (0.08, 768, 61),
        (0.5, 7, 3), (0.999, 10, 9), (1.0, 10, 10), (1, 10, 1), (3, 10, 3), (10, 10, 10),
        (11, 10, 10), (10**9, 10, 10), (0.1, 1, 1), (0.9, 1, 1),
    ],
)  # fmt: skip
def test_a_declared_rank_means_this_many_directions(rank: float, r: int, k: int) -> None:
    got = count_directions(rank, r)
    assert got == k
    assert isinstance(got, int)


@given(st.integers(1, 2000), st.data())
def test_a_share_written_as_a_decimal_fraction_of_r_is_never_one_short(
    r: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, r))
    assert count_directions(k / r, r) == k


def test_kernels_become_matrices_with_one_row_per_output_channel() -> None:
    kernel = torch.arange(24.0).reshape(2, 3, 2, 2)
    matrix = as_matrix(kernel)
    assert matrix.shape == (2, 12)
    assert torch.equal(matrix[1], kernel[1].flatten())
    with pytest.raises(ValueError, match="not a matrix"):
        as_matrix(torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 40), (30, 200), (200, 30)])
def test_rounding_stays_below_the_resolution(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for seed in range(5):
        weights = random(*shape, seed)
        weights[:, 0] *= 30  # a heavy column, as trained weights have
        noise = weights.to(dtype).double() - weights
        floor = resolution(weights, dtype)
        # Independent errors of at most ε|θ|/2, uniform: 0.29 ε|θ| of them on average at most.
        assert 0.05 * floor < torch.linalg.matrix_norm(noise, 2) < floor


def test_orthogonalize_leaves_out_what_is_known_to_be_noise() -> None:
    X = torch.eye(4, 3).double()
    X[:, 2] = X[:, 1] + 1e-8 * torch.arange(4)
    assert torch.linalg.matrix_rank(orthogonalize(X)) == 3
    kept = orthogonalize(X, 1e-6)
    assert torch.linalg.matrix_rank(kept) == 2
    torch.testing.assert_close(kept[:, 1], kept[:, 2], rtol=0, atol=1e-7)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 50), st.integers(-20, 20))
def test_scaling_a_matrix_scales_only_its_values(m: int, n: int, seed: int, power: int) -> None:
    A = random(m, n, seed)
    plain, scaled = decompose(A), decompose(A * 2.0**power)
    torch.testing.assert_close(scaled.S, plain.S * 2.0**power, rtol=1e-9, atol=0)
    torch.testing.assert_close(scaled.U, plain.U, rtol=0, atol=1e-9)
