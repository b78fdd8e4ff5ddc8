"""Decompositions against numpy in float64, and the identities they must satisfy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from merge_core.decomposition import decompose, singular_values
from merge_core.dtypes import DTYPES
from merge_core.linalg import Factors, as_matrix, directions, orthogonalised, sum_of_truncations
from merge_core.shards import TensorInfo

ROUTES = ("gram", "svd")


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


@pytest.mark.parametrize("route", ROUTES)
def test_singular_values_agree_with_numpy(matrix: Tensor, route: str) -> None:
    expected = np.linalg.svd(matrix.numpy(), compute_uv=False)
    # The Gram route resolves down to 3e-8 of the first value.
    slack = (5e-8 if route == "gram" else 1e-13) * expected[0]
    np.testing.assert_allclose(decompose(matrix, route).S.numpy(), expected, rtol=0, atol=slack)


def test_singular_values_alone_agree_with_numpy(matrix: Tensor) -> None:
    expected = np.linalg.svd(matrix.numpy(), compute_uv=False)
    got = singular_values(matrix).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-8 * expected[0])


@pytest.mark.parametrize("route", ROUTES)
def test_factors_have_the_declared_shapes_order_and_dtype(matrix: Tensor, route: str) -> None:
    factors = decompose(matrix.float() if matrix.abs().max() < 1e30 else matrix, route)
    m, n = matrix.shape
    r = min(m, n)
    assert factors.rank == r
    assert (factors.U.shape, factors.S.shape, factors.V.shape) == ((m, r), (r,), (n, r))
    assert {factors.U.dtype, factors.S.dtype, factors.V.dtype} == {torch.float64}
    assert (factors.S >= 0).all()
    assert (factors.S[:-1] >= factors.S[1:]).all()


@pytest.mark.parametrize("route", ROUTES)
def test_both_sides_are_orthonormal_even_where_the_matrix_has_no_direction(
    matrix: Tensor, route: str
) -> None:
    factors = decompose(matrix, route)
    eye = torch.eye(factors.rank, dtype=torch.float64)
    for side in (factors.U, factors.V):
        torch.testing.assert_close(side.T @ side, eye, rtol=0, atol=1e-12)


@pytest.mark.parametrize("route", ROUTES)
def test_all_directions_give_the_matrix_back(matrix: Tensor, route: str) -> None:
    factors = decompose(matrix, route)
    scale = float(matrix.abs().max())
    for k in (factors.rank, factors.rank + 3):
        error = (factors.truncated(k) - matrix).abs().max()
        assert error <= (1e-7 if route == "gram" else 1e-13) * scale


@pytest.mark.parametrize("route", ROUTES)
def test_the_largest_entry_of_each_left_vector_is_positive(matrix: Tensor, route: str) -> None:
    U = decompose(matrix, route).U.numpy()
    for column in U.T:
        assert column[np.argmax(np.abs(column))] > 0


def test_both_routes_give_the_same_vectors_where_the_values_are_distinct() -> None:
    for A in (with_spectrum(9, 5, [5.0, 4.0, 3.0, 2.0, 1.0]), random(4, 9, 3)):
        gram, svd = decompose(A, "gram"), decompose(A, "svd")
        torch.testing.assert_close(gram.U, svd.U, rtol=0, atol=1e-10)
        torch.testing.assert_close(gram.V, svd.V, rtol=0, atol=1e-10)


def test_a_known_matrix_gives_its_known_factors() -> None:
    # [[3, 0], [0, -4]]: σ = (4, 3), u = e2, e1 with positive peaks, v = -e2, e1.
    A = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    for route in ROUTES:
        factors = decompose(A, route)
        torch.testing.assert_close(factors.S, torch.tensor([4.0, 3.0]).double())
        torch.testing.assert_close(factors.U, torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double())
        torch.testing.assert_close(factors.V, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double())


@given(
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(0, 10),
    st.integers(0, 99),
    st.sampled_from(ROUTES),
)
def test_truncations_obey_eckart_young(m: int, n: int, k: int, seed: int, route: str) -> None:
    A = random(m, n, seed)
    factors = decompose(A, route)
    values = np.linalg.svd(A.numpy(), compute_uv=False)
    error = A - factors.truncated(k)
    np.testing.assert_allclose((error**2).sum(), (values[k:] ** 2).sum(), atol=1e-6)
    spectral = np.linalg.norm(error.numpy(), 2)
    np.testing.assert_allclose(spectral, values[k] if k < len(values) else 0, atol=1e-7)
    assert np.linalg.matrix_rank(factors.truncated(k).numpy(), tol=1e-8) <= k


@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
def test_sums_of_truncations_equal_the_sum_one_by_one_at_every_rank(
    T: int, m: int, n: int, seed: int
) -> None:
    matrices = [random(m, n, 7 * seed + t) for t in range(T)]
    total = torch.stack(matrices).sum(0)
    factors = [decompose(A, "svd") for A in matrices]
    for k in range(min(m, n) + 2):  # both sides of r/2, r and beyond
        expected = np.zeros((m, n))
        for A in matrices:
            U, S, Vt = np.linalg.svd(A.numpy(), full_matrices=False)
            expected += (U[:, :k] * S[:k]) @ Vt[:k]
        got = sum_of_truncations(factors, k, lambda: total)
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-10, err_msg=f"k={k}")


def test_a_full_sum_is_a_copy_that_may_be_changed() -> None:
    total = torch.ones(2, 2, dtype=torch.float64)
    sum_of_truncations([decompose(total)], 2, lambda: total).zero_()
    assert total.sum() == 4


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
def test_orthogonalised_is_the_polar_factor(m: int, n: int, seed: int) -> None:
    X = random(m, n, seed)
    Q = orthogonalised(X)
    gram = Q.T @ Q if m >= n else Q @ Q.T
    torch.testing.assert_close(gram, torch.eye(min(m, n)).double(), rtol=0, atol=1e-9)
    H = Q.T @ X if m >= n else X @ Q.T  # symmetric and positive: what makes Q the nearest one
    torch.testing.assert_close(H, H.T, rtol=0, atol=1e-9)
    assert torch.linalg.eigvalsh(H).min() > -1e-9


def test_orthogonalised_leaves_missing_directions_out() -> None:
    X = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]).double()
    torch.testing.assert_close(orthogonalised(X), X / 2)
    assert orthogonalised(torch.zeros(3, 2)).abs().max() == 0


@pytest.mark.parametrize(
    ("rank", "r", "k"),
    [
        (0.29, 100, 29), (0.57, 100, 57), (0.07, 100, 7), (1.1e-9, 768, 1), (0.08, 768, 61),
        (0.5, 7, 3), (0.999, 10, 9), (1.0, 10, 10), (1, 10, 1), (3, 10, 3), (10, 10, 10),
        (11, 10, 10), (10**9, 10, 10), (0.1, 1, 1), (0.9, 1, 1),
    ],
)  # fmt: skip
def test_a_declared_rank_means_this_many_directions(rank: float, r: int, k: int) -> None:
    got = directions(rank, r)
    assert got == k
    assert isinstance(got, int)


@given(st.integers(1, 2000), st.data())
def test_a_share_written_as_a_decimal_fraction_of_r_is_never_one_short(
    r: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, r))
    assert directions(k / r, r) == k


def test_kernels_become_matrices_with_one_row_per_output_channel() -> None:
    kernel = torch.arange(24.0).reshape(2, 3, 2, 2)
    matrix = as_matrix(kernel)
    assert matrix.shape == (2, 12)
    assert torch.equal(matrix[1], kernel[1].flatten())
    with pytest.raises(ValueError, match="not a matrix"):
        as_matrix(torch.ones(3))


@pytest.mark.parametrize("shape", [(2, 3), (4, 3, 2, 2), (5, 1, 7), (3, 0)])
def test_a_matrixs_shape_is_known_from_the_header(shape: tuple[int, ...]) -> None:
    assert TensorInfo(shape, DTYPES["float32"]).matrix_shape == torch.ones(shape).flatten(1).shape


def test_factors_change_dtype_together() -> None:
    narrow = Factors(torch.eye(2), torch.ones(2), torch.eye(2)).to(torch.float16)
    assert {narrow.U.dtype, narrow.S.dtype, narrow.V.dtype} == {torch.float16}


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 50), st.integers(-20, 20))
def test_scaling_a_matrix_scales_only_its_values(m: int, n: int, seed: int, power: int) -> None:
    A = random(m, n, seed)
    plain, scaled = decompose(A), decompose(A * 2.0**power)
    torch.testing.assert_close(scaled.S, plain.S * 2.0**power, rtol=1e-9, atol=0)
    torch.testing.assert_close(scaled.U, plain.U, rtol=0, atol=1e-9)
