"""Weight averaging."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_core.errors import RecipeError
from merge_core.methods.blockwise import weighted_sum
from merge_core.methods.declaration import Method, MethodParameters, Run
from merge_core.task_vectors import TensorGroup


class AverageParameters(MethodParameters):
    """Weight averaging has none."""


def merge(group: TensorGroup, parameters: AverageParameters, run: Run) -> Tensor:
    """θ_avg of one parameter, or the mean under the recipe's per-task weights."""
    if not run.weights:
        return group.average
    if sum(run.weights) == 0:
        raise RecipeError("The weights of an average must not sum to zero. Change one of them.")
    return weighted_sum(group, torch.tensor(run.weights, dtype=torch.float64) / sum(run.weights))


METHOD = Method(
    name="average",
    title="Weight average",
    order=0,
    summary="The mean of the experts' weights, plain or under per-task weights. It needs no base.",
    formula=r"\theta_{avg} = \frac{1}{T} \sum_t \theta_t,\quad \text{or } "
    r"\sum_t w_t \theta_t \big/ \sum_t w_t",
    source="Wortsman et al., Model soups, arXiv:2203.05482 (uniform soup)",
    parameters=AverageParameters,
    merge=merge,
    weighted=True,
    averaged="everything",
)
