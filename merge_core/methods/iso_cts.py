"""Iso-CTS: common and task-specific directions under one singular value."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_core.factors.decomposition import leading_triplets
from merge_core.factors.low_rank import orthogonalize
from merge_core.methods.declaration import Method, MethodParameters, Run, parameter
from merge_core.methods.spectral import (
    AUTHORS_TENSORS,
    AVERAGED,
    DEAD,
    add_to_origin,
    task_matrices,
)
from merge_core.task_vectors import TensorGroup


class IsoCtsParameters(MethodParameters):
    """Parameters of Iso-CTS."""

    common: float = parameter(
        0.8,
        "Share of the directions taken from the summed task vector; the others are divided among "
        "the tasks. All of them give Iso-C.",
        minimum=0.0,
        maximum=1.0,
        typical="0.8",
    )
    scale: float = parameter(
        1.0,
        "Scaling coefficient α of the merged update.",
        minimum=-10,
        maximum=10,
        typical="1 to 1.5",
        show=(0, 3),
    )


def split(r: int, tasks: int, common: float) -> tuple[int, int]:
    """How r directions are divided: (common ones, those of each task).

    Each task gets round((r − floor(common·r)) / T), and at most r/T; the rest is common.

    Source: the authors' code, which keeps the tasks' shares equal; the cap is ours (their
    rounding can exceed r).
    """
    each = min(round((r - int(common * r + 1e-9)) / tasks), r // tasks)
    return r - tasks * each, each


def merge(group: TensorGroup, parameters: IsoCtsParameters, run: Run) -> Tensor:
    """θ_0 + α σ̄ U⊥ V⊥ᵀ of one matrix; the average of anything else."""
    if not group.decomposed:
        return group.average
    tau = task_matrices(group, run.origin)
    k, each = split(min(tau.shape[1:]), len(tau), parameters.common)
    U, S, Vh = torch.linalg.svd(tau.sum(dim=0), full_matrices=False)
    values, lefts, rights = [S[:k]], [], [Vh[:k].T]
    for matrix in tau if each else ():
        own, s, right = outside(matrix, U, k, each)
        lefts.append(own)
        values.append(s)
        rights.append(right)
    kept = torch.cat(values)
    # Directions without weight are arbitrary: they count in the mean but add nothing.
    live = kept > DEAD * torch.linalg.matrix_norm(tau).max()
    # The common left directions are orthonormal, and orthogonal to all others: of the nearest
    # orthonormal columns they are a part as they are.
    own = orthogonalize(torch.cat(lefts, dim=1) * live[k:]) if each else U[:, :0]
    left = torch.cat([U[:, :k] * live[:k], own], dim=1)
    right = orthogonalize(torch.cat(rights, dim=1) * live)
    return add_to_origin(group, run.origin, parameters.scale * kept.mean() * left @ right.T)


def outside(matrix: Tensor, U: Tensor, k: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of (I − U_c U_cᵀ) τ, U_c the first k columns of U.

    Args:
        matrix: τ, m x n.
        U: m x min(m, n), orthonormal columns.
        k: of them, how many are common.
        count: of triplets, at most min(m, n) − k.

    Returns:
        m x count, count values, and n x count.
    """
    if U.shape[0] == U.shape[1]:  # what is left of the space has few dimensions
        rest = U[:, k:]
        left, values, right = leading_triplets(rest.T @ matrix, count)
        return rest @ left, values, right
    common = U[:, :k]
    return leading_triplets(matrix - common @ (common.T @ matrix), count)


METHOD = Method(
    name="iso_cts",
    title="Iso-CTS",
    order=23,
    summary="Iso-C with the weakest common directions replaced by each task's strongest ones "
    "outside the common space, all made orthogonal and equally strong. What is not "
    "decomposed is averaged.",
    formula=r"\theta = \theta_0 + \alpha\, \bar\sigma\, U_\perp V_\perp^\top,\quad "
    r"U = [U_c^{(k)}\, U_1^{(n)} \cdots U_T^{(n)}],\; "
    r"\textstyle\sum_t \tau_t = U_c \Sigma_c V_c^\top,\; "
    r"(I - U_c U_c^\top)\tau_t = U_t \Sigma_t V_t^\top,\; n = (r-k)/T",
    source="Marczak et al., No task left behind: isotropic model merging, arXiv:2502.04959",
    parameters=IsoCtsParameters,
    merge=merge,
    origins=("base",),
    isotropic=True,
    averaged=AVERAGED,
    deviations="The number of directions of each task is rounded as in the authors' code, so the "
    "common share can differ a little from the one asked for. Directions of zero weight are left "
    "out. The published results are at an α chosen on validation data. " + AUTHORS_TENSORS,
)
