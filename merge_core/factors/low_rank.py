"""Low-rank algebra: truncations of matrices, their directions, and sums of them.

Notation: A is m x n with r = min(m, n) and A = U diag(S) Vᵀ, U m x r, V n x r, S descending.
Two things can be asked of a matrix. :class:`Truncations` give SVD_k(A), right as a whole: the
single columns of their factors are not singular vectors to rely on. :class:`Directions` give
triplets u_i, σ_i, v_i that are each right by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_core.devices import CPU, Device, compute
from merge_core.work_sizes import SMALL, WORTH_SENDING

# Rows of a matrix that are made at a time, so that they stay in the processor's cache.
ROWS = 512
# What directions are known to: they are stored in float32.
DIRECTION_NOISE = 1e-6
# How far from orthonormal directions may be that are used in float32.
ORTHONORMAL = 1e-9
PROBES = 4


@dataclass(frozen=True)
class Directions:
    """Singular triplets of one matrix, each right by itself; those that carry nothing are dropped.

    Attributes:
        U: left singular vectors, m x q, orthonormal columns.
        S: singular values, q, descending, positive.
        V: right singular vectors (not transposed), n x q, orthonormal columns.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    def fetch(self, device: Device) -> Directions:
        """The same on the CPU, where they were computed on a device."""
        return Directions(device.fetch(self.U), device.fetch(self.S), device.fetch(self.V))

    @property
    def rank(self) -> int:
        """Number of directions held, q ≤ r."""
        return self.S.shape[0]

    def head(self, k: int) -> Directions:
        """The first k directions (all where there are fewer)."""
        return Directions(self.U[:, :k], self.S[:k], self.V[:, :k])

    def pad(self, k: int) -> Directions:
        """k columns: the first directions, and zeros where there are fewer."""
        head, more = self.head(k), (0, max(0, k - self.rank))
        return Directions(
            *(torch.nn.functional.pad(part, more) for part in (head.U, head.S, head.V))
        )


class Truncations:
    """SVD_k(A) of one matrix for every k up to some number, as products of thin matrices.

    Args:
        vectors: q x r, orthonormal rows: leading singular vectors on the short side, which is U
            where m ≤ n, else V. Directions beyond them must be zero where `whole`.
        errors: q relative errors of the truncations after k = 1 … q.
        shape: m, n.
        tall: gives rows of A, or of Aᵀ where the short side is U.
        whole: whether the vectors are all that A has.
        long: A, or Aᵀ where the short side is U, times the first vectors, where it is at hand.
    """

    def __init__(
        self,
        vectors: Tensor,
        errors: Tensor,
        shape: tuple[int, int],
        tall: Callable[[slice], Tensor],
        whole: bool,
        long: Tensor | None = None,
    ) -> None:
        self.shape = shape
        self.whole = whole
        self._vectors = vectors
        self._errors = errors
        self._tall = tall
        self._long = long

    @property
    def rank(self) -> int:
        """r = min(m, n)."""
        return min(self.shape)

    def error(self, k: int) -> float:
        """Bound of ‖result − SVD_k(A)‖_F / ‖SVD_k(A)‖_F; infinite where k is out of reach."""
        if k <= len(self._errors):
            return float(self._errors[k - 1]) if k else 0.0
        return 0.0 if self.whole else math.inf

    def head(self, k: int) -> tuple[Tensor, Tensor]:
        """Two matrices, m x k and n x k, whose product L Rᵀ is SVD_k(A)."""
        return self._pair(slice(0, k))

    def tail(self, k: int) -> tuple[Tensor, Tensor]:
        """Two thin matrices whose product L Rᵀ is A − SVD_k(A), where all vectors are held."""
        return self._pair(slice(k, None))

    def truncate(self, k: int) -> Tensor:
        """SVD_k(A), m x n (k ≥ r gives all of A)."""
        left, right = self.head(k)
        return multiply(left, right.T)

    def _pair(self, kept: slice) -> tuple[Tensor, Tensor]:
        start, stop, _ = kept.indices(len(self._vectors))
        if self._long is None or self._long.shape[1] < stop:
            # A small matrix is worth all of its long side, from which every rank is a slice.
            made = None if self.rank < SMALL else stop
            self._long = product(self._tall, max(self.shape), self._vectors[:made].T)
        long, short = self._long[:, start:stop], self._vectors[start:stop].T
        return (short, long) if self.shape[0] <= self.shape[1] else (long, short)


def product(tall: Callable[[slice], Tensor], rows: int, X: Tensor) -> Tensor:
    """B X for a matrix that is made a few rows at a time; on an accelerator, all at once.

    Args:
        tall: gives rows of B, rows x n, on the CPU.
        rows: how many it has.
        X: n x k, on the CPU.

    Returns:
        rows x k, on the CPU, in the dtype of X.

    Example:
        >>> B = torch.arange(6.0).reshape(3, 2)
        >>> torch.equal(product(lambda part: B[part], 3, torch.eye(2)), B)
        True
    """

    def work(device: Device) -> Tensor:
        if device.accelerates:
            return device.fetch(device.send(tall(slice(None))).to(X.dtype) @ device.send(X))
        return product_by_rows(tall, rows, X)

    return work(CPU) if len(X) < SMALL else compute(work, exact=X.dtype == torch.float64)


def product_by_rows(tall: Callable[[slice], Tensor], rows: int, X: Tensor) -> Tensor:
    """The same on the CPU, from rows there.

    Example:
        >>> A = torch.eye(3)
        >>> product_by_rows(lambda part: A[part], 3, torch.ones(3, 1)).T
        tensor([[1., 1., 1.]])
    """
    result = torch.empty(rows, X.shape[1], dtype=X.dtype)
    for start in range(0, rows, ROWS):
        part = slice(start, start + ROWS)
        torch.mm(tall(part).to(X.dtype), X, out=result[part])
    return result


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """L R of matrices on the CPU, computed where that is quickest.

    Example:
        >>> multiply(torch.eye(2), torch.ones(2, 1)).T
        tensor([[1., 1.]])
    """
    if left.numel() * right.shape[1] < WORTH_SENDING:
        return left @ right
    exact = left.dtype == torch.float64
    return compute(lambda device: device.fetch(device.send(left) @ device.send(right)), exact)


def complete(
    rows: Tensor,
    S: Tensor,
    weighted: Tensor,
    wide: bool,
    size: float = 1.0,
    defect: float = 0.0,
) -> Directions:
    """Directions from those on the short side.

    Args:
        rows: q x r, orthonormal: the short side's vectors.
        S: q singular values, positive.
        weighted: the long side's vectors times their values, the matrix times the short side; it
            is overwritten.
        wide: whether the short side is U.
        size: of the values, in the unit of `weighted`.
        defect: how far from orthonormal the long side may be, ‖XᵀX − I‖_F.

    Example:
        >>> S = torch.tensor([3.0, 2.0])
        >>> found = complete(torch.eye(2), S, torch.diag(S), wide=False)
        >>> found.U * found.S @ found.V.T
        tensor([[3., 0.],
                [0., 2.]])
    """
    long, short = weighted.mul_(size / S), rows.T
    if _defect(long) > defect:
        # What rounding of a strong direction leaves in a weak one is along the strong one: QR
        # takes it out, in their order.
        Q, R = torch.linalg.qr(long)
        long = Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q.dtype)
    return Directions(short, S, long) if wide else Directions(long, S, short)


def _defect(X: Tensor) -> float:
    """About ‖XᵀX − I‖_F, by a few random vectors: of each the mean square is that of the norm.

    Source: Hutchinson's estimator, Commun. Stat. Simul. Comput. 19 (1990), 433.
    """
    source, shape = torch.Generator().manual_seed(0), (X.shape[1], PROBES)
    signs = X.new_empty(shape).copy_(torch.randint(2, shape, generator=source) * 2 - 1)
    return float(torch.linalg.vector_norm(X.T @ (X @ signs) - signs)) / math.sqrt(PROBES)


def as_matrix(tensor: Tensor) -> Tensor:
    """A weight as the matrix that is decomposed: out x in, kernels as o x (i·kh·kw).

    Args:
        tensor: two or more dimensions, output channels first.

    Raises:
        ValueError: fewer than two dimensions.

    Example:
        >>> as_matrix(torch.zeros(8, 3, 5, 5)).shape
        torch.Size([8, 75])
    """
    if tensor.ndim < 2:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not a matrix")
    return tensor.reshape(tensor.shape[0], -1)


def resolution(weights: Tensor, dtype: torch.dtype | None = None) -> float:
    """The largest singular value that rounding alone gives to a difference of such weights.

    Rounded entries are off by up to ε|θ|/2 each, independently; the spectral norm of such a
    matrix is about its largest row's norm plus its largest column's. Directions of a task vector
    below it carry nothing.

    Args:
        weights: m x n.
        dtype: in which they are stored; their own when None.

    Source: Bandeira and van Handel, Ann. Probab. 44 (2016), theorem 1.1; entries are off by
    0.21 ε on average, so that twice their bound's leading terms leave a margin.

    Example:
        >>> round(resolution(torch.ones(100, 100)) / torch.finfo(torch.float32).eps)
        20
    """
    rows, columns = (
        torch.linalg.vector_norm(weights, dim=side, dtype=torch.float64) for side in (1, 0)
    )
    return torch.finfo(dtype or weights.dtype).eps * float(rows.max() + columns.max())


def sum_of_truncations(
    terms: Sequence[Truncations],
    k: int | Sequence[int],
    total: Callable[[], Tensor],
) -> Tensor:
    """Σ_t SVD_k(A_t) in one product of stacked factors.

    Args:
        terms: of T matrices A_t of one shape m x n.
        k: number of directions kept of each, or T such numbers; k ≥ r gives all of A_t.
        total: gives Σ_t A_t (m x n, or what broadcasts to it), from which the tails are
            subtracted when that is the smaller product (k > r/2).

    Returns:
        m x n, in the factors' dtype.

    Example:
        >>> A = torch.diag(torch.tensor([3.0, 2.0]))
        >>> term = Truncations(torch.eye(2), torch.zeros(2), (2, 2), lambda part: A[part], True)
        >>> sum_of_truncations([term, term], 1, lambda: A + A)
        tensor([[6., 0.],
                [0., 0.]])
    """
    ranks = [k] * len(terms) if isinstance(k, int) else list(k)
    from_the_end = 2 * sum(ranks) > terms[0].rank * len(terms) and all(t.whole for t in terms)
    pairs = [
        term.tail(rank) if from_the_end else term.head(rank)
        for term, rank in zip(terms, ranks, strict=True)
    ]
    left = torch.cat([left for left, _ in pairs], dim=1)
    update = multiply(left, torch.cat([right for _, right in pairs], dim=1).T)
    return total() - update if from_the_end else update


def decompose_product(left: Tensor, right: Tensor) -> Directions:
    """Directions of L R from its thin factors, without making a decomposition of m x n.

    Args:
        left: L, m x q.
        right: R, q x n.

    Returns:
        Directions in float64, at most q.

    Source: [derived] L = Q_1 R_1, Rᵀ = Q_2 R_2, and the SVD of the small R_1 R_2ᵀ.

    Example:
        >>> decompose_product(torch.ones(4, 1), torch.ones(1, 9)).S
        tensor([6.], dtype=torch.float64)
    """
    Q1, R1 = torch.linalg.qr(left.double())
    Q2, R2 = torch.linalg.qr(right.double().T)
    P, S, Qh = torch.linalg.svd(R1 @ R2.T, full_matrices=False)
    live = S > 1e-12 * S[:1]
    return Directions((Q1 @ P)[:, live], S[live], (Q2 @ Qh.T)[:, live])


def orthogonalize(X: Tensor, noise: float = 1e-12) -> Tensor:
    """The nearest matrix with orthonormal columns or rows: P Qᵀ of the thin SVD X = P D Qᵀ.

    Args:
        X: m x n.
        noise: what its entries are known to, relative to the first singular value; directions
            that X does not have but for that are left out.

    Returns:
        m x n; ``XᵀX = I`` where X has full column rank, ``XXᵀ = I`` where it has full row rank.

    Source: orthogonal Procrustes; used by TSV-M, arXiv:2412.00081, equation 9.

    Example:
        >>> orthogonalize(torch.tensor([[2.0, 0.0], [0.0, 0.5]]))
        tensor([[1., 0.],
                [0., 1.]])
    """

    def work(device: Device) -> Tensor:
        P, D, Qh = torch.linalg.svd(device.send(X), full_matrices=False)
        live = D > noise * D[0] if D.numel() else D > 0
        return device.fetch((P * live) @ Qh)

    return work(CPU) if min(X.shape) < SMALL else compute(work, exact=True)


def count_directions(rank: float | int, r: int) -> int:
    """Number of directions k that a declared rank means for a matrix with r = min(m, n).

    A float ρ in (0, 1] is a share, k = max(1, floor(ρ·r)); an integer is k itself, at most r.

    Source: CART, arXiv:2412.12153; the authors' code takes the floor.

    Example:
        >>> count_directions(0.08, 768), count_directions(16, 768)
        (61, 16)
    """
    if isinstance(rank, int):
        return min(rank, r)
    # 0.29 * 100 is 28.999999999999996: a share that names a whole number must give it.
    return min(r, max(1, int(rank * r + 1e-9)))
