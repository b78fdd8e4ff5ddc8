"""CART with test-time adaptation: its scaling coefficients make the predictions sure."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_core.factors.low_rank import count_directions
from merge_core.methods.adamerging import rate_parameter, steps_parameter
from merge_core.methods.declaration import Method, MethodParameters, Rank, Run, parameter
from merge_core.methods.spectral import AVERAGED
from merge_core.task_vectors import TensorGroup


class CartAdaptiveParameters(MethodParameters):
    """Parameters of CART with test-time adaptation."""

    rank: Rank = parameter(
        0.08,
        "Directions kept of each centred task vector: a share of min(m, n), or a whole number. "
        "Too few lose the task; the coefficients decide how much of each task's is added.",
        typical="0.08 (paper); 0.16 to 0.32 as shipped",
    )
    scale: float = parameter(
        1.0,
        "Value from which every coefficient λ starts; with no steps this is CART.",
        minimum=-10,
        maximum=10,
        typical="1 (paper); 1 to 3 as shipped",
        show=(0, 8),
    )
    steps: int = steps_parameter("500; 50 to 100 with a larger rate while a page waits")
    learning_rate: float = rate_parameter()


def truncations(group: TensorGroup, parameters: CartAdaptiveParameters) -> Tensor:
    """T x shape: SVD_k(C_t) of one matrix, for each task."""
    r = min(group.info.matrix_shape)
    k = count_directions(parameters.rank, r)
    centred = group.task_vectors("average")
    if k == r:  # all directions are the vector itself, without the factors' rounding
        return centred
    kept = torch.stack([term.truncate(k) for term in group.truncations("average", k)])
    return kept.reshape(centred.shape).to(centred.dtype)


def merge(group: TensorGroup, parameters: CartAdaptiveParameters, run: Run) -> Tensor:
    """θ_avg + Σ_t λ_t SVD_k(C_t) of one matrix, λ as learnt; the average of anything else.

    Args:
        group: the parameter.
        parameters: of the method.
        run: its state holds the T coefficients of each matrix by name.
    """
    if not group.decomposed:
        return group.average
    values = run.state[group.name].to(group.average.dtype)
    return group.average + torch.tensordot(values, truncations(group, parameters), dims=1)


def warnings(
    tasks: int, parameters: CartAdaptiveParameters | None, run: Run | None = None
) -> list[str]:
    """With one or two tasks the centred task vectors leave little to adapt."""
    if tasks == 1:
        return ["With one task this gives the expert itself: there is nothing to merge."]
    if tasks == 2:
        return [
            "With two tasks the centred task vectors are each other's negative: the start is the "
            "weight average, and each matrix can only move towards one of the two experts."
        ]
    return []


METHOD = Method(
    name="cart_adaptive",
    title="CART with test-time adaptation",
    order=54,
    summary="CART with one coefficient per task and weight matrix, which minimise the entropy of "
    "the predictions on unlabelled validation inputs.",
    formula=r"\theta^l = \theta_{avg}^l + \sum_t \lambda_t^l\, \mathrm{SVD}_k(\theta_t^l - "
    r"\theta_{avg}^l),\quad \lambda = \arg\min_\lambda \sum_t \mathbb{E}_{x \sim t}\, "
    r"H\big(p_\theta(\cdot | x)\big)",
    source="Choi et al., Revisiting weight averaging for model merging, arXiv:2412.12153",
    parameters=CartAdaptiveParameters,
    merge=merge,
    origins=("average",),
    draws="the inputs of each step",
    learns="cart_adaptive",
    data="inputs",
    gradients=True,
    averaged=AVERAGED,
    deviations="The inputs come from the validation split; the paper adapts on the test inputs "
    "themselves. Coefficients are not bounded.",
    warnings=warnings,
)
