"""Coefficients of task vectors of least entropy: at which the merged model is most certain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from analysis.learning.context import LearningContext, State
from merge_core.devices import CPU, Device
from merge_core.executors.local import Threads
from merge_core.methods.adamerging import Coefficients, limits, vectors
from merge_core.methods.cart_adaptive import truncations

BATCH = 16


@dataclass(frozen=True)
class Family:
    """All merges θ = θ_origin + Σ_t λ_t v_t, one row of λ for each parameter or for several.

    Attributes:
        origin: weights of the whole network.
        vectors: T x shape, for the parameters that move.
        rows: which row of λ counts for each of them.
        device: where origin and vectors lie.
    """

    origin: State
    vectors: Mapping[str, Tensor]
    rows: Mapping[str, int]
    device: Device = CPU

    def weights(self, values: Tensor) -> dict[str, Tensor]:
        """The moving parameters at coefficients λ (rows x T), differentiable in them."""
        return {
            name: self.origin[name]
            + torch.tensordot(self.device.send(values[self.rows[name]]), moved, dims=1)
            for name, moved in self.vectors.items()
        }


def learn_adamerging(context: LearningContext) -> Coefficients:
    """λ of AdaMerging for each task and parameter (the same for all with level: task).

    Args:
        context: the recipe's parameters are those of AdaMerging.

    Source: Yang et al., arXiv:2310.02575, equations 4 to 6.
    """
    recipe, run = context.recipe, context.recipe.run(context.tasks)
    settings: dict[str, Any] = {
        group.name: recipe.parameters_of(group.name)
        for group in context.groups
        if group.info.is_floating
    }
    trimmed = any(own.trimmed != "none" for own in settings.values())
    found = limits(context.groups, run, context.progress) if trimmed else None
    origin, moved = {}, {}
    for group in context.groups:
        origin[group.name] = group.base
        if group.name in settings and group.name in context.names:
            own = vectors(group, settings[group.name], run, found)
            moved[group.name] = context.device.send(own.float())
    # One row for all parameters of level task, which has no name of its own.
    shared = {name: name if own.level == "layer" else "" for name, own in settings.items()}
    keys = list(dict.fromkeys(shared.values()))
    rows = {name: keys.index(key) for name, key in shared.items()}
    start = torch.empty(len(keys), len(context.tasks))
    for name, row in rows.items():
        start[row] = settings[name].start
    family = Family(context.check_fit(origin, context.tasks), moved, rows, context.device)
    values = minimise_entropy(context, family, start, bounds=(0.0, 1.0))
    return Coefficients({name: values[row] for name, row in rows.items()}, found)


def learn_cart_adaptive(context: LearningContext) -> dict[str, Tensor]:
    """λ of CART for each task and decomposed matrix: T numbers by name.

    Args:
        context: the recipe's parameters are those of CART with test-time adaptation.

    Source: Choi et al., arXiv:2412.12153, test-time adaptation.
    """
    origin, moved, start = {}, {}, []
    names = []
    for group in context.groups:
        origin[group.name] = group.average if group.info.is_floating else group.buffer
        if group.decomposed:
            own: Any = context.recipe.parameters_of(group.name)
            names.append(group.name)
            start.append([own.scale] * len(context.tasks))
            if group.name in context.names:
                moved[group.name] = context.device.send(truncations(group, own).float())
    if not names:
        return {}
    rows = {name: row for row, name in enumerate(names)}
    family = Family(context.check_fit(origin, context.tasks), moved, rows, context.device)
    values = minimise_entropy(context, family, torch.tensor(start))
    return {name: values[row] for name, row in rows.items()}


def entropy(context: LearningContext, weights: State, images: Tensor, task: str) -> Tensor:
    """Mean entropy (nats) of the predictions on some images, differentiable in the weights."""
    log_p = context.log_probabilities(weights, images, task)
    return -(log_p.exp() * log_p).sum(dim=1).mean()


def entropy_gradient(
    context: LearningContext, family: Family, values: Tensor, batches: Sequence[Tensor]
) -> tuple[float, Tensor]:
    """The summed entropies of all tasks at λ, and their derivative with respect to λ.

    Args:
        context: gives network and heads.
        family: what λ stands for.
        values: λ, rows x T.
        batches: images of each task, in the tasks' order.

    Returns:
        Nats, and rows x T.

    Raises:
        SuiteError: the outputs are not finite.
    """
    leaf = values.detach().requires_grad_()
    merged = family.weights(leaf)
    # Differentiated in two stages, so that activations of few tasks are held at a time.
    cut = {name: value.detach().requires_grad_() for name, value in merged.items()}

    def of_task(item: tuple[str, Tensor]) -> tuple[float, Sequence[Tensor | None]]:
        task, images = item
        loss = entropy(context, {**family.origin, **cut}, images, task)
        return loss.item(), torch.autograd.grad(loss, list(cut.values()), allow_unused=True)

    total, passed = 0.0, dict[str, Tensor]()
    for loss, own in Threads().map(of_task, zip(context.tasks, batches, strict=True)):
        total += loss
        for name, slope in zip(cut, own, strict=True):
            if slope is not None:
                passed[name] = passed[name] + slope if name in passed else slope
    torch.autograd.backward([merged[name] for name in passed], list(passed.values()))
    slope = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
    return total, slope


def minimise_entropy(
    context: LearningContext,
    family: Family,
    start: Tensor,
    bounds: tuple[float, float] | None = None,
) -> Tensor:
    """λ after the recipe's steps of Adam on the entropy of the predictions.

    Args:
        context: the recipe's parameters `steps` and `learning_rate` count.
        family: what λ stands for.
        start: λ, rows x T.
        bounds: λ is clamped to these where it is used, as in AdaMerging's code, so that a
            coefficient beyond a bound has no slope.

    Returns:
        λ as used, rows x T.
    """
    parameters: Any = context.recipe.checked_parameters
    streams = [context.batches(task, BATCH) for task in context.tasks]
    values = start.clone().requires_grad_()
    adam = torch.optim.Adam([values], lr=parameters.learning_rate)

    def coefficients_in_use() -> Tensor:
        return values if bounds is None else values.clamp(*bounds)

    with torch.enable_grad():
        for step in range(parameters.steps):
            context.progress.step(step, parameters.steps, "adapting to unlabelled inputs")
            batches = [next(stream) for stream in streams]
            _, slope = entropy_gradient(context, family, coefficients_in_use(), batches)
            values.grad = torch.autograd.grad(coefficients_in_use(), values, slope)[0]
            adam.step()
    return coefficients_in_use().detach()
