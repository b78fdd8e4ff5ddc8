"""Interference as a share of what it can be, and the level that chance alone gives.

I_ij is at most √(I_ii I_jj), which is below 1 as soon as a task has more than one direction: a
task does not even share "all" with itself. Divided by it, 0 says that two tasks have no direction
in common, and 1 that they have the same directions with the same relative strengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.spectral.interference import Side, interference_pairs, pair_interference, stored_side
from merge_core.factors.factorise import map_matrices
from merge_core.factors.low_rank import count_directions
from merge_core.progress import Progress
from merge_core.task_vectors import Origin, TensorGroup, TensorGroups


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


def dimension_of(group: TensorGroup, side: Side) -> int:
    """The dimension of the space that a layer reads (rows) or writes (columns)."""
    return int(group.info.matrix_shape[1 if stored_side(group, side) == "row" else 0])


def overlap_pairs(group: TensorGroup, origin: Origin, k: int, side: Side = "row") -> pd.DataFrame:
    """The overlap of each pair of tasks in one matrix at one rank.

    Args:
        group: a decomposed parameter.
        origin: what the task vectors are taken about.
        k: directions kept, at least 1.
        side: "row" or "column".

    Returns:
        The frame of :func:`analysis.spectral.interference.interference_pairs` with overlap
        (I_ij / √(I_ii I_jj)) and random (its level for random directions).

    Raises:
        SuiteError: origin "base" without a base.

    Example:
        >>> suite = load_suite("demo")
        >>> name = "blocks.0.attn.proj.weight"
        >>> group = TensorGroup(suite, suite.tasks[:2], name, FactorStore())
        >>> frame = overlap_pairs(group, "base", k=8)
        >>> frame["overlap"].round(6).tolist()[::3]
        [1.0, 1.0]
    """
    frame = interference_pairs(group, origin, k, side)
    T = len(group.tasks)
    pairs = frame["interference"].to_numpy().reshape(T, T)
    level = random_overlap(pairs, dimension_of(group, side))
    return frame.assign(overlap=overlap_of(pairs).ravel(), random=level.ravel())


def mean_overlap_pairs(
    groups: TensorGroups,
    origin: Origin,
    share: float,
    side: Side = "row",
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The overlap of each pair of tasks, averaged over all decomposed matrices.

    Args:
        groups: the suite's parameters.
        origin: what the task vectors are taken about.
        share: of the directions of each matrix, in (0, 1].
        side: "row" or "column".
        progress: told after each matrix.

    Returns:
        One row per ordered pair: first, second, origin, k (mean), interference, overlap, random.

    Raises:
        SuiteError: origin "base" without a base.
        Cancelled: by `progress`.

    Example:
        >>> groups = TensorGroups(load_suite("demo"), ["digits", "dots"], FactorStore())
        >>> mean_overlap_pairs(groups, "base", 0.08)["k"].tolist()
        [20.0, 20.0, 20.0, 20.0]
    """

    def look(group: TensorGroup) -> pd.DataFrame:
        k = count_directions(share, min(group.info.matrix_shape))
        return overlap_pairs(group, origin, k, side)

    every = pd.concat(list(map_matrices(look, groups, progress)))
    keys = ["first", "second", "origin"]
    return every.groupby(keys, sort=False, as_index=False).mean(numeric_only=True)


def overlap_over_rank(
    groups: TensorGroups | TensorGroup,
    origin: Origin,
    shares: Sequence[float],
    side: Side = "row",
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The mean overlap of a pair over the rank, for every matrix.

    Args:
        groups: the suite's parameters (those not decomposed are passed over), or one of them.
        origin: what the task vectors are taken about.
        shares: of the directions, in (0, 1].
        side: "row" or "column".
        progress: told after each matrix.

    Returns:
        One row per parameter and share: parameter, origin, share, overlap and random, means over
        pairs of different tasks (0 for one task).

    Raises:
        SuiteError: origin "base" without a base.
        Cancelled: by `progress`.

    Example:
        >>> suite = load_suite("demo")
        >>> group = TensorGroup(suite, suite.tasks[:2], "blocks.0.attn.proj.weight", FactorStore())
        >>> len(overlap_over_rank(group, "base", [0.08, 1.0]))
        2
    """

    def look(group: TensorGroup) -> list[dict[str, object]]:
        r, T = min(group.info.matrix_shape), len(group.tasks)
        pairs = pair_interference(group.directions(origin), stored_side(group, side), r)
        others = ~np.eye(T, dtype=bool)
        levels = random_overlap(pairs, dimension_of(group, side))
        rows: list[dict[str, object]] = []
        for share in shares:
            at = count_directions(float(share), r) - 1
            mine, level = overlap_of(pairs[:, :, at])[others], levels[:, :, at][others]
            rows.append(
                {
                    "parameter": group.name,
                    "origin": origin,
                    "share": float(share),
                    "overlap": mine.mean() if mine.size else 0.0,
                    "random": level.mean() if level.size else 0.0,
                }
            )
        return rows

    return pd.DataFrame([row for rows in map_matrices(look, groups, progress) for row in rows])
