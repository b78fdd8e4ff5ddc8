"""TSV-M: task singular vectors, orthogonalised across tasks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from merge_core.factors.low_rank import DIRECTION_NOISE, Directions, orthogonalize
from merge_core.methods.declaration import (
    Method,
    MethodParameters,
    Run,
    parameter,
    warn_unmoved,
)
from merge_core.methods.spectral import AUTHORS_TENSORS, AVERAGED, orient, task_matrices
from merge_core.task_vectors import TensorGroup


class TsvMParameters(MethodParameters):
    """Parameters of TSV-M."""

    scale: float = parameter(
        1.0,
        "Scaling coefficient α of the merged update.",
        minimum=-10,
        maximum=10,
        typical="1",
        show=(0, 3),
    )
    directions: Literal["resolved", "all"] = parameter(
        "resolved",
        "Which of each task's directions take part: those that the stored numbers resolve, one at "
        "least; or all of the first floor(r/T), as in the authors' code: none where T exceeds r, "
        "and in a matrix of lower rank directions that rounding chose, which then count fully.",
        later=True,
    )


def merge(group: TensorGroup, parameters: TsvMParameters, run: Run) -> Tensor:
    """θ_0 + α U⊥ Σ V⊥ᵀ of one matrix; the average of anything else.

    Each task keeps k = max(1, floor(r/T)) triplets, concatenated and orthogonalised; fewer where
    its stored numbers do not resolve more.
    """
    if not group.decomposed:
        return group.average
    k = min(group.info.matrix_shape) // len(group.tasks)
    if parameters.directions == "all":
        kept, noise = leading_triplets(task_matrices(group, run.origin), k), 0.0
    else:
        kept, noise = group.directions(run.origin, max(1, k)), DIRECTION_NOISE
    S = torch.cat([own.S for own in kept]).double()
    U = orthogonalize(torch.cat([own.U for own in kept], dim=1).double(), noise)
    V = orthogonalize(torch.cat([own.V for own in kept], dim=1).double(), noise)
    origin = group.origin(run.origin)
    update = ((U * S) @ V.T).to(origin.dtype)
    if parameters.directions == "all":  # outputs x inputs
        update = orient(group, update)
    return origin + parameters.scale * update.reshape(origin.shape)


def leading_triplets(tau: Tensor, k: int) -> list[Directions]:
    """The first k singular triplets of each of T x m x n matrices, whatever their values."""
    triplets = (torch.linalg.svd(matrix, full_matrices=False) for matrix in tau)
    return [Directions(U, S, Vh.T).head(k) for U, S, Vh in triplets]


def warnings(tasks: int, parameters: TsvMParameters | None, run: Run | None = None) -> list[str]:
    """About the average two tasks have the same directions, with opposite signs."""
    if tasks == 2 and run is not None and run.cancels:
        return [
            warn_unmoved(
                "TSV-M",
                "the two centred task vectors are each other's negative, and so "
                "are their directions",
            )
        ]
    return []


METHOD = Method(
    name="tsv_m",
    title="TSV-M",
    order=4,
    summary="Keeps the leading 1/T of each task's singular vectors and makes them orthogonal to "
    "each other before adding them up. What is not decomposed is averaged.",
    formula=r"\theta = \theta_0 + \alpha\, U_\perp \Sigma V_\perp^\top,\quad "
    r"U_\perp = PQ^\top \text{ of } [U_1^{(k)} \cdots U_T^{(k)}] = PDQ^\top,\; "
    r"k = \lfloor r/T \rfloor",
    source="Gargiulo et al., Task singular vectors, arXiv:2412.00081, algorithm 1",
    parameters=TsvMParameters,
    merge=merge,
    origins=("base", "average"),
    averaged=AVERAGED,
    deviations="Directions that the stored numbers do not resolve are left out, and one is kept at "
    "least; the authors' code takes floor(r/T) of each task, which can be none, and keeps "
    f"directions without weight: directions = all. {AUTHORS_TENSORS}",
    revisions={"average": 1},
    warnings=warnings,
)
