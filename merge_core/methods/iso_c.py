"""Iso-C: the summed task vector with an isotropic spectrum."""

from __future__ import annotations

from torch import Tensor

from merge_core.factors.decomposition import decompose
from merge_core.factors.low_rank import as_matrix
from merge_core.methods.declaration import Method, MethodParameters, Run, parameter
from merge_core.methods.spectral import AUTHORS_TENSORS, AVERAGED
from merge_core.task_vectors import TensorGroup


class IsoCParameters(MethodParameters):
    """Parameters of Iso-C."""

    scale: float = parameter(
        1.0,
        "Scaling coefficient α of the merged update.",
        minimum=-10,
        maximum=10,
        typical="1 to 1.5",
        show=(0, 3),
    )


def merge(group: TensorGroup, parameters: IsoCParameters, run: Run) -> Tensor:
    """θ_0 + α σ̄ U Vᵀ of one matrix, from Σ τ_t = U Σ Vᵀ; the average of anything else."""
    if not group.decomposed:
        return group.average
    total = as_matrix(group.experts.double().sum(dim=0) - len(group.tasks) * group.base.double())
    found = decompose(total)
    update = found.S.sum() / min(total.shape) * found.U @ found.V.T
    return group.base + parameters.scale * update.to(group.base.dtype).reshape(group.base.shape)


METHOD = Method(
    name="iso_c",
    title="Iso-C",
    order=5,
    summary="Replaces every singular value of the summed task vectors by their mean, so that no "
    "task's directions dominate. What is not decomposed is averaged.",
    formula=r"\theta = \theta_0 + \alpha\, \bar\sigma\, U V^\top,\quad "
    r"\sum_t \tau_t = U \Sigma V^\top,\; \bar\sigma = \tfrac{1}{r} \sum_i \sigma_i",
    source="Marczak et al., No task left behind: isotropic model merging, arXiv:2502.04959",
    parameters=IsoCParameters,
    merge=merge,
    origins=("base",),
    isotropic=True,
    averaged=AVERAGED,
    deviations="Directions whose singular value float64 cannot tell from zero add nothing. "
    + AUTHORS_TENSORS,
)
