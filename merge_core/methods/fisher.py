"""Fisher-weighted averaging."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from merge_core.errors import RecipeError
from merge_core.methods.blockwise import merge_entrywise
from merge_core.methods.declaration import Method, MethodParameters, Run, parameter
from merge_core.task_vectors import TensorGroup

FLOOR = 1e-6  # the authors' code: entries that no output depends on are averaged


class FisherParameters(MethodParameters):
    """Parameters of Fisher merging."""

    examples: int = parameter(
        256,
        "Images (or texts) of each task's validation split, drawn by the seed, over which the "
        "Fisher information is averaged. More of them steady it and take longer.",
        minimum=1,
        maximum=100_000,
        typical="256 to 2048",
        show=(16, 512),
    )
    normalise: Literal["none", "norm"] = parameter(
        "none",
        "Whether each expert's Fisher information is divided by its L2 norm over the whole model "
        "(norm: the default of the authors' code), so that an unsure expert, whose gradients are "
        "long, does not outweigh the others. 'none' is the paper's formula.",
        later=True,
    )


def divide_by_norms(information: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each expert's information, floored, over its L2 norm in the whole model.

    Args:
        information: by parameter, T x shape.

    Source: the authors' code, github.com/mmatena/model_merging, `normalize_fishers`.
    """
    squares = sum(
        value.double().square().reshape(len(value), -1).sum(dim=1) for value in information.values()
    )
    norms = torch.as_tensor(squares).sqrt()
    norms = torch.where(norms > 0, norms, 1.0)
    return {
        name: (value.double().clamp_min(FLOOR) / norms.reshape(-1, *[1] * (value.ndim - 1))).float()
        for name, value in information.items()
    }


def merge(group: TensorGroup, parameters: FisherParameters, run: Run) -> Tensor:
    """Σ_t w_t F_t θ_t / Σ_t w_t F_t, entry by entry.

    Args:
        group: the parameter.
        parameters: of the method.
        run: its state holds, by parameter, the diagonal Fisher information of each expert,
            T x shape (with normalise: norm as :func:`divide_by_norms` has it); parameters that it
            does not name are averaged.

    Raises:
        RecipeError: negative weights, or all of them zero.
    """
    if run.weights and (min(run.weights) < 0 or sum(run.weights) == 0):
        raise RecipeError(
            "Fisher merging takes per-task weights of at least 0, one of them above 0. Change them."
        )
    floor = FLOOR if parameters.normalise == "none" else 0.0  # else floored before the division
    learnt = run.state.get(group.name)
    information = None if learnt is None else learnt.reshape(len(learnt), -1)

    def offset(tau: Tensor, part: slice) -> Tensor:
        own = torch.ones_like(tau) if information is None else information[:, part]
        shares = run.apply_weights(own.double().clamp_min(floor))
        return ((shares * tau).sum(dim=0) / shares.sum(dim=0)).to(tau.dtype)

    # About the average, which keeps equal experts exact. Weights come in with the information.
    return merge_entrywise(group, replace(run, origin="average", weights=()), offset)


METHOD = Method(
    name="fisher",
    title="Fisher merging",
    order=50,
    summary="An average of the experts in which every entry of a weight counts by how much its "
    "expert's predictions depend on it, measured on unlabelled validation inputs.",
    formula=r"\theta = \sum_t w_t F_t \theta_t \Big/ \sum_t w_t F_t,\quad F_t = \frac{1}{N} "
    r"\sum_x \sum_y p_{\theta_t}(y|x) \big(\nabla_\theta \log p_{\theta_t}(y|x)\big)^2",
    source="Matena and Raffel, Merging models with Fisher-weighted averaging, arXiv:2111.09832",
    parameters=FisherParameters,
    merge=merge,
    weighted=True,
    draws="the inputs, where a task has more than `examples`",
    learns="fisher",
    data="inputs",
    gradients=True,
    averaged="what the network does not differentiate: running statistics, and tensors that are "
    "not part of it",
    deviations="The expectation over the model's own predictions is exact, a sum over all classes "
    "as in the authors' code, and needs no labels. Values below 1e-6 count as 1e-6, of every "
    "expert; their code floors the first model's only unless told otherwise, and divides each "
    "Fisher by its L2 norm by default: normalise = norm. The authors search the w_t on validation "
    "data; here they are 1 unless the recipe gives them. The "
    "inputs come from the validation split, not the training data.",
)
