"""Model Stock: the average pulled towards the base by the angle between task vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_core.methods.blockwise import gram
from merge_core.methods.declaration import Method, MethodParameters, Run
from merge_core.task_vectors import TensorGroup


class ModelStockParameters(MethodParameters):
    """Model Stock has none: the angle decides."""


def ratio(inner: Tensor) -> float:
    """t = N cos θ / ((N − 1) cos θ + 1), with the mean pairwise cosine of the task vectors.

    Args:
        inner: N x N, float64: the inner products of the task vectors.

    Returns:
        In [0, 1]; 1 for one task vector, and 0 where the mean cosine is negative.
    """
    N = len(inner)
    if N == 1:
        return 1.0
    lengths = inner.diagonal().sqrt()
    shares = torch.where(lengths > 0, 1 / lengths, 0.0)  # no angle with a zero vector
    cosines = inner * shares * shares[:, None]
    cosine = float((cosines.sum() - cosines.diagonal().sum()) / (N * (N - 1)))
    cosine = min(1.0, max(0.0, cosine))
    return N * cosine / ((N - 1) * cosine + 1)


def merge(group: TensorGroup, parameters: ModelStockParameters, run: Run) -> Tensor:
    """t θ_avg + (1 − t) θ_0 of one tensor."""
    t = ratio(gram(group, "base"))
    return (group.average - group.base).mul_(t).add_(group.base)  # in one tensor


METHOD = Method(
    name="model_stock",
    title="Model Stock",
    order=22,
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
