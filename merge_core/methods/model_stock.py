"""Model Stock: the average pulled towards the base by the angle between task vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_core.methods.declaration import Method, MethodParameters, Run
from merge_core.task_vectors import ParameterGroup


class ModelStockParameters(MethodParameters):
    """Model Stock has none: the angle decides."""


def ratio(tau: Tensor) -> float:
    """t = N cos θ / ((N − 1) cos θ + 1), with the mean pairwise cosine of the task vectors.

    Args:
        tau: N x entries, float64.

    Returns:
        In [0, 1]; 1 for one task vector, and 0 where the mean cosine is negative.
    """
    N = len(tau)
    if N == 1:
        return 1.0
    lengths = tau.norm(dim=1, keepdim=True)
    units = torch.where(lengths > 0, tau / lengths, 0.0)
    gram = units @ units.T
    cosine = float((gram.sum() - gram.diagonal().sum()) / (N * (N - 1)))
    cosine = min(1.0, max(0.0, cosine))
    return N * cosine / ((N - 1) * cosine + 1)


def merge(group: ParameterGroup, parameters: ModelStockParameters, run: Run) -> Tensor:
    """t θ_avg + (1 − t) θ_0 of one tensor."""
    tau = group.experts.double() - group.base.double()
    t = ratio(tau.reshape(len(tau), -1))
    return group.base + t * (group.average - group.base)


METHOD = Method(
    name="model_stock",
    title="Model Stock",
    place=22,
    summary="Pulls the average towards the base, tensor by tensor: all the way where the task "
    "vectors are orthogonal, not at all where they agree.",
    formula=r"\theta = t\, \theta_{avg} + (1 - t)\, \theta_0,\quad "
    r"t = \frac{T \cos\theta}{(T-1) \cos\theta + 1},\; "
    r"\cos\theta = \mathrm{mean}_{s<t} \cos(\tau_s, \tau_t)",
    source="Jang et al., Model Stock, arXiv:2403.19522, section 4",
    parameters=ModelStockParameters,
    merge=merge,
    origins=("base",),
    deviations="Written for experts of one task, whose task vectors meet at one angle: with more "
    "than two the mean pairwise cosine stands for it, and a negative one, which the paper's "
    "geometry excludes, counts as 0 (the base). One angle per tensor, biases included.",
)
