"""CART: low-rank centred task vectors added to the average."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_core.factors.low_rank import as_matrix, count_directions
from merge_core.methods.declaration import Method, MethodParameters, Rank, Run, parameter
from merge_core.methods.spectral import AVERAGED
from merge_core.task_vectors import TensorGroup


class CartParameters(MethodParameters):
    """Parameters of CART."""

    rank: Rank = parameter(
        0.08,
        "Directions kept of each centred task vector: a share of min(m, n), or a whole number. "
        "Too few lose the task; with more and more of them the centred vectors cancel, and all of "
        "them give the average.",
        typical="0.08 (paper); 0.12 to 0.32 as shipped",
    )
    scale: float = parameter(
        1.0,
        "Scaling coefficient λ of the kept directions; 0 gives the average.",
        minimum=-10,
        maximum=10,
        typical="1 (paper); 1 to 3 as shipped",
        show=(0, 8),
    )


def merge(group: TensorGroup, parameters: CartParameters, run: Run) -> Tensor:
    """θ_avg + λ Σ_t SVD_k(C_t) of one matrix; the average of anything else."""
    if not group.decomposed:
        return group.average
    k = count_directions(parameters.rank, min(as_matrix(group.average).shape))
    update = group.sum_of_truncations("average", k)
    return torch.add(group.average, update, alpha=parameters.scale)


def warnings(tasks: int, parameters: CartParameters | None, run: Run | None = None) -> list[str]:
    """CART with two tasks is the average: C_1 = −C_2, and so are their truncations."""
    if tasks == 2:
        return [
            "With two tasks CART equals the weight average for every rank and scale: the two "
            "centred task vectors are each other's negative. Choose three tasks or more."
        ]
    if tasks == 1:
        return ["With one task CART gives the expert itself: there is nothing to merge."]
    return []


METHOD = Method(
    name="cart",
    title="CART",
    order=6,
    summary="Adds the low-rank parts of the task vectors centred at the average back to the "
    "average: what is strongest in each task is kept, the rest is left out.",
    formula=r"\theta = \theta_{avg} + \lambda \sum_t \mathrm{SVD}_k(\theta_t - \theta_{avg})",
    source="Choi et al., Revisiting weight averaging for model merging, arXiv:2412.12153",
    parameters=CartParameters,
    merge=merge,
    origins=("average",),
    averaged=AVERAGED,
    warnings=warnings,
)
