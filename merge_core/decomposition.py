"""How a matrix is decomposed: by LAPACK's SVD, or by the Gram matrix of its short side.

Notation: A is m x n with r = min(m, n). Its *side* are the r singular vectors on the short side
(those of V where m > n, else those of U); the long side follows from it as A times the side.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from merge_core.linalg import Factors, product_with
from merge_core.tridiagonal import Reduction, reduced
from merge_core.work_sizes import BLOCKS, FAST_FROM

Route = Literal["gram", "svd"]

# Eigenvalues of a float64 Gram matrix are off by about 1e-16 of the largest one, so singular
# values below this share of the first are rounding noise and are set to exactly zero.
GRAM_NOISE = 3e-8
# The same in float32, for values that were found again among themselves (see _resolved).
FAST_NOISE = 1.5e-6
# Shares of the first singular value below which float32 cannot tell two of them apart.
FAST_FLOOR = 0.005
PROBES = 2
# The squared length of vectors may differ from 1 by so much when those before are taken out.
CLEAN = 0.01
# Directions before a cut whose error is computed, and how exactly.
WINDOW = 8
RESIDUAL_NOISE = 0.2


@dataclass(frozen=True)
class Side:
    """Singular values and the singular vectors on a matrix's short side.

    Attributes:
        vectors: q x min(m, n), orthonormal rows, one a direction; q = r unless there is a
            reduction, which gives the others.
        S: singular values, r, descending, non-negative.
        noise: root mean square of the entries of side · AᵀA · sideᵀ − diag(S²), in the unit of
            S²; 0 where the decomposition was made in float64.
        reduction: of AᵀA (or A Aᵀ), its eigenvectors the rows of the side.
        rough: whether values below 0.005 of the first, and their vectors, are not found again
            among themselves, and so are rough.
    """

    vectors: Tensor
    S: Tensor
    noise: float = 0.0
    reduction: Reduction | None = None
    rough: bool = False


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
        U, S, V = _both_sides(A)
    else:
        V, S, U = _both_sides(A.T)
    peak = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0)
    return Factors((U * sign).contiguous(), S.contiguous(), (V * sign).contiguous())


def short_side(A: Tensor, route: Route = "gram", wanted: int | None = None) -> Side:
    """Singular values and short side, in the arithmetic of A's dtype or better.

    In float32, from :data:`FAST_FROM` directions on, the Gram matrix and its eigenvectors are
    computed in float32 and their error is measured; anything else is computed in float64. Values
    below 0.005 of the first are found again in their own subspace, where the largest do not
    drown them (not where they are many and only leading vectors are wanted: see :class:`Side`).

    Args:
        A: m x n, float32 or float64, finite; on a GPU it is decomposed there.
        route: ``"svd"`` calls LAPACK's SVD in float64.
        wanted: how many of the first vectors are needed at once (all when None). Up to a third
            in float32 on the CPU, the others are left to a reduction (see :func:`extended`).

    Returns:
        The side in float32, on the CPU, the largest entry of each vector positive.

    Source: [derived] Gram route; the float32 error is that of the symmetric eigensolver (up to
    1e-5 of σ_1² in norm at r = 768), ten times that of the product before it.
    """
    wide = A.shape[0] <= A.shape[1]
    B = A.T if wide else A
    if route == "svd":
        _, S, vectors = torch.linalg.svd(B.double(), full_matrices=False)
        noise = 0.0
    elif A.dtype == torch.float32 and B.shape[1] >= FAST_FROM and _in_range(B):
        G = gram(B)
        if wanted is not None and 3 * wanted <= len(G) and not A.is_cuda:
            with suppress(ArithmeticError):
                return extended(_reduced(B, G, wanted), wanted)
        S, vectors, noise = _fast(B, G)
    else:
        S, vectors = _gram_route(B.double())
        noise = 0.0
    return Side(_signed(vectors).float().contiguous().cpu(), S.float().cpu(), noise)


def extended(side: Side, wanted: int) -> Side:
    """The side with at least its first `wanted` vectors at hand (all if there are fewer).

    They are made a fixed number at a time, so that they do not depend on what was asked for when.

    Raises:
        ArithmeticError: an eigenvector cannot be found from the reduction.
    """
    r = side.S.numel()
    if side.reduction is None or side.vectors.shape[0] >= min(wanted, r):
        return side
    vectors, block = side.vectors, max(1, r // BLOCKS)
    while (first := vectors.shape[0]) < min(wanted, r):
        new = side.reduction.eigenvectors(first, min(first + block, r))
        # Close eigenvalues on both sides of the border: their vectors know nothing of each other.
        new = new - (new @ vectors.T) @ vectors
        if not bool(((new.square().sum(dim=1) - 1).abs() < CLEAN).all()):
            raise ArithmeticError(f"eigenvectors from {first} on, of {r}, are not orthonormal")
        vectors = torch.cat([vectors, _signed(new)])
    whole = vectors.shape[0] == r
    return replace(side, vectors=vectors, reduction=None if whole else side.reduction)


def _signed(vectors: Tensor) -> Tensor:
    """Rows whose entry of largest magnitude is positive."""
    low, high = vectors.aminmax(dim=1, keepdim=True)
    return vectors * torch.where(-low > high, -1.0, 1.0).to(vectors.dtype)


def singular_values(A: Tensor) -> Tensor:
    """Singular values only, float64, descending, r of them (Gram route, see :func:`decompose`)."""
    A = A.to(torch.float64)
    B, size = _scaled(A.T if A.shape[0] <= A.shape[1] else A)
    S = torch.linalg.eigvalsh(gram(B)).flip(0).clamp_min(0).sqrt()
    return torch.where(S > GRAM_NOISE * S[0], S, 0.0) * size


def gram(B: Tensor, block: int = 192) -> Tensor:
    """BᵀB, n x n, computed on and below the diagonal only and mirrored.

    Args:
        B: m x n.
        block: columns taken at a time.
    """
    n = B.shape[1]
    G = torch.empty(n, n, dtype=B.dtype, device=B.device)
    for start in range(0, n, block):
        stop = min(n, start + block)
        G[start:, start:stop] = B[:, start:].T @ B[:, start:stop]
        G[start:stop, stop:] = G[stop:, start:stop].T
    return G


@dataclass(frozen=True)
class Cut:
    """A side made ready for a cut.

    Attributes:
        side: whose first vectors span what is kept.
        error: ‖A P̂_k − SVD_k(A)‖_F / ‖SVD_k(A)‖_F, an estimate.
        long: A times the first k vectors, where it was made on the way.
    """

    side: Side
    error: float
    long: Tensor | None = None


def cut(side: Side, tall: Callable[[slice], Tensor], rows: int, k: int, tolerance: float) -> Cut:
    """The side made ready for a cut after k directions.

    To first order the projection on the first k vectors errs by c_ij = d_ij / (σ_i² − σ_j²)
    between a kept i and a dropped j, d the defect of the eigenvectors. Those of the last few kept
    ones, whose gaps are smallest, are computed, the others count with the noise's root mean
    square. Where that exceeds the tolerance, all are computed, and the vectors are turned back.

    Args:
        side: of A, at least its first k vectors at hand.
        tall: gives rows of A, or of Aᵀ where m ≤ n, in float32.
        rows: how many there are, max(m, n).
        k: directions kept.
        tolerance: of the error.

    Source: [derived] from first-order perturbation of invariant subspaces (Stewart and Sun,
    Matrix perturbation theory, 1990, chapter V).
    """
    if side.noise == 0 or k >= side.S.numel():
        return Cut(side, 0.0)
    squares = side.S.double().square()
    kept, dropped = squares[:k, None], squares[None, k:]

    def error(turn: Tensor) -> float:
        # No direction is off by more than itself, however close its neighbour.
        off = turn.square().clamp(max=1.0) * (kept + dropped)
        return float((off.sum() / squares[:k].sum()).sqrt())

    # Few leading directions are wanted themselves; of many, the tail is cut off instead.
    leading = 2 * k <= side.S.numel()
    first, known = max(0, k - WINDOW), side.vectors.shape[0] - k
    long, defect = _defect(side, tall, rows, k, first, 0 if leading else first)
    gaps = kept - dropped
    turn = torch.full_like(gaps, side.noise)
    turn[first:] = defect
    turn = (turn / gaps).nan_to_num(1.0, posinf=1.0, neginf=1.0)
    if (estimate := error(turn)) <= tolerance:
        return Cut(side, estimate, long if leading else None)
    if first > 0:
        _, defect = _defect(side, tall, rows, k, 0, 0)
        turn = (defect / gaps).nan_to_num(1.0, posinf=1.0, neginf=1.0)
    back = turn[:, :known].to(side.vectors.dtype)
    vectors = side.vectors.clone()
    vectors[:k] += back @ side.vectors[k:]
    vectors[k:] -= back.T @ side.vectors[:k]
    # What is left: the rounding of the defect itself, and the second order.
    left = turn.abs()
    left[:, :known] = RESIDUAL_NOISE * left[:, :known] + left[:, :known].square()
    return Cut(replace(side, vectors=vectors), error(left))


def _defect(
    side: Side, tall: Callable[[slice], Tensor], rows: int, k: int, first: int, wanted: int
) -> tuple[Tensor, Tensor]:
    """A times the vectors from `wanted` to k, and d_ij for i from `first` to k, j from k on.

    Of vectors not at hand only the sum of d_ij² is known; it is spread over them evenly.
    """
    near = side.vectors[first:k]
    residual = -near.T * side.S[first:k].square()

    def add(block: Tensor, product: Tensor) -> None:
        residual.addmm_(block.T, product[:, first - k :])

    product = product_with(tall, rows, side.vectors[wanted:k].T, add)
    along = side.vectors @ residual
    unknown = side.S.numel() - side.vectors.shape[0]
    defect = along[k:].T.double()
    if unknown:
        rest = residual.double().square().sum(dim=0) - along.double().square().sum(dim=0)
        each = (rest.clamp_min(0) / unknown).sqrt()
        defect = torch.cat([defect, each[:, None].expand(-1, unknown)], dim=1)
    return product, defect


def _in_range(B: Tensor) -> bool:
    """Whether the squares of the entries stay well inside float32's range."""
    low, high = B.aminmax()
    return 1e-12 < max(-float(low), float(high)) < 1e12


def _scaled(B: Tensor) -> tuple[Tensor, Tensor]:
    """B with entries of at most 1, so that the squares stay inside float64's range; the factor."""
    size = B.abs().max()
    if not size > 0:
        size = torch.ones_like(size)
    return B / size, size


def _gram_route(B: Tensor) -> tuple[Tensor, Tensor]:
    """S and the side (rows) of a tall float64 matrix."""
    B, size = _scaled(B)
    eigenvalues, vectors = torch.linalg.eigh(gram(B))
    S = eigenvalues.flip(0).clamp_min(0).sqrt()
    return torch.where(S > GRAM_NOISE * S[0], S, 0.0) * size, vectors.T.flip(0)


def _both_sides(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V of a wide (or square) float64 matrix, both sides orthonormal."""
    S, side = _gram_route(A.T)
    U, live = side.T, S > 0
    W = A.T @ U / torch.where(live, S, 1.0)
    if not bool(live.all()):
        # Directions of zero weight still have to be orthonormal: QR completes the live ones.
        filler = torch.randn(W.shape, dtype=W.dtype, generator=torch.Generator().manual_seed(0))
        W = torch.where(live, W, filler)
    V, R = torch.linalg.qr(W)
    return U, S, V * torch.where(R.diagonal() < 0, -1.0, 1.0)


def _reduced(B: Tensor, G: Tensor, wanted: int) -> Side:
    """All values and no vectors yet, of a tall float32 matrix whose Gram matrix is G.

    Raises:
        ArithmeticError: many values are too small to be told apart and no leading vectors are
            wanted, or LAPACK fails.
    """
    reduction = reduced(G)
    S = reduction.eigenvalues.flip(0).clamp_min(0).sqrt().float()
    r = S.numel()
    clear = int((S > FAST_FLOOR * S[0]).sum())
    rough = r - clear > r // BLOCKS
    if rough and not wanted:
        raise ArithmeticError(f"{r - clear} of {r} singular values are small")
    if clear < r and not rough:
        rows = reduction.eigenvectors(clear, r)
        S = torch.cat([S[:clear], _small(B, rows, S[clear - 1])[0]])
    S = torch.where(S > FAST_NOISE * S[0], S, 0.0)
    X = _probes(r)
    noise = _rms(X @ G - reduction.times(X))
    return Side(torch.empty(0, r), S, noise, reduction, rough)


def _fast(B: Tensor, G: Tensor) -> tuple[Tensor, Tensor, float]:
    """S, the side (rows) and its noise, of a tall float32 matrix whose Gram matrix is G."""
    eigenvalues, vectors = torch.linalg.eigh(G)
    # LAPACK leaves the vectors column by column in memory: as rows they are in order.
    squares, rows = eigenvalues.flip(0).clamp_min(0), vectors.T.flip(0)
    S = squares.sqrt()
    noise = _noise(G, rows, squares)
    clear = int((S > FAST_FLOOR * S[0]).sum())
    if clear < S.numel():
        S, rows = _resolved(B, rows, S, clear)
    return torch.where(S > FAST_NOISE * S[0], S, 0.0), rows, noise


def _noise(G: Tensor, rows: Tensor, squares: Tensor) -> float:
    """Root mean square of the entries of Q G Qᵀ − diag(squares), from a few random probes.

    What the product G itself is off by is a tenth of what its eigenvectors are.
    """
    X = _probes(G.shape[0]).to(G.device)
    return _rms(X @ G - (squares * (X @ rows.T)) @ rows)


def _probes(n: int) -> Tensor:
    """Standard normal rows, :data:`PROBES` x n."""
    return torch.randn(PROBES, n, generator=torch.Generator().manual_seed(0))


def _rms(products: Tensor) -> float:
    """Root mean square of the entries of D from probes x as rows, each times D.

    E‖x D‖² = ‖D‖_F² for standard normal x (Hutchinson): no n x n product is needed.
    """
    return float(products.double().norm()) / PROBES**0.5 / products.shape[1]


def _resolved(B: Tensor, rows: Tensor, S: Tensor, clear: int) -> tuple[Tensor, Tensor]:
    """S and the rows with the directions after the first `clear` found again among themselves."""
    small, turn = _small(B, rows[clear:], S[clear - 1])
    return torch.cat([S[:clear], small]), torch.cat([rows[:clear], turn @ rows[clear:]])


def _small(B: Tensor, rows: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values of B within the span of some rows, and how the rows turn to their vectors."""
    eigenvalues, turn = torch.linalg.eigh(gram(B @ rows.T))
    values = eigenvalues.flip(0).clamp_min(0).sqrt()
    # Noise must not reorder the clear ones and those found again.
    return torch.minimum(values, most), turn.T.flip(0)
