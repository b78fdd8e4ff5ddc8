"""How a matrix is decomposed: two contracts, each with one route.

Notation: A is m x n with r = min(m, n) and A = U diag(S) Vᵀ; B is the taller of A and Aᵀ, and its
*side* are the singular vectors on the short side (V where m > n, else U). The long side follows
from it as B times the side.

*Truncations* SVD_k(A) are right as a whole, to a bound of their own: leading directions are found
in float32 and settled among themselves, and what lies outside them is measured. *Directions* and
spectra are right one by one and computed in float64.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from merge_core.devices import Device, compute
from merge_core.factors.lapack import leading_eigenpairs
from merge_core.factors.low_rank import Directions, complete
from merge_core.work_sizes import SMALL

Route = Literal["gram", "svd"]

# What rounding to float32 and float64 may change, relative to a number.
FLOAT32, FLOAT64 = 2.0**-24, 2.0**-53
ROUNDED = 8 * FLOAT32  # of a truncation: of its vectors, and of products with them
# The eigenvalues of a float64 Gram matrix are off by some 1e-16 of the largest one: singular
# values below this share of the first are rounding noise, and are set to exactly zero.
GRAM_NOISE = 3e-8
# Below this share its eigenvectors begin to lose digits, and LAPACK's SVD is asked instead.
GRAM_CLEAR = 1e-4


@dataclass(frozen=True)
class Side:
    """Singular values and vectors on a matrix's short side, as they are stored.

    They lie where the matrix lay.

    Attributes:
        vectors: q x r, float32, orthonormal rows, one a direction, their largest entry positive.
        S: singular values, float32, descending: r of them, or those of the q vectors.
        errors: q bounds, float32: of ‖B VₖVₖᵀ − SVD_k(B)‖_F / ‖SVD_k(B)‖_F for k = 1 … q.
    """

    vectors: Tensor
    S: Tensor
    errors: Tensor


def leading_side(B: Tensor, count: int) -> Side:
    """The first directions of a tall matrix, for truncations.

    They are found from BᵀB in float32, within which squares of small values drown. So they are
    settled among themselves: the SVD of B on their span, in float64 (Rayleigh-Ritz). What is left
    is how far the span is off, which its residual bounds.

    Args:
        B: m x n, m ≥ n, float32, finite; decomposed where it lies.
        count: how many directions, 1 to n.

    Raises:
        ArithmeticError: the eigensolver fails.

    Source: [derived] see :func:`truncation_errors`.

    Example:
        >>> side = leading_side(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
        >>> side.S.round(decimals=3), bool(side.errors.max() < 1e-5)
        (tensor([3., 2.]), True)
    """
    B, size = _scale(B)
    rows = _leading_rows(gram(B), count)
    X = torch.linalg.qr(rows.T.double()).Q
    Y = B @ X.float()
    theta, W = torch.linalg.eigh(Y.double().T @ Y.double())
    theta, W = theta.flip(0).clamp_min(0), W.flip(1)
    vectors, Y = (X @ W).float(), Y @ W.float()
    residual = (B.T @ Y - vectors * theta.float()).double().norm(dim=0)
    # What the eigensolver missed is not larger than its own error, nor than all that is left.
    missed = float(residual.max())
    if bool((theta < missed).any()):
        missed = min(missed, float((B - Y @ vectors.T).double().square().sum()))
    noise = 2 * FLOAT32 * float(torch.linalg.vector_norm(B, dim=1).max())
    errors = truncation_errors(theta, residual, noise, missed)
    return _side(vectors.T, theta.sqrt() * size, errors)


def truncation_errors(theta: Tensor, residual: Tensor, noise: float, missed: float) -> Tensor:
    """How far truncations after k of q approximate directions are off, for k = 1 … q.

    To first order a projection errs by e_ij / (θ_i − θ_j) between a kept i and a dropped j, which
    moves the truncation by √(θ_i + θ_j) times as much. Within the q directions e_ij is what
    rounding leaves, noise · (σ_i + σ_j); to those outside, whose θ is at most θ_q + missed, all
    of it is the residual of i.

    Args:
        theta: q squares of singular values, descending.
        residual: q norms ‖BᵀB v_i − θ_i v_i‖.
        noise: what rounding adds to an entry of B v at most, two unit roundoffs of the norm of
            B's largest row.
        missed: by how much the square of a direction outside may exceed the last of theta.

    Returns:
        q bounds of ‖B VₖVₖᵀ − SVD_k(B)‖_F / ‖SVD_k(B)‖_F; 0 where there is nothing.

    Source: [derived] from first-order perturbation of invariant subspaces (Stewart and Sun,
    Matrix perturbation theory, 1990, chapter V). The rounding of a product is a random walk of
    0.4 unit roundoffs of the row's norm (as Higham and Mary, SIAM J. Sci. Comput. 41, 2019).

    Example:
        >>> theta = torch.tensor([9.0, 4.0, 1.0], dtype=torch.float64)
        >>> exact, rough = (truncation_errors(theta, r * theta, 0.0, 0.0) for r in (0.0, 0.01))
        >>> bool((exact < rough).all())
        True
    """

    def share(error: Tensor, gap: Tensor) -> Tensor:
        # No direction is off by more than itself, however close its neighbour.
        return (error / gap).nan_to_num(0.0, posinf=1.0, neginf=1.0).clamp(0.0, 1.0).square()

    sigma = theta.sqrt()
    pairs = share(noise * (sigma[:, None] + sigma), theta[:, None] - theta)
    within = (pairs * (theta[:, None] + theta)).triu(1).cumsum(dim=0).triu(1).sum(dim=1)
    gap = (theta - theta[-1] - missed).clamp_min(0.0)
    outside = ((2 * theta + missed) * share(residual, gap)).cumsum(dim=0)
    error = ((within + outside) / theta.cumsum(dim=0)).nan_to_num(0.0).sqrt()
    return error + ROUNDED  # the rounding of the vectors, and of the product


def whole_side(B: Tensor, route: Route = "gram") -> Side:
    """All directions of a tall matrix, computed in float64.

    Args:
        B: m x n, m ≥ n, finite; decomposed where it lies.
        route: ``"gram"`` takes the eigenvectors of BᵀB (directions below 3e-8 of the first are
            left undetermined, those below 1e-4 lose digits); ``"svd"`` calls LAPACK's SVD.

    Example:
        >>> whole_side(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])).vectors
        tensor([[0., 1.],
                [1., 0.]])
    """
    B, size = _scale(B.double())
    if route == "svd":
        _, S, rows = torch.linalg.svd(B, full_matrices=False)
    else:
        theta, columns = torch.linalg.eigh(gram(B))
        S, rows = _values(theta.flip(0)), columns.T.flip(0)
    return _side(rows, S * size, torch.full_like(S, ROUNDED))


def singular_values(A: Tensor) -> Tensor:
    """Singular values, float64, descending, r of them; below 3e-8 of the first they are zero.

    Args:
        A: m x n, finite.

    Raises:
        ArithmeticError: the eigensolver fails.

    Example:
        >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]))
        tensor([4., 3.], dtype=torch.float64)
    """
    B, size = _scale((A.T if A.shape[0] <= A.shape[1] else A).double())
    return _values(_eigenvalues(gram(B))) * size


def decompose(A: Tensor, floor: float = 0.0, defect: float = 0.0) -> Directions:
    """The directions of a matrix, each right by itself, in float64.

    Args:
        A: m x n, finite.
        floor: singular values up to this one carry nothing and are dropped with their directions
            (see :func:`merge_core.factors.low_rank.resolution`); so is what float64 cannot tell
            from zero.
        defect: how far from orthonormal the long side may be, ‖XᵀX − I‖_F; a long one takes as
            much time to make orthonormal as all the rest.

    Returns:
        Directions in float64, as many as there are, the largest entry of each on the short side
        positive.

    Example:
        >>> found = decompose(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]))
        >>> found.S
        tensor([4., 3.], dtype=torch.float64)
    """
    if min(A.shape) < SMALL:
        return _decompose_here(A, floor, defect)

    def work(device: Device) -> Directions:
        return _decompose_here(device.send(A), floor, defect).fetch(device)

    return compute(work, exact=True)


def _decompose_here(A: Tensor, floor: float, defect: float) -> Directions:
    """The same, where the matrix lies."""
    wide = A.shape[0] <= A.shape[1]
    A, size = _scale(A.double())
    B = A.T if wide else A
    theta, columns = torch.linalg.eigh(gram(B))
    S, rows = _values(theta.flip(0)), columns.T.flip(0)
    if not is_clear(S, floor / size):
        _, S, rows = torch.linalg.svd(B, full_matrices=False)
    live = S > max(floor / size, FLOAT64 * max(A.shape) * float(S[0]))
    rows = _sign(rows[live])
    # Directions one after another, as whoever takes the long side apart reads them.
    return complete(rows, S[live] * size, (rows @ B.T).T, wide, size, defect)


def leading_triplets(A: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular triplets of a matrix in float64, whatever their values.

    They are found from the Gram matrix and settled by a decomposition of A on their span, where
    it resolves them; else LAPACK's SVD is asked.

    Args:
        A: m x n, float64, on the CPU, finite.
        count: how many, 1 to min(m, n).

    Returns:
        U (m x count), S (descending) and V (n x count), orthonormal columns.

    Example:
        >>> U, S, V = leading_triplets(torch.diag(torch.tensor([3.0, 2.0, 1.0])).double(), 2)
        >>> S
        tensor([3., 2.], dtype=torch.float64)
    """
    if A.shape[0] < A.shape[1]:
        V, S, U = leading_triplets(A.T, count)
        return U, S, V
    if min(A.shape) > 4 * count:
        with suppress(ArithmeticError):
            B, size = _scale(A)
            _, rows = leading_eigenpairs(gram(B), count)
            U, S, Vh = torch.linalg.svd(B @ rows.T, full_matrices=False)
            if float(S[-1]) > GRAM_CLEAR * float(S[0]):
                return U, S * size, (Vh @ rows).T
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return U[:, :count], S[:count], Vh[:count].T


def is_clear(S: Tensor, floor: float) -> bool:
    """Whether the Gram matrix resolves all directions that carry something.

    Args:
        S: singular values from a float64 Gram matrix, descending.
        floor: up to which they carry nothing.

    Example:
        >>> is_clear(torch.tensor([1.0, 1e-3]), 0.0), is_clear(torch.tensor([1.0, 1e-6]), 0.0)
        (True, False)
        >>> is_clear(torch.tensor([1.0, 1e-6]), floor=1e-5)
        True
    """
    least = max(floor, GRAM_NOISE * float(S[0]))
    if floor < GRAM_NOISE * float(S[0]) and float(S[-1]) < least:
        return False  # there may be directions that it does not see
    live = S[S > least]
    return live.numel() == 0 or float(live[-1]) > GRAM_CLEAR * float(S[0])


def gram(B: Tensor, block: int = 96) -> Tensor:
    """BᵀB, n x n, computed on and below the diagonal only and mirrored.

    Args:
        B: m x n.
        block: columns taken at a time.

    Example:
        >>> gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        tensor([[1., 2.],
                [2., 5.]])
    """
    if not B.is_cpu:
        return B.T @ B  # in one call: there, calls are what takes long
    n = B.shape[1]
    G = torch.empty(n, n, dtype=B.dtype)
    for start in range(0, n, block):
        stop = min(n, start + block)
        G[start:, start:stop] = B[:, start:].T @ B[:, start:stop]
        G[start:stop, stop:] = G[stop:, start:stop].T
    return G


def _eigenvalues(G: Tensor) -> Tensor:
    """Of a symmetric matrix, descending, by the solver of its device."""
    return leading_eigenpairs(G, 0)[0] if G.is_cpu else torch.linalg.eigvalsh(G).flip(0)


def _leading_rows(G: Tensor, count: int) -> Tensor:
    """The first eigenvectors of a symmetric matrix, count x n, by the solver of its device."""
    if G.is_cpu:
        return leading_eigenpairs(G, count)[1]
    return torch.linalg.eigh(G).eigenvectors[:, -count:].flip(1).T


def _scale(B: Tensor) -> tuple[Tensor, float]:
    """B with entries whose squares stay in range, and the power of two that was taken out."""
    low, high = B.aminmax()
    exponent = math.frexp(max(-float(low), float(high)))[1]
    if abs(exponent) < 32:
        return B, 1.0
    size = math.ldexp(1.0, exponent)
    return B / size, size


def _values(theta: Tensor) -> Tensor:
    """Singular values from the eigenvalues of a float64 Gram matrix, descending."""
    S = theta.clamp_min(0).sqrt()
    return torch.where(S > GRAM_NOISE * S[0], S, 0.0)


def _sign(rows: Tensor) -> Tensor:
    """Rows whose entry of largest magnitude is positive."""
    if rows.shape[0] == 0:
        return rows
    low, high = rows.aminmax(dim=1, keepdim=True)
    return rows * torch.where(-low > high, -1.0, 1.0).to(rows.dtype)


def _side(rows: Tensor, S: Tensor, errors: Tensor) -> Side:
    parts = (_sign(rows), S, errors)
    return Side(*(part.float().contiguous() for part in parts))
