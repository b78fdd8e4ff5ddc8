"""TSV-C: each task vector compressed to its leading 1/T of directions."""

from __future__ import annotations

from torch import Tensor

from merge_core.methods.declaration import Method, MethodParameters, Run
from merge_core.methods.spectral import AUTHORS_TENSORS, factored_bytes
from merge_core.task_vectors import TensorGroup


class TsvCParameters(MethodParameters):
    """TSV-C has none: the number of tasks sets the rank."""


def kept_rank(group: TensorGroup) -> int:
    """k = max(1, floor(r / T)) directions of each task."""
    return max(1, min(group.info.matrix_shape) // len(group.tasks))


def merge_for(group: TensorGroup, parameters: TsvCParameters, run: Run, index: int) -> Tensor:
    """θ_0 + SVD_k(τ_t) of one matrix; the expert's own of anything else."""
    if not group.decomposed or kept_rank(group) == min(group.info.matrix_shape):
        return group.members[index]
    k = kept_rank(group)
    update = group.truncations("base", k)[index].truncate(k)
    return group.base + update.reshape(group.base.shape).to(group.base.dtype)


def storage(group: TensorGroup, parameters: TsvCParameters, run: Run) -> int:
    """θ_0 and k(m + n + 1) numbers a task of one matrix; each expert's own of the rest."""
    return factored_bytes(group, kept_rank(group) if group.decomposed else 0)


METHOD = Method(
    name="tsv_c",
    title="TSV-C",
    order=41,
    summary="One model per task, where the task is known at inference: the base and the leading "
    "1/T of the task vector's directions. What is not decomposed is the expert's own.",
    formula=r"\theta_t' = \theta_0 + \mathrm{SVD}_k(\theta_t - \theta_0),\quad "
    r"k = \lfloor r/T \rfloor",
    source="Gargiulo et al., Task singular vectors, arXiv:2412.00081, TSV-Compress",
    parameters=TsvCParameters,
    merge_for=merge_for,
    storage=storage,
    origins=("base",),
    deviations="At least one direction is kept where T exceeds r (the authors' code then keeps "
    f"none). {AUTHORS_TENSORS} Storage counts θ_0 once, the "
    "factors of each task (or its whole matrix where that is smaller), and of what is not a matrix "
    "each expert's own, in two-byte numbers.",
)
