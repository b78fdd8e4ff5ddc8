"""CART-Indexing: each expert from the shared average and its own leading directions."""

from __future__ import annotations

from torch import Tensor

from merge_core.factors.low_rank import count_directions
from merge_core.methods.declaration import Method, MethodParameters, Rank, Run, parameter
from merge_core.methods.spectral import factored_bytes
from merge_core.task_vectors import TensorGroup


class CartIndexingParameters(MethodParameters):
    """Parameters of CART-Indexing."""

    rank: Rank = parameter(
        0.08,
        "Directions kept of each centred task vector: a share of min(m, n), or a whole number. "
        "More of them come closer to the expert and take more storage.",
        typical="0.08",
    )
    scale: float = parameter(
        1.0,
        "Scaling coefficient λ of what a task adds to the average; 1 reconstructs the expert.",
        minimum=-10,
        maximum=10,
        typical="1",
        show=(0, 3),
    )


def merge_for(
    group: TensorGroup, parameters: CartIndexingParameters, run: Run, index: int
) -> Tensor:
    """θ_avg + λ SVD_k(C_t) of one matrix; θ_avg + λ C_t of anything else."""
    residual = group.members[index] - group.average
    if group.decomposed:
        r = min(group.info.matrix_shape)
        k = count_directions(parameters.rank, r)
        if k < r:  # all directions are the residual itself, without the factors' rounding
            kept = group.truncations("average", k)[index].truncate(k)
            residual = kept.reshape(residual.shape).to(residual.dtype)
    return residual.mul_(parameters.scale).add_(group.average)


def storage(group: TensorGroup, parameters: CartIndexingParameters, run: Run) -> int:
    """θ_avg and k(m + n + 1) numbers a task of one matrix; each expert's own of the rest."""
    k = count_directions(parameters.rank, min(group.info.matrix_shape)) if group.decomposed else 0
    return factored_bytes(group, k)


METHOD = Method(
    name="cart_indexing",
    title="CART-Indexing",
    order=40,
    summary="One model per task, where the task is known at inference: the shared average and the "
    "task's own leading directions about it. What is not decomposed is the expert's own.",
    formula=r"\theta_t' = \theta_{avg} + \lambda\, \mathrm{SVD}_k(\theta_t - \theta_{avg})",
    source="Choi et al., Revisiting weight averaging for model merging, arXiv:2412.12153, "
    "CART-Indexing",
    parameters=CartIndexingParameters,
    merge_for=merge_for,
    storage=storage,
    origins=("average",),
    deviations="Storage counts θ_avg once, the factors of each task (or its whole matrix where "
    "that is smaller), and of what is not a matrix each expert's own, in two-byte numbers.",
)
