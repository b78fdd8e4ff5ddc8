"""Exact low-rank algebra: singular value decompositions, truncations and their sums.

Notation: A is m x n with r = min(m, n) and A = U diag(S) Vᵀ, U m x r, V n x r, S descending.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Directions below which a matrix costs little, whatever is made of all of it.
SMALL = 512
# Rows of a matrix that are made at a time.
ROWS = 512
# As many directions as there are.
ALL = sys.maxsize


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

    def left(self, k: int | None = None) -> Tensor:
        """m x k: the first left singular vectors (all r when None)."""
        return self.U[:, :k]

    def right(self, k: int | None = None) -> Tensor:
        """n x k: the first right singular vectors (all r when None)."""
        return self.V[:, :k]

    def head(self, k: int | None = None) -> Factors:
        """Both sides of the first k directions (all r when None)."""
        return Factors(self.left(k), self.S[:k], self.right(k))

    def pair(self, kept: slice) -> tuple[Tensor, Tensor]:
        """Two matrices, m x k and n x k, whose product L Rᵀ is Σ_{i kept} σ_i u_i v_iᵀ."""
        return self.U[:, kept] * self.S[kept], self.V[:, kept]

    def truncated(self, k: int) -> Tensor:
        """SVD_k(A) = Σ_{i≤k} σ_i u_i v_iᵀ, m x n (k beyond r gives all of A)."""
        left, right = self.pair(slice(0, k))
        return left @ right.T

    def to(self, dtype: torch.dtype) -> Factors:
        """The same factors in another dtype."""
        return Factors(self.U.to(dtype), self.S.to(dtype), self.V.to(dtype))


class SideFactors:
    """Singular value decomposition of which one side is held and the other made when asked for.

    The long side is the matrix times the short one: U = A V / S. A direction of zero weight has
    a zero vector there.

    Args:
        vectors: q x min(m, n), orthonormal rows: the short side's vectors, one a direction.
        S: singular values, r, descending; those after the first q are zero unless `more` is given.
        shape: m, n; the short side is U where m ≤ n, else V.
        tall: gives rows of A, or of Aᵀ where the short side is U, when the long side is asked for.
        sure_at: the number of leading directions that are known to span their space exactly
            enough; None if any number is.
        more: gives at least so many rows of the vectors, when more than q are asked for.
        rough: whether small values are rough (see :class:`merge_core.decomposition.Side`).
    """

    def __init__(
        self,
        vectors: Tensor,
        S: Tensor,
        shape: tuple[int, int],
        tall: Callable[[slice], Tensor],
        sure_at: int | None = None,
        more: Callable[[int], Tensor] | None = None,
        rough: bool = False,
    ) -> None:
        self.S = S
        self.sure_at = sure_at
        self.rough = rough
        self.shape = shape
        self._vectors = vectors
        self._tall = tall
        self._more = more
        self._wide = shape[0] <= shape[1]
        self._long: Tensor | None = None

    @property
    def rank(self) -> int:
        """r = min(m, n)."""
        return min(self.shape)

    def left(self, k: int | None = None) -> Tensor:
        """m x k: the first left singular vectors (all r when None)."""
        return self._short(slice(0, k)) if self._wide else self._unit(k)

    def right(self, k: int | None = None) -> Tensor:
        """n x k: the first right singular vectors (all r when None)."""
        return self._unit(k) if self._wide else self._short(slice(0, k))

    def head(self, k: int | None = None) -> Factors:
        """Both sides of the first k directions (all r when None)."""
        return Factors(self.left(k), self.S[:k], self.right(k))

    def pair(self, kept: slice) -> tuple[Tensor, Tensor]:
        """Two matrices, m x k and n x k, whose product L Rᵀ is Σ_{i kept} σ_i u_i v_iᵀ."""
        long = self._weighted(kept)  # first: it may bring other vectors
        short = self._short(kept)
        return (short, long) if self._wide else (long, short)

    def truncated(self, k: int) -> Tensor:
        """SVD_k(A) = Σ_{i≤k} σ_i u_i v_iᵀ, m x n (k beyond r gives all of A)."""
        left, right = self.pair(slice(0, k))
        return left @ right.T

    def weigh(self, long: Tensor) -> None:
        """Take over the long side of the first directions, times their values, made elsewhere."""
        self._long = long

    def _short(self, kept: slice) -> Tensor:
        stop = kept.indices(self.rank)[1]
        if self._more is not None and stop > self._vectors.shape[0]:
            # Not those before, where they were turned for a cut: nor is their long side.
            self._vectors, self._long = self._more(stop), None
        vectors = self._vectors[kept].T
        missing = len(range(*kept.indices(self.rank))) - vectors.shape[1]
        return torch.nn.functional.pad(vectors, (0, missing)) if missing else vectors

    def _weighted(self, kept: slice) -> Tensor:
        """The long side's vectors times their values, A times the short side; kept for a while."""
        start, stop, _ = kept.indices(self.rank)
        if self._long is None or self._long.shape[1] < stop:
            # A small matrix is worth all of its long side, from which every rank is a slice.
            made = slice(0, None) if self.rank < SMALL else kept
            product = product_with(self._tall, max(self.shape), self._short(made))
            if made.start:
                return product
            self._long = product
        return self._long[:, start:stop]

    def _unit(self, k: int | None) -> Tensor:
        """The long side's first vectors, orthonormal but for those of zero weight."""
        weighted, live = self._weighted(slice(0, k)), self.S[:k] > 0
        # Rounding leaves those of small weight slightly askew: QR sets them right in their order.
        Q, R = torch.linalg.qr(weighted[:, live] / self.S[:k][live])
        unit = torch.zeros_like(weighted)
        unit[:, live] = Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q.dtype)
        return unit


def product_with(
    tall: Callable[[slice], Tensor],
    rows: int,
    X: Tensor,
    look: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """B X for a matrix that is made a few rows at a time, so that it stays in the cache.

    Args:
        tall: gives rows of B, rows x n.
        rows: how many it has.
        X: n x k.
        look: told each block of B and its product.

    Returns:
        rows x k, in the dtype of X.
    """
    product = torch.empty(rows, X.shape[1], dtype=X.dtype)
    for start in range(0, rows, ROWS):
        part = slice(start, start + ROWS)
        block = tall(part).to(X.dtype)
        torch.mm(block, X, out=product[part])
        if look is not None:
            look(block, product[part])
    return product


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


def sum_of_truncations(
    factors: Sequence[Factors | SideFactors],
    k: int | Sequence[int],
    total: Callable[[], Tensor],
) -> Tensor:
    """Σ_t SVD_k(A_t) in one product of stacked factors.

    Args:
        factors: of T matrices A_t of one shape m x n.
        k: number of directions kept of each, or T such numbers; k ≥ r gives all of A_t.
        total: gives Σ_t A_t (m x n, or what broadcasts to it), from which the tails are
            subtracted when that is the smaller product (k > r/2).

    Returns:
        m x n, in the factors' dtype.
    """
    r = factors[0].rank
    ranks = [k] * len(factors) if isinstance(k, int) else list(k)
    from_the_end = 2 * sum(ranks) > r * len(factors)
    kept = [slice(rank, r) if from_the_end else slice(0, rank) for rank in ranks]
    pairs = [f.pair(part) for f, part in zip(factors, kept, strict=True)]
    left = torch.cat([left for left, _ in pairs], dim=1)
    product = left @ torch.cat([right for _, right in pairs], dim=1).T
    return total() - product if from_the_end else product


def factors_of_product(left: Tensor, right: Tensor) -> SideFactors:
    """Factors of L R from its thin factors, without making a decomposition of m x n.

    Args:
        left: L, m x q.
        right: R, q x n.

    Returns:
        Factors in float32; no more than q values are not zero.

    Source: [derived] L = Q_1 R_1, Rᵀ = Q_2 R_2, and the SVD of the small R_1 R_2ᵀ.
    """
    Q1, R1 = torch.linalg.qr(left.double())
    Q2, R2 = torch.linalg.qr(right.double().T)
    P, D, Qh = torch.linalg.svd(R1 @ R2.T, full_matrices=False)
    shape = left.shape[0], right.shape[1]
    side = (Q1 @ P).T if shape[0] <= shape[1] else Qh @ Q2.T
    live = D > 1e-12 * D[:1]
    S = torch.zeros(min(shape))
    S[: D.numel()] = (D * live).float()

    def tall(part: slice) -> Tensor:
        if shape[0] <= shape[1]:
            return (right[:, part].T @ left.T).float()
        return (left[part] @ right).float()

    return SideFactors(side.float().contiguous(), S, shape, tall)


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
