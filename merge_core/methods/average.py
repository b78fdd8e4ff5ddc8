"""Weight averaging."""

from __future__ import annotations

from torch import Tensor

from merge_core.methods.declaration import Method, MethodParameters
from merge_core.task_vectors import ParameterGroup


class AverageParameters(MethodParameters):
    """Weight averaging has none."""


def merge(group: ParameterGroup, parameters: AverageParameters, state: None) -> Tensor:
    """θ_avg of one parameter."""
    return group.average


METHOD = Method(
    name="average",
    title="Weight average",
    place=0,
    summary="The mean of the experts' weights. It needs no base and has nothing to tune.",
    formula=r"\theta_{avg} = \frac{1}{T} \sum_t \theta_t",
    source="Wortsman et al., Model soups, arXiv:2203.05482 (uniform soup)",
    parameters=AverageParameters,
    merge=merge,
    needs_base=False,
)
