"""Interference as a share of what it can be, and the level that chance alone gives.

I_ij is at most √(I_ii I_jj), which is below 1 as soon as a task has more than one direction: a
task does not even share "all" with itself. Divided by it, 0 says that two tasks have no direction
in common, and 1 that they have the same directions with the same relative strengths.
"""

from __future__ import annotations

import numpy as np


def overlap_of(pairs: np.ndarray) -> np.ndarray:
    """I_ij / √(I_ii I_jj), in [0, 1] and 1 on the diagonal; 0 where a task vector is zero.

    With P_i = V_i S_i² V_iᵀ, I_ij² is the inner product of P_i and P_j, so that this is the root
    of their cosine.

    Args:
        pairs: T x T or T x T x r, of :func:`analysis.spectral.interference.pair_interference`.

    Example:
        >>> overlap_of(np.array([[0.5, 0.1], [0.1, 0.5]])).round(6).tolist()
        [[1.0, 0.2], [0.2, 1.0]]
    """
    own = np.sqrt(np.einsum("ii...->i...", pairs))
    most = own[:, None] * own[None, :]
    return np.divide(pairs, most, out=np.zeros_like(pairs), where=most > 0)


def random_overlap(pairs: np.ndarray, dimension: int) -> np.ndarray:
    """The overlap that each pair would have, were its directions turned at random.

    A random rotation makes the expected inner product of P_i and P_j, each of trace 1, one over
    the dimension; this is the root of that, divided as in :func:`overlap_of`.

    Args:
        pairs: T x T or T x T x r; its diagonal alone is used.
        dimension: of the space that the directions lie in.

    Example:
        >>> random_overlap(np.array([[0.5, 0.1], [0.1, 0.5]]), 100).round(6).tolist()
        [[1.0, 0.2], [0.2, 1.0]]
    """
    own = np.sqrt(np.einsum("ii...->i...", pairs))
    most = own[:, None] * own[None, :]
    level = np.divide(dimension**-0.5, most, out=np.zeros_like(pairs), where=most > 0)
    level[np.diag_indices(len(pairs))] = (own > 0).astype(float)
    return np.minimum(level, 1.0)
