"""The diagonal Fisher information of each expert on its own task."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from analysis.learning.context import LearningContext, State
from merge_core.executors.local import Threads
from merge_core.methods.fisher import divide_by_norms

# Gradients of several classes are taken at once, within so many numbers.
HELD_NUMBERS = 1 << 25


def learn_fisher(context: LearningContext) -> dict[str, Tensor]:
    """(1/N) Σ_x Σ_y p(y|x) (∇ log p(y|x))² of each expert on its task's images.

    The sum over classes y is exact, and p is the model's own: no labels are needed.

    Args:
        context: the recipe's parameter `examples` says how many images.

    Returns:
        T x shape, float32, for each floating parameter that the network differentiates; over the
        experts' norms where the recipe asks for that.

    Source: Matena and Raffel, arXiv:2111.09832, equation 2.
    """
    parameters: Any = context.recipe.checked_parameters
    layer: Any
    for layer in context.network.modules():
        if hasattr(layer, "fused_attn"):  # timm's switch: fused attention takes one class at a time
            layer.fused_attn = False
    found: dict[str, list[Tensor]] = {}
    for index, task in enumerate(context.tasks):
        images = context.images(task, parameters.examples)
        weights = context.expert(task)
        total: dict[str, Tensor] = {}
        of_image = partial(squared_gradients, context, weights, task=task)
        squares = Threads().map(of_image, images.split(1), context.progress.cancel)
        for done in range(len(images)):
            context.progress.step(
                index * len(images) + done, len(context.tasks) * len(images), f"Fisher on {task}"
            )
            for name, value in next(squares).items():
                total[name] = total[name] + value if name in total else value
        for name, value in total.items():
            found.setdefault(name, []).append(value / len(images))
    stacked = {name: torch.stack(values) for name, values in found.items()}
    return divide_by_norms(stacked) if parameters.normalise == "norm" else stacked


def squared_gradients(context: LearningContext, weights: State, image: Tensor, task: str) -> State:
    """Σ_y p(y|x) (∂ log p(y|x) / ∂θ)² for one image.

    Args:
        context: gives network and head.
        weights: of the whole network.
        image: 1 x 3 x H x W.
        task: whose head.

    Returns:
        One tensor of the parameter's shape per floating parameter of the network.
    """
    trained = {name for name, _ in context.network.named_parameters()}
    own = {name: value for name, value in weights.items() if name in trained}

    def log_probabilities(changed: State) -> Tensor:
        return context.log_probabilities({**weights, **changed}, image, task)[0]

    log_p, pull_back, *_ = torch.func.vjp(log_probabilities, own)
    # A cotangent √p_y e_y gives √p_y ∂ log p_y, whose square is the class's term.
    cotangents = (log_p / 2).exp().diag()
    together = max(1, HELD_NUMBERS // sum(value.numel() for value in own.values()))
    total = {name: torch.zeros_like(value) for name, value in own.items()}
    for part in cotangents.split(together):
        (gradients,) = torch.func.vmap(pull_back)(part)
        for name, value in gradients.items():
            total[name] += value.square().sum(dim=0)
    return {name: context.device.fetch(value) for name, value in total.items()}
