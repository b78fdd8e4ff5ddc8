"""AdaMerging: Task Arithmetic with coefficients that make the predictions sure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from merge_core.methods.blockwise import merge_entrywise
from merge_core.methods.declaration import Method, MethodParameters, Run, parameter
from merge_core.methods.sparse import (
    Limits,
    Sparsified,
    TiesParameters,
    elect_signs,
    keep_largest,
    thresholds,
)
from merge_core.progress import Progress
from merge_core.task_vectors import TensorGroup, TensorGroups

TRIM = TiesParameters(density=0.2, trim="global")


def steps_parameter(typical: str) -> Any:
    """The number of Adam's steps."""
    return parameter(
        500,
        "Steps of Adam, each on 16 unlabelled validation inputs of every task. More of them move "
        "the coefficients further from their start and take longer.",
        minimum=0,
        maximum=100_000,
        typical=typical,
        show=(0, 500),
    )


def rate_parameter() -> Any:
    """Adam's learning rate."""
    return parameter(
        1e-3,
        "Adam's learning rate: about how far a coefficient moves in a step. Raising it goes as "
        "far in fewer steps, less evenly.",
        minimum=0.0,
        maximum=1.0,
        typical="0.001 with 500 steps; 0.01 with 50",
        show=(0, 0.1),
    )


class AdamergingParameters(MethodParameters):
    """Parameters of AdaMerging."""

    level: Literal["layer", "task"] = parameter(
        "layer", "One coefficient for each task and parameter tensor, or one for each task."
    )
    trimmed: Literal["none", "ties"] = parameter(
        "none",
        "Task vectors as they are (AdaMerging), or trimmed to their largest fifth and of the "
        "elected signs, as in TIES (AdaMerging++).",
    )
    start: float = parameter(
        0.3,
        "Value from which every coefficient starts.",
        minimum=0.0,
        maximum=1.0,
        typical="0.3",
    )
    steps: int = steps_parameter("500 (paper); 50 to 100 with a larger rate while a page waits")
    learning_rate: float = rate_parameter()


@dataclass(frozen=True)
class Coefficients:
    """What AdaMerging learns.

    Attributes:
        values: T coefficients in [0, 1] of each parameter.
        limits: TIES's thresholds over the whole model, where task vectors are trimmed.
    """

    values: dict[str, Tensor]
    limits: Limits | None = None


def limits(groups: TensorGroups, run: Run, progress: Progress) -> Limits:
    """The magnitudes that a task vector's largest fifth reaches, over the whole model."""
    return Limits(TRIM.density, thresholds(groups, TRIM, run, progress))


def trim(
    group: TensorGroup, parameters: AdamergingParameters, run: Run, found: Limits | None
) -> Sparsified:
    """What of a block of task vectors the coefficients multiply (see :func:`vectors`)."""
    if parameters.trimmed == "none":
        return lambda tau, _: tau
    stays = keep_largest(group, TRIM, replace(run, state=found))
    return lambda tau, part: elect_signs(stays(tau, part))


def vectors(
    group: TensorGroup, parameters: AdamergingParameters, run: Run, found: Limits | None
) -> Tensor:
    """T x shape: the task vectors that the coefficients multiply.

    Args:
        group: the parameter.
        parameters: of the method.
        run: says the origin.
        found: of :func:`limits`, where they are trimmed.
    """
    tau = run.task_vectors(group)
    kept = trim(group, parameters, run, found)
    return kept(tau.reshape(len(tau), -1), slice(None)).reshape(tau.shape)


def merge(group: TensorGroup, parameters: AdamergingParameters, run: Run) -> Tensor:
    """θ_0 + Σ_t λ_t τ_t of one parameter, λ as learnt."""
    kept = trim(group, parameters, run, run.state.limits)
    values = run.state.values[group.name]
    return merge_entrywise(group, run, lambda tau, part: values.to(tau.dtype) @ kept(tau, part))


METHOD = Method(
    name="adamerging",
    title="AdaMerging",
    order=53,
    summary="Task Arithmetic whose coefficients, one per task or per task and tensor, minimise "
    "the entropy of the predictions on unlabelled validation inputs.",
    formula=r"\theta^l = \theta_0^l + \sum_t \lambda_t^l \tau_t^l,\quad \lambda = "
    r"\arg\min_{\lambda \in [0, 1]} \sum_t \mathbb{E}_{x \sim t}\, H\big(p_\theta(\cdot | x)\big)",
    source="Yang et al., AdaMerging, arXiv:2310.02575",
    parameters=AdamergingParameters,
    merge=merge,
    origins=("base",),
    draws="the inputs of each step",
    learns="adamerging",
    data="inputs",
    gradients=True,
    deviations="The inputs come from the validation split; the paper adapts on the test inputs "
    "themselves. One batch of 16 inputs per task and step, as in the paper (the authors' code "
    "takes two). As in that code, coefficients are clamped where they are used. An even vote of "
    "the trimmed vectors' signs leaves an entry out.",
)
