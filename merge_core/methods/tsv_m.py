"""TSV-M: task singular vectors, orthogonalised across tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_core.factors.low_rank import DIRECTION_NOISE, orthogonalize
from merge_core.methods.declaration import (
    Method,
    MethodParameters,
    Run,
    parameter,
    warn_unmoved,
)
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


def merge(group: TensorGroup, parameters: TsvMParameters, run: Run) -> Tensor:
    """θ_0 + α U⊥ Σ V⊥ᵀ of one matrix; the average of anything else.

    Each task keeps k = max(1, floor(r/T)) triplets, concatenated and orthogonalised; fewer where
    its stored numbers do not resolve more.
    """
    if not group.decomposed:
        return group.average
    k = max(1, min(group.info.matrix_shape) // len(group.tasks))
    kept = group.directions(run.origin, k)
    S = torch.cat([own.S for own in kept]).double()
    U = orthogonalize(torch.cat([own.U for own in kept], dim=1).double(), DIRECTION_NOISE)
    V = orthogonalize(torch.cat([own.V for own in kept], dim=1).double(), DIRECTION_NOISE)
    origin = group.origin(run.origin)
    update = ((U * S) @ V.T).to(origin.dtype).reshape(origin.shape)
    return origin + parameters.scale * update


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
    "each other before adding them up. What is not a weight matrix is averaged.",
    formula=r"\theta = \theta_0 + \alpha\, U_\perp \Sigma V_\perp^\top,\quad "
    r"U_\perp = PQ^\top \text{ of } [U_1^{(k)} \cdots U_T^{(k)}] = PDQ^\top,\; "
    r"k = \lfloor r/T \rfloor",
    source="Gargiulo et al., Task singular vectors, arXiv:2412.00081, algorithm 1",
    parameters=TsvMParameters,
    merge=merge,
    origins=("base", "average"),
    averaged="everything but the weight matrices of attention and MLP",
    revisions={"average": 1},
    warnings=warnings,
)
