"""Overlap of each pair of tasks at one rank, of one matrix or as a mean over all."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analysis.spectral.interference import Side, dimension_of, interference_pairs
from analysis.spectral.overlap import overlap_of, random_overlap
from merge_core.factors.factorise import map_matrices
from merge_core.factors.low_rank import count_directions
from merge_core.progress import Progress
from merge_core.task_vectors import Origin, TensorGroup, TensorGroups


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
        >>> suite = load_suite("vision")
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
        >>> groups = TensorGroups(load_suite("vision"), ["digits", "dots"], FactorStore())
        >>> mean_overlap_pairs(groups, "base", 0.08)["k"].tolist()
        [20.0, 20.0, 20.0, 20.0]
    """

    def look(group: TensorGroup) -> pd.DataFrame:
        k = count_directions(share, min(group.info.matrix_shape))
        return overlap_pairs(group, origin, k, side)

    return average_pairs(list(map_matrices(look, groups, progress)))


def average_pairs(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The mean over matrices of the overlap of each pair.

    Args:
        frames: of :func:`overlap_pairs`, one a matrix, about one origin.

    Returns:
        The frame of :func:`mean_overlap_pairs`.

    Example:
        >>> rows = {"first": ["a"], "second": ["a"], "origin": ["base"]}
        >>> frames = [pd.DataFrame({**rows, "k": [k], "overlap": [1.0]}) for k in (2, 4)]
        >>> average_pairs(frames)["k"].tolist()
        [3.0]
    """
    keys = ["first", "second", "origin"]
    return pd.concat(frames).groupby(keys, sort=False, as_index=False).mean(numeric_only=True)
