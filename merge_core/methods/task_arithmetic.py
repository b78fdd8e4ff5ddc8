"""Task Arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_core.methods.blockwise import merge_entrywise
from merge_core.methods.declaration import Method, MethodParameters, Run, parameter
from merge_core.task_vectors import TensorGroup


class TaskArithmeticParameters(MethodParameters):
    """Parameters of Task Arithmetic."""

    scale: float = parameter(
        0.3,
        "Scaling coefficient λ of the summed task vectors; 1/T gives the average, "
        "larger values move further away from the base.",
        minimum=-10,
        maximum=10,
        typical="0.3 for 8 tasks; searched in 0 to 1",
        show=(0, 1.5),
    )


def merge(group: TensorGroup, parameters: TaskArithmeticParameters, run: Run) -> Tensor:
    """θ_0 + λ Σ_t w_t (θ_t − θ_0) of one parameter."""
    if not run.weights:
        # θ_0 + λT (θ_avg − θ_0), in one pass.
        dtype = group.widest_dtype("base")
        ends = group.base.to(dtype), group.average.to(dtype)
        return torch.lerp(*ends, parameters.scale * len(group.tasks))
    return merge_entrywise(group, run, lambda tau, _: parameters.scale * tau.sum(dim=0))


METHOD = Method(
    name="task_arithmetic",
    title="Task Arithmetic",
    order=1,
    summary="Adds the scaled sum of all task vectors to the base; per-task weights give every task "
    "a scaling coefficient of its own.",
    formula=r"\theta = \theta_0 + \lambda \sum_t w_t \tau_t",
    source="Ilharco et al., Editing models with task arithmetic, arXiv:2212.04089",
    parameters=TaskArithmeticParameters,
    merge=merge,
    origins=("base",),
    weighted=True,
)
