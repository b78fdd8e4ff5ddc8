"""KnOTS: task vectors merged in the basis that a joint decomposition gives them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from merge_core.factors.decomposition import decompose
from merge_core.factors.low_rank import ORTHONORMAL, as_matrix
from merge_core.methods.blockwise import BLOCK
from merge_core.methods.declaration import Method, MethodParameters, Run, parameter
from merge_core.methods.selection import count_kept, kth_of_rows
from merge_core.methods.sparse import combine, elect_signs
from merge_core.methods.spectral import AVERAGED, DEAD, add_to_origin, orient
from merge_core.task_vectors import TensorGroup


class KnotsParameters(MethodParameters):
    """Parameters of KnOTS."""

    rule: Literal["ties", "task_arithmetic"] = parameter(
        "ties",
        "How the tasks' parts are merged: trim, elect and mean as in TIES, or their sum as in Task "
        "Arithmetic (which gives Task Arithmetic of these matrices: the sum does not depend on the "
        "basis).",
    )
    variant: Literal["paper", "code"] = parameter(
        "paper",
        "What is merged: the V_t (the paper), where every direction counts alike in trimming, or "
        "Σ V_t (the authors' configurations), where strong directions count more.",
    )
    density: float = parameter(
        0.2,
        "Share of the largest entries kept of each task's part, of TIES only.",
        minimum=0.0,
        maximum=1.0,
        typical="0.2",
        show=(0.01, 1),
    )
    scale: float = parameter(
        1.0,
        "Scaling coefficient λ of the merged update.",
        minimum=-10,
        maximum=10,
        typical="0.6 with TIES (as shipped); 0.3 with Task Arithmetic of 8 tasks",
        show=(0, 3),
    )


def side_by_side(group: TensorGroup) -> Tensor:
    """m x T x n, float64: the task vectors about the base as exact matrices (out x in)."""
    base = orient(group, as_matrix(group.base)).double()
    joint = base.new_empty(len(base), len(group.tasks), base.shape[1])
    for t, member in enumerate(group.members):
        joint[:, t] = orient(group, as_matrix(member))
    return joint.sub_(base[:, None])


def joint_resolution(group: TensorGroup) -> float:
    """See :func:`merge_core.factors.low_rank.resolution`, of all experts' weights side by side."""
    rows, column = torch.zeros(()).double(), 0.0
    for member in group.members:
        squares = orient(group, as_matrix(member)).double().square()
        rows = rows + squares.sum(dim=1)
        column = max(column, float(squares.sum(dim=0).max()))
    return torch.finfo(group.widest_dtype(None)).eps * (float(rows.max()) ** 0.5 + column**0.5)


def merge_ties(parts: Tensor, density: float) -> Tensor:
    """r x n: the mean of each entry's trimmed values of the elected sign.

    Args:
        parts: T x r x n.
        density: share of the largest entries of each task's part that stay (ties kept).
    """
    tasks, r, n = parts.shape
    keep = count_kept(density, r * n)
    merged = parts.new_zeros(r, n)
    if keep == 0:
        return merged
    limit = kth_of_rows(parts.abs().reshape(tasks, -1), keep)[:, None]
    few = max(1, BLOCK // n)
    for start in range(0, r, few):
        block = parts[:, start : start + few].reshape(tasks, -1)
        kept = block * (block.abs() >= limit).to(block.dtype)
        merged[start : start + few] = combine(elect_signs(kept), "mean").reshape(-1, n)
    return merged


def merge(group: TensorGroup, parameters: KnotsParameters, run: Run) -> Tensor:
    """θ_0 + λ U Σ merge(V_1 … V_T)ᵀ of one matrix; the average of anything else."""
    if not group.decomposed:
        return group.average
    joint = side_by_side(group)
    m, tasks, n = joint.shape
    # Rounding has directions too, of unit length in V.
    found = decompose(joint.reshape(m, tasks * n), joint_resolution(group), ORTHONORMAL)
    U, S = found.U, found.S
    # Zeros of a task vector are zeros of its V_t but for rounding, which must not vote.
    V = torch.nn.functional.hardshrink(found.V.T, DEAD)
    parts = V.reshape(-1, tasks, n).transpose(0, 1)
    if parameters.variant == "code":
        parts = S[:, None] * parts
    else:
        U = U * S
    ties = parameters.rule == "ties"
    merged = merge_ties(parts, parameters.density) if ties else combine(parts, "sum")
    return add_to_origin(group, run.origin, parameters.scale * U @ merged)


METHOD = Method(
    name="knots",
    title="KnOTS",
    order=25,
    summary="Decomposes all task vectors of a matrix side by side, merges their parts in the "
    "common basis, and rebuilds. Made for low-rank (LoRA) updates; works on any. What is not "
    "decomposed is averaged.",
    formula=r"\theta = \theta_0 + \lambda\, U \Sigma\, \mathrm{merge}(V_1, \ldots, V_T)^\top,\quad "
    r"[\tau_1 \cdots \tau_T] = U \Sigma\, [V_1^\top \cdots V_T^\top]",
    source="Stoica et al., Model merging with SVD to tie the knots, arXiv:2410.19735",
    parameters=KnotsParameters,
    merge=merge,
    origins=("base",),
    averaged=AVERAGED,
    deviations="The paper's text merges the V_t; the authors' configurations merge Σ V_t (variant "
    "= code). Trims within each matrix, where the authors trim over all layers together. "
    "Directions at the level of the weights' rounding are left out (the authors: σ ≤ 1e-5).",
)
