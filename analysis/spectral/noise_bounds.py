"""Where noise ends in a spectrum: the Marchenko-Pastur edge and the Gavish-Donoho cut.

Both suppose that a matrix is a low-rank signal plus independent noise of one variance s², and
both estimate s from the median singular value. Fine-tuning updates only approximate this: their
noise is neither independent nor of one variance, and where more than half of the directions
carry signal the median, and with it both bounds, is too high. Centring leaves (T−1)/T of the
noise variance and ties the T centred task vectors together. Read the bounds as orientation.

Notation: a matrix is m x n, r = min(m, n), N = max(m, n), β = r/N, S its r singular values.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def as_array(S: Tensor | ArrayLike) -> np.ndarray:
    """Singular values as a float64 array, from a tensor or anything array-like.

    Example:
        >>> as_array(torch.tensor([2.0, 1.0])).tolist()
        [2.0, 1.0]
    """
    if isinstance(S, Tensor):
        return S.detach().to(torch.float64).cpu().numpy()
    return np.asarray(S, dtype=np.float64)


@lru_cache(maxsize=1024)
def marchenko_pastur_median(beta: float) -> float:
    """Median μ_β of the Marchenko-Pastur law with unit variance.

    Args:
        beta: aspect ratio r/N in (0, 1].

    Returns:
        μ_β: the median eigenvalue of X Xᵀ / N, X an r x N matrix of independent entries of
        variance 1, as both grow; in [(1 − √β)², (1 + √β)²].

    Raises:
        ValueError: beta outside (0, 1].

    Source: Gavish and Donoho, arXiv:1305.5870, the median of the Marchenko-Pastur density.

    Example:
        >>> round(marchenko_pastur_median(1.0), 3)
        0.653
    """
    from scipy.integrate import quad  # late: they take half a second
    from scipy.optimize import brentq

    if not 0 < beta <= 1:
        raise ValueError(f"beta is {beta}; the ratio of the sides lies in (0, 1]")
    root = math.sqrt(beta)

    # x = 1 + β + 2√β·cos φ takes the square-root ends out of the density: what is left is smooth.
    def density(phi: float) -> float:
        return 2 / math.pi * math.sin(phi) ** 2 / (1 + beta + 2 * root * math.cos(phi))

    half = brentq(lambda phi: quad(density, 0, phi)[0] - 0.5, 0, math.pi, xtol=1e-13)
    return 1 + beta + 2 * root * math.cos(half)


def noise_scale(S: Tensor | ArrayLike, m: int, n: int) -> float:
    """Standard deviation s of the noise: median(σ) / √(μ_β·N).

    Args:
        S: all r singular values of an m x n matrix.
        m: rows.
        n: columns.

    Returns:
        s, in the entries' unit; 0 where at least half of the singular values are 0.

    Example:
        >>> noise = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
        >>> round(noise_scale(torch.linalg.svdvals(noise), 300, 200), 1)
        1.0
    """
    long, short = max(m, n), min(m, n)
    return float(np.median(as_array(S))) / math.sqrt(marchenko_pastur_median(short / long) * long)


def noise_edge(S: Tensor | ArrayLike, m: int, n: int) -> float:
    """Marchenko-Pastur edge s·(√m + √n): the largest singular value that noise alone reaches.

    Args:
        S: all r singular values of an m x n matrix.
        m: rows.
        n: columns.

    Returns:
        The edge, in the unit of S. Finite matrices pass it by about N^(-2/3) of its size.

    Source: Marchenko and Pastur, 1967; the estimate of s as in :func:`noise_scale`.

    Example:
        >>> S = [100.0, 50.0, *[1.0] * 98]  # two directions stand out
        >>> sum(sigma > noise_edge(S, 100, 100) for sigma in S)
        2
    """
    return noise_scale(S, m, n) * (math.sqrt(m) + math.sqrt(n))


def gavish_donoho_cut(S: Tensor | ArrayLike, m: int, n: int) -> float:
    """Gavish-Donoho hard threshold ω(β)·median(σ) for noise of unknown variance.

    Keeping the singular values above it minimises the worst-case mean squared error.

    Args:
        S: all r singular values of an m x n matrix.
        m: rows.
        n: columns.

    Returns:
        The threshold, in the unit of S. ω(β) = λ(β)/√μ_β exactly, rather than its cubic
        approximation 0.56β³ − 0.95β² + 1.82β + 1.43.

    Source: arXiv:1305.5870, λ(β) for known noise and ω(β) for unknown noise.

    Example:
        >>> round(gavish_donoho_cut([1.0] * 100, 100, 100), 3)  # 2.858 times the median of a square
        2.858
    """
    long, short = max(m, n), min(m, n)
    beta = short / long
    spread = beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)
    known = math.sqrt(2 * (beta + 1) + 8 * beta / spread)
    return known * math.sqrt(long) * noise_scale(S, m, n)
