"""KnOTS: task vectors merged in the basis that a joint decomposition gives them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from merge_core.factors.decomposition import decompose
from merge_core.factors.low_rank import resolution
from merge_core.methods.declaration import Method, MethodParameters, Run, parameter
from merge_core.methods.selection import count_kept
from merge_core.methods.sparse import combine, elect_signs
from merge_core.methods.spectral import AVERAGED, DEAD, add_to_origin, task_matrices
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


def trim(parts: Tensor, density: float) -> Tensor:
    """T x r x n: the largest entries of each task's part (ties kept), others zero."""
    size = parts.abs().flatten(1)
    keep = count_kept(density, size.shape[1])
    if keep == 0:
        return torch.zeros_like(parts)
    limit = size.kthvalue(size.shape[1] - keep + 1, dim=1).values
    return torch.where(parts.abs() >= limit[:, None, None], parts, 0.0)


def merge(group: TensorGroup, parameters: KnotsParameters, run: Run) -> Tensor:
    """θ_0 + λ U Σ merge(V_1 … V_T)ᵀ of one matrix; the average of anything else."""
    if not group.decomposed:
        return group.average
    tau = task_matrices(group, run.origin)
    tasks, m, n = tau.shape
    weights = group.experts.reshape(tasks, m, n).transpose(0, 1).reshape(m, tasks * n)
    # Rounding has directions too, of unit length in V.
    joint = decompose(tau.transpose(0, 1).reshape(m, tasks * n), resolution(weights))
    U, S, V = joint.U, joint.S, joint.V
    # Zeros of a task vector are zeros of its V_t but for rounding, which must not vote.
    V = torch.where(V.abs() > DEAD, V, 0.0)
    parts = V.T.reshape(-1, tasks, n).transpose(0, 1)
    if parameters.variant == "code":
        parts = S[:, None] * parts
    else:
        U = U * S
    if parameters.rule == "ties":
        parts = elect_signs(trim(parts, parameters.density))
    merged = combine(parts, "mean" if parameters.rule == "ties" else "sum")
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
