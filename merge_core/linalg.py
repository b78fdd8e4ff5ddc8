"""Exact low-rank algebra: singular value decompositions, truncations and their sums.

Notation: A is m x n with r = min(m, n) and A = U diag(S) Vᵀ, U m x r, V n x r, S descending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Route = Literal["gram", "svd"]

# Eigenvalues of a float64 Gram matrix are off by about 1e-16 of the largest one, so singular
# values below this share of the first are rounding noise and are set to exactly zero.
GRAM_NOISE = 3e-8


@dataclass(frozen=True)
class Factors:
    """Singular value decomposition of one matrix.

    Attributes:
        U: left singular vectors, m x r, orthonormal columns.
        S: singular values, r, descending, non-negative.
        V: right singular vectors (not transposed), n x r, orthonormal columns.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    @property
    def rank(self) -> int:
        """Number of directions held, r."""
        return self.S.shape[0]

    def truncated(self, k: int) -> Tensor:
        """SVD_k(A) = Σ_{i≤k} σ_i u_i v_iᵀ, m x n (k beyond r gives all of A)."""
        return (self.U[:, :k] * self.S[:k]) @ self.V[:, :k].T

    def tail(self, k: int) -> Tensor:
        """A − SVD_k(A) = Σ_{i>k} σ_i u_i v_iᵀ, m x n."""
        return (self.U[:, k:] * self.S[k:]) @ self.V[:, k:].T

    def to(self, dtype: torch.dtype) -> Factors:
        """The same factors in another dtype."""
        return Factors(self.U.to(dtype), self.S.to(dtype), self.V.to(dtype))


def as_matrix(tensor: Tensor) -> Tensor:
    """A weight as the matrix that is decomposed: out x in, kernels as o x (i·kh·kw).

    Args:
        tensor: two or more dimensions, output channels first.

    Raises:
        ValueError: fewer than two dimensions.
    """
    if tensor.ndim < 2:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not a matrix")
    return tensor.reshape(tensor.shape[0], -1)


def decompose(A: Tensor, route: Route = "gram") -> Factors:
    """Full singular value decomposition in float64.

    Args:
        A: m x n, any floating dtype, finite.
        route: ``"gram"`` takes the eigenvectors of the Gram matrix on the short side (several
            times faster; singular values below 3e-8 of the first count as zero, which float32
            weights cannot resolve anyway); ``"svd"`` calls LAPACK's SVD.

    Returns:
        Factors in float64. The sign of each pair (u_i, v_i) is fixed so that the entry of u_i
        that is largest in magnitude is positive, which makes both routes comparable.
    """
    A = A.to(torch.float64)
    if route == "svd":
        U, S, Vh = torch.linalg.svd(A, full_matrices=False)
        V = Vh.T
    elif A.shape[0] <= A.shape[1]:
        U, S, V = _gram_route(A)
    else:
        V, S, U = _gram_route(A.T)
    peak = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0)
    return Factors((U * sign).contiguous(), S.contiguous(), (V * sign).contiguous())


def _gram_route(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V of a wide (or square) float64 matrix from the eigenvectors of A Aᵀ."""
    # Scaling keeps the squares of very small or very large entries inside float64's range.
    size = A.abs().max()
    if not size > 0:
        size = torch.ones_like(size)
    B = A / size
    eigenvalues, vectors = torch.linalg.eigh(B @ B.T)
    U = vectors.flip(1)
    S = eigenvalues.flip(0).clamp_min(0).sqrt()
    live = S > GRAM_NOISE * S[0]
    S = torch.where(live, S, 0.0)
    W = B.T @ U / torch.where(live, S, 1.0)
    if not bool(live.all()):
        # Directions of zero weight still have to be orthonormal: QR completes the live ones.
        filler = torch.randn(W.shape, dtype=W.dtype, generator=torch.Generator().manual_seed(0))
        W = torch.where(live, W, filler)
    V, R = torch.linalg.qr(W)
    return U, S * size, V * torch.where(R.diagonal() < 0, -1.0, 1.0)


def singular_values(A: Tensor) -> Tensor:
    """Singular values only, float64, descending, r of them (Gram route, see :func:`decompose`)."""
    A = A.to(torch.float64)
    if A.shape[0] > A.shape[1]:
        A = A.T
    size = A.abs().max()
    if not size > 0:
        return torch.zeros(A.shape[0], dtype=torch.float64)
    B = A / size
    S = torch.linalg.eigvalsh(B @ B.T).flip(0).clamp_min(0).sqrt()
    return torch.where(S > GRAM_NOISE * S[0], S, 0.0) * size


def sum_of_truncations(factors: Sequence[Factors], k: int, total: Tensor) -> Tensor:
    """Σ_t SVD_k(A_t) in one product of stacked factors.

    Args:
        factors: of T matrices A_t of one shape m x n.
        k: number of directions kept of each; k ≥ r gives `total`.
        total: Σ_t A_t (m x n), from which the tails are subtracted when that is the
            smaller product (k > r/2).

    Returns:
        m x n, in the factors' dtype.
    """
    r = factors[0].rank
    if k >= r:
        return total.clone()
    kept = slice(0, k) if 2 * k <= r else slice(k, r)
    left = torch.cat([f.U[:, kept] * f.S[kept] for f in factors], dim=1)
    right = torch.cat([f.V[:, kept] for f in factors], dim=1)
    product = left @ right.T
    return product if kept.start == 0 else total - product


def orthogonalised(X: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns or rows: P Qᵀ of the thin SVD X = P D Qᵀ.

    Directions that X does not have (singular values below 1e-12 of the first) are left out.

    Args:
        X: m x n.

    Returns:
        m x n; ``XᵀX = I`` where X has full column rank, ``XXᵀ = I`` where it has full row rank.

    Source: orthogonal Procrustes; used by TSV-M, arXiv:2412.00081, equation 9.
    """
    P, D, Qh = torch.linalg.svd(X, full_matrices=False)
    live = D > 1e-12 * D[0] if D.numel() else D > 0
    return (P * live) @ Qh


def directions(rank: float | int, r: int) -> int:
    """Number of directions k that a declared rank means for a matrix with r = min(m, n).

    A float ρ in (0, 1] is a share, k = max(1, floor(ρ·r)); an integer is k itself, at most r.

    Source: CART, arXiv:2412.12153; the authors' code takes the floor.
    """
    if isinstance(rank, int):
        return min(rank, r)
    # 0.29 * 100 is 28.999999999999996: a share that names a whole number must give it.
    return min(r, max(1, int(rank * r + 1e-9)))
