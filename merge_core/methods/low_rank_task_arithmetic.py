"""Low-rank Task Arithmetic: CART's counterpart about the base."""

from __future__ import annotations

from torch import Tensor

from merge_core.factors.low_rank import as_matrix, count_directions
from merge_core.methods.declaration import Method, MethodParameters, Rank, Run, parameter
from merge_core.methods.spectral import AVERAGED
from merge_core.task_vectors import TensorGroup


class LowRankTaskArithmeticParameters(MethodParameters):
    """Parameters of low-rank Task Arithmetic."""

    rank: Rank = parameter(
        0.08,
        "Directions kept of each task vector: a share of min(m, n), or a whole number. "
        "All of them give Task Arithmetic of the decomposed matrices; the rest stays averaged.",
        typical="0.08",
    )
    scale: float = parameter(
        0.3,
        "Scaling coefficient λ of the summed task vectors.",
        minimum=-10,
        maximum=10,
        typical="0.3 for 8 tasks",
        show=(0, 1.5),
    )


def merge(group: TensorGroup, parameters: LowRankTaskArithmeticParameters, run: Run) -> Tensor:
    """θ_0 + λ Σ_t SVD_k(τ_t) of one matrix; the average of anything else."""
    if not group.decomposed:
        return group.average
    k = count_directions(parameters.rank, min(as_matrix(group.base).shape))
    return group.base + parameters.scale * group.sum_of_truncations("base", k)


METHOD = Method(
    name="low_rank_task_arithmetic",
    title="Low-rank Task Arithmetic",
    order=3,
    summary="Task Arithmetic on task vectors cut to their leading directions: CART without the "
    "centring. What is not decomposed is averaged, as in CART.",
    formula=r"\theta = \theta_0 + \lambda \sum_t \mathrm{SVD}_k(\theta_t - \theta_0)",
    source="The uncentred comparison of CART, arXiv:2412.12153, section 4",
    parameters=LowRankTaskArithmeticParameters,
    merge=merge,
    origins=("base",),
    averaged=AVERAGED,
)
