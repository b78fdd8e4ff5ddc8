"""Subspace Boosting: no direction of a merged update much weaker than the leading ones."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_core.factors.decomposition import decompose
from merge_core.factors.low_rank import as_matrix, resolution
from merge_core.methods.declaration import MethodParameters, Postprocessor, Run, parameter
from merge_core.methods.spectral import DEAD
from merge_core.task_vectors import TensorGroup


class SubspaceBoostingParameters(MethodParameters):
    """Parameters of Subspace Boosting."""

    beta: float = parameter(
        0.01,
        "Share of the sum of the singular values at which the cut lies: all later values are "
        "raised to the one there. 0 makes all of them equal to the first, 1 changes nothing.",
        minimum=0.0,
        maximum=1.0,
        typical="0 to 0.02",
        show=(0, 0.2),
    )


def apply(
    group: TensorGroup, update: Tensor, parameters: SubspaceBoostingParameters, run: Run
) -> Tensor:
    """U max(Σ, σ_k) Vᵀ of one update, k the first place where Σ_{i≤k} σ_i reaches β Σ σ_i."""
    matrix = as_matrix(update)
    factors = decompose(matrix)
    if factors.rank == 0:
        return update
    reached = factors.S.cumsum(dim=0)
    value = factors.S[(reached >= parameters.beta * reached[-1]).int().argmax()]
    # What rounding left is no direction of the update: raised, it would be noise at full strength.
    # Factors are kept in float32, so an update of float64 weights may be rounded to that.
    weights = as_matrix(group.origin(run.origin) + update)
    noise = max(resolution(weights), resolution(matrix.float()), DEAD * float(factors.S[0]))
    raised = torch.where(factors.S > noise, factors.S.clamp_min(value), factors.S)
    return ((factors.U * raised) @ factors.V.T).to(update.dtype).reshape(update.shape)


POSTPROCESSOR = Postprocessor(
    name="subspace_boosting",
    title="Subspace Boosting",
    order=10,
    summary="Raises the small singular values of a merged update to the one at which the "
    "cumulative sum reaches β, so that tasks outside the leading directions are heard.",
    formula=r"\Delta' = U \max(\Sigma, \sigma_k) V^\top,\quad \Delta = U \Sigma V^\top,\; "
    r"k = \min\{k : \textstyle\sum_{i \le k} \sigma_i \ge \beta \sum_i \sigma_i\}",
    source="Skorobogat et al., Subspace-boosted model merging, arXiv:2506.16506",
    parameters=SubspaceBoostingParameters,
    apply=apply,
    isotropic=lambda parameters: parameters.beta < 1,
    deviations="Singular values at the level of the weights' rounding (ε times the norms of the "
    "longest row and column together) are not raised, so the update of a low-rank method keeps its "
    "rank. One β for all matrices, and a "
    "fused qkv is one matrix.",
)
