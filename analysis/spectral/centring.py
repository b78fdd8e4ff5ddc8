"""When centring task vectors lowers their interference, and when it cannot.

Centring takes away what all tasks have in common, and puts −1/T of every task into all others.
Task vectors that have nothing in common become more alike by it: T independent ones get cosines
of −1/(T−1). So there is something to gain only where the common part is large enough.
"""

from __future__ import annotations

from functools import partial

import pandas as pd

from analysis.spectral.interference import Side, interference_pairs
from merge_core.factors.factorise import map_matrices
from merge_core.factors.low_rank import as_matrix, count_directions
from merge_core.progress import Progress
from merge_core.task_vectors import Origin, TensorGroup, TensorGroups

ORIGINS: tuple[Origin, Origin] = ("base", "average")


def common_share(group: TensorGroup, k: int) -> float:
    """How much of one task's leading directions all tasks have in common, in one matrix.

    The mean over pairs of two different tasks of ⟨τ_s, SVD_k(τ_t)⟩, over the mean of
    ‖SVD_k(τ_t)‖²: 0 for task vectors that are orthogonal there, 1 for equal ones, and without the
    1/T of every task that their mean carries in any case.

    Args:
        group: a decomposed parameter of at least two tasks, with a base.
        k: leading directions of each task vector about the base.

    Raises:
        SuiteError: no base.

    Example:
        >>> suite = load_suite("vision")
        >>> group = TensorGroup(suite, suite.tasks, "blocks.0.attn.proj.weight", FactorStore())
        >>> -1 < common_share(group, 20) < 1
        True
    """
    T = len(group.tasks)
    mean = as_matrix(group.average).double() - as_matrix(group.base).double()
    carried, energy = 0.0, 0.0
    for leading in group.directions("base", k):
        U, S, V = leading.U.double(), leading.S.double(), leading.V.double()
        carried += float((S * ((U.T @ mean) * V.T).sum(dim=1)).sum())
        energy += float((S**2).sum())
    return (T * carried / energy - 1) / (T - 1) if energy > 0 else 0.0


def centring_frame(
    groups: TensorGroups | TensorGroup,
    share: float,
    side: Side = "row",
    progress: Progress | None = None,
) -> pd.DataFrame:
    """What centring does to the interference of each matrix, beside what lets it help.

    Args:
        groups: the suite's parameters, or one of them; at least two tasks, with a base.
        share: share of the directions, in (0, 1].
        side: "row" or "column".
        progress: told after each matrix; cancels between two.

    Returns:
        One row per decomposed matrix: parameter, k, original and centred (the mean interference
        of a pair, see :func:`analysis.spectral.interference.interference_over_rank`), ratio
        (centred / original; NaN where nothing interferes), common (:func:`common_share`), needed
        (1/T, above which centring is expected to lower it).

    Raises:
        SuiteError: no base.
        Cancelled: by `progress`.

    Source: interference: CART, arXiv:2412.12153. The bound is a rule of thumb: cosines that
    centring makes are −1/(T−1) on average, and a common share above about that takes larger away.

    Example:
        >>> groups = TensorGroups(load_suite("vision"), ["digits", "dots", "lines"], FactorStore())
        >>> frame = centring_frame(groups, 0.08)
        >>> len(frame), frame["needed"].round(3).unique().tolist()
        (8, [0.333])
    """
    look = partial(_row, share=share, side=side)
    return pd.DataFrame(list(map_matrices(look, groups, progress)))


def _row(group: TensorGroup, share: float, side: Side) -> dict[str, object]:
    k = count_directions(share, min(group.info.matrix_shape))
    original, centred = (_mean_interference(group, origin, k, side) for origin in ORIGINS)
    return {
        "parameter": group.name,
        "k": k,
        "original": original,
        "centred": centred,
        "ratio": centred / original if original > 0 else float("nan"),
        "common": common_share(group, k),
        "needed": 1 / len(group.tasks),
    }


def _mean_interference(group: TensorGroup, origin: Origin, k: int, side: Side) -> float:
    """The mean interference of two different tasks."""
    pairs = interference_pairs(group, origin, k, side)
    return float(pairs.loc[pairs["first"] != pairs["second"], "interference"].mean())
