"""SLERP: two experts on the great circle between them."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_core.methods.blockwise import gram, weighted_sum
from merge_core.methods.declaration import Method, MethodParameters, Run, parameter
from merge_core.task_vectors import TensorGroup

# mergekit's limit: beyond it the arc and the chord differ by less than 1.3e-4 of their length.
COLLINEAR = 0.9995


class SlerpParameters(MethodParameters):
    """Parameters of SLERP."""

    t: float = parameter(
        0.5,
        "Place on the arc: 0 is the first expert (in the suite's order), 1 the second.",
        minimum=0.0,
        maximum=1.0,
        typical="0.5",
    )


def merge(group: TensorGroup, parameters: SlerpParameters, run: Run) -> Tensor:
    """sin((1−t)ω)/sin ω · θ_1 + sin(tω)/sin ω · θ_2 of one tensor, ω the angle between them."""
    inner, shares = gram(group), torch.tensor([1 - parameters.t, parameters.t], dtype=torch.float64)
    lengths = inner.diagonal().sqrt().prod()
    cosine = inner[0, 1] / lengths if lengths > 0 else torch.ones(())
    if cosine.abs() <= COLLINEAR:
        angle = torch.arccos(cosine)
        shares = (shares * angle).sin() / angle.sin()
    return weighted_sum(group, shares)


METHOD = Method(
    name="slerp",
    title="SLERP",
    order=20,
    summary="Spherical interpolation of two experts, tensor by tensor: the angle grows evenly and "
    "the length is not lost, as it is on the straight line.",
    formula=r"\theta = \frac{\sin((1-t)\omega)}{\sin\omega}\, \theta_1 + "
    r"\frac{\sin(t\omega)}{\sin\omega}\, \theta_2,\quad "
    r"\cos\omega = \frac{\langle\theta_1, \theta_2\rangle}{\|\theta_1\| \|\theta_2\|}",
    source="Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985; on weights as in "
    "mergekit, arXiv:2403.13257",
    parameters=SlerpParameters,
    merge=merge,
    tasks=2,
    deviations="Interpolates the weights themselves (as mergekit does), not task vectors, so the "
    "result depends on where zero lies. Linear where the cosine exceeds 0.9995 in magnitude "
    "(mergekit's limit; fine-tuned experts of one base often do) or a tensor is zero.",
)
