"""Karcher mean: the mean direction on the sphere at the mean length."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_core.methods.blockwise import gram, weighted_sum
from merge_core.methods.declaration import Method, MethodParameters, Run, parameter
from merge_core.task_vectors import TensorGroup

# Units that cancel to less than this have no mean direction.
NO_DIRECTION = 1e-12
# Eigenvalues of a Gram matrix below this share of the largest are rounding noise of float64.
ROUNDING = 1e-14


class KarcherParameters(MethodParameters):
    """Parameters of the Karcher mean."""

    iterations: int = parameter(
        50,
        "Most steps towards the mean direction; more of them are only needed for experts far "
        "apart.",
        minimum=1,
        maximum=10_000,
        typical="10 (mergekit)",
        show=(1, 100),
    )
    tolerance: float = parameter(
        1e-10,
        "Length of a step, in radians, below which the direction counts as found.",
        minimum=0.0,
        maximum=1.0,
        typical="1e-5 (mergekit)",
        show=(0, 1e-3),
    )


def mean_direction(units: Tensor, iterations: int, tolerance: float) -> Tensor | None:
    """The unit vector with the smallest sum of squared angles to the given ones.

    Args:
        units: N x entries, unit length, float64.
        iterations: most steps.
        tolerance: stop after a step shorter than this (radians).

    Returns:
        entries, or None where the units cancel (no mean direction exists).

    Source: Karcher mean by gradient descent with unit step: u ← exp_u(mean of log_u(unit_t)).
    """
    mean = units.mean(dim=0)
    if mean.norm() <= NO_DIRECTION:
        return None
    mean = mean / mean.norm()
    for _ in range(iterations):
        cosine = units @ mean
        across = units - cosine[:, None] * mean
        sine = across.norm(dim=1)
        # log_u: along what is orthogonal to u, as long as the angle. At u and at its antipode
        # nothing is, and the step is zero.
        ratio = torch.where(sine > 0, torch.atan2(sine, cosine) / sine, 0.0)
        step = (ratio[:, None] * across).mean(dim=0)
        length = step.norm()
        if length == 0:
            break
        mean = length.cos() * mean + length.sin() * step / length
        mean = mean / mean.norm()
        if length <= tolerance:
            break
    return mean


def merge(group: TensorGroup, parameters: KarcherParameters, run: Run) -> Tensor:
    """Mean length times mean direction of one tensor over the experts."""
    inner = gram(group)
    lengths = inner.diagonal().sqrt()
    some = lengths > 0
    if not bool(some.any()):
        return group.average
    cosines = inner[some][:, some] / lengths[some] / lengths[some, None]
    # The mean direction lies in the span of the units, where these have coordinates √Λ Qᵀ in the
    # orthonormal basis that their Gram matrix Q Λ Qᵀ gives.
    values, vectors = torch.linalg.eigh(cosines)
    live = values > ROUNDING * values[-1]
    axes, roots = vectors[:, live], values[live].sqrt()
    mean = mean_direction(axes * roots, parameters.iterations, parameters.tolerance)
    if mean is None:
        return group.average
    weights = torch.zeros_like(lengths)
    weights[some] = lengths.mean() * (axes @ (mean / roots)) / lengths[some]
    return weighted_sum(group, weights)


METHOD = Method(
    name="karcher",
    title="Karcher mean",
    order=21,
    summary="The mean of the experts' directions on the sphere, tensor by tensor, at the mean of "
    "their lengths: SLERP's midpoint for any number of experts. It needs no base.",
    formula=r"\theta = \tfrac{1}{T} \sum_t \|\theta_t\| \cdot \arg\min_{\|u\|=1} "
    r"\sum_t \arccos^2 \left\langle u, \frac{\theta_t}{\|\theta_t\|} \right\rangle",
    source="Karcher, Riemannian center of mass, 1977; on weights as in mergekit, arXiv:2403.13257",
    parameters=KarcherParameters,
    merge=merge,
    deviations="Equals SLERP's midpoint for two tensors of one length; where lengths differ, SLERP "
    "leans to the longer one. A zero tensor counts for the length but has no direction; where the "
    "directions cancel, the plain average is taken. mergekit stops at steps of 1e-5 after at most "
    "10, which leaves fine-tuned experts at the plain mean direction.",
)
