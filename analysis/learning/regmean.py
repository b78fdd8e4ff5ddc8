"""Least-squares fits of linear layers to the experts' outputs: RegMean and RegMean++."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from analysis.learning.context import BATCH, LearningContext
from merge_core.executors.local import Threads
from merge_core.methods.regmean import NormalEquations, no_equations

Layers = Mapping[str, nn.Module]


@torch.no_grad()
def learn_regmean(context: LearningContext) -> dict[str, Tensor]:
    """The update of every linear layer's weight about the average.

    Args:
        context: the recipe's parameters are those of RegMean.

    Returns:
        Name of a weight to m x n, float64.

    Source: Jin et al., arXiv:2212.09849, equation 2.
    """
    parameters: Any = context.recipe.checked_parameters
    layers = linear_layers(context)
    fit, collect = Fit(context, layers), partial(collect_gram_matrices, rule=parameters.gram)

    @torch.no_grad()
    def grams_of(task: str) -> dict[str, Tensor]:
        weights = context.expert(task)
        with context.copies.lend(context.device) as network, collect(network, layers) as grams:
            for batch in context.images(task, parameters.examples).split(BATCH):
                torch.func.functional_call(network, weights, (batch,))
        return {layer: context.device.fetch(gram) for layer, gram in grams.items()}

    found = Threads().map(grams_of, context.tasks, context.progress.cancel)
    for index, task in enumerate(context.tasks):
        context.progress.step(index, len(context.tasks), f"activations of {task}")
        for layer, gram in next(found).items():
            fit.add(layer, task, gram)
    return fit.updates()


@torch.no_grad()
def learn_regmean_plus_plus(context: LearningContext) -> dict[str, Tensor]:
    """The same, block by block, on the inputs that the merged blocks before give.

    Args:
        context: the recipe's parameters are those of RegMean++.

    Returns:
        Name of a weight to m x n, float64.

    Source: Nguyen et al., arXiv:2508.03121, section 3; within a block each expert's own layers
    pass the inputs on.
    """
    parameters: Any = context.recipe.checked_parameters
    layers = linear_layers(context)
    images = {task: context.images(task, parameters.examples) for task in context.tasks}
    experts = {task: context.expert(task) for task in context.tasks}
    merged = dict(experts[context.tasks[0]])
    for group in context.groups:
        if group.info.is_floating and group.name in merged:
            merged[group.name] = context.device.send(group.average.float())
    fit = Fit(context, layers)
    blocks = blocks_in_order(context, layers, merged, images[context.tasks[0]][:1])
    for done, (block, inside) in enumerate(blocks.items()):
        of_task = partial(block_grams, context, merged, block, inside)
        items = ((experts[task], images[task]) for task in context.tasks)
        found = Threads().map(of_task, items, context.progress.cancel)
        for index, task in enumerate(context.tasks):
            unit = done * len(context.tasks) + index
            context.progress.step(unit, len(blocks) * len(context.tasks), f"{block} on {task}")
            for layer, gram in next(found).items():
                fit.add(layer, task, gram)
        for layer in inside:
            fitted = (fit.averages[layer] + fit.update(layer)).float()
            merged[f"{layer}.weight"] = context.device.send(fitted)
    return fit.updates()


@torch.no_grad()
def block_grams(
    context: LearningContext,
    merged: Mapping[str, Tensor],
    block: str,
    layers: Layers,
    item: tuple[Mapping[str, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Gram matrices of a block's layers, n x n, on the inputs that merged blocks before it give.

    Args:
        context: gives the network.
        merged: its weights up to the block.
        block: its name.
        layers: of the block.
        item: an expert's weights, which act within the block, and images of its task.
    """
    expert, images = item
    parameters: Any = context.recipe.checked_parameters
    collect = partial(collect_gram_matrices, rule=parameters.gram)
    prefix = f"{block}."
    own = {
        name.removeprefix(prefix): value
        for name, value in expert.items()
        if name.startswith(prefix)
    }
    with context.copies.lend(context.device) as network:
        module = network.get_submodule(block)
        with record_calls(module) as inputs:
            for batch in images.split(BATCH):
                torch.func.functional_call(network, dict(merged), (batch,))
        with collect(network, layers) as grams:
            for args, keywords in inputs:
                torch.func.functional_call(module, own, args, keywords)
    return {layer: context.device.fetch(gram) for layer, gram in grams.items()}


class Fit:
    """The least-squares problems of all linear layers, counted in expert by expert.

    Args:
        context: gives the experts and the recipe's factor of off-diagonal entries.
        layers: of the network.
    """

    def __init__(self, context: LearningContext, layers: Layers) -> None:
        self._context = context
        self.averages = {
            group.name.removesuffix(".weight"): group.experts.double().mean(dim=0)
            for group in context.groups
            if group.name.removesuffix(".weight") in layers
        }
        self._equations: dict[str, NormalEquations] = {}

    def add(self, layer: str, task: str, gram: Tensor) -> None:
        """Count in an expert's layer with the Gram matrix of its inputs, n x n."""
        name = f"{layer}.weight"
        parameters: Any = self._context.recipe.parameters_of(name)
        average = self.averages[layer]
        if layer not in self._equations:
            self._equations[layer] = no_equations(*average.shape)
        offset = self._context.suite.expert(task).tensor(name).double() - average
        self._equations[layer].add(offset, gram, parameters.off_diagonal)

    def update(self, layer: str) -> Tensor:
        """The fitted update of one layer's weight about the average, m x n."""
        return self._equations[layer].solve()

    def updates(self) -> dict[str, Tensor]:
        """Name of a weight to its update."""
        return {f"{layer}.weight": self.update(layer) for layer in self._equations}


def linear_layers(context: LearningContext) -> dict[str, nn.Module]:
    """The network's linear layers by name, as far as their weights are merged."""
    merged = {group.name for group in context.groups if group.info.is_floating}
    return {
        name: module
        for name, module in context.network.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in merged
    }


def blocks_in_order(
    context: LearningContext, layers: Layers, weights: Mapping[str, Tensor], image: Tensor
) -> dict[str, dict[str, nn.Module]]:
    """The blocks that hold linear layers, as an image passes them, each with its layers.

    A layer's block is the module of its path up to the last number (``blocks.0`` of
    ``blocks.0.attn.qkv``), or the layer itself where there is none that runs as one.
    """
    order: list[str] = []
    numbered = {name: re.match(r"(.*\.)?\d+(?=\.|$)", name) for name in layers}
    candidates = {*layers, *(found.group() for found in numbered.values() if found)}
    with context.copies.lend(context.device) as network:
        handles = [
            network.get_submodule(name).register_forward_pre_hook(
                lambda _module, _args, name=name: order.append(name)
            )
            for name in candidates
        ]
        try:
            torch.func.functional_call(network, dict(weights), (image,))
        finally:
            for handle in handles:
                handle.remove()
    blocks: dict[str, dict[str, nn.Module]] = {}
    for name in order:
        if name in layers:
            found = numbered[name]
            block = found.group() if found and found.group() in order else name
            blocks.setdefault(block, {})[name] = layers[name]
    return blocks


@contextmanager
def record_calls(module: nn.Module) -> Iterator[list[tuple[Any, Any]]]:
    """Collects the arguments and keywords of every call of a module."""
    found: list[tuple[Any, Any]] = []
    handle = module.register_forward_pre_hook(
        lambda _module, args, keywords: found.append((args, keywords)), with_kwargs=True
    )
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def collect_gram_matrices(
    network: nn.Module, layers: Iterable[str], rule: Literal["sum", "mean"] = "sum"
) -> Iterator[dict[str, Tensor]]:
    """Collects XᵀX of each layer's inputs, n x n, float64; every token of an image is a row.

    With rule "mean" it is over the number of rows, once all inputs have passed.
    """
    grams: dict[str, Tensor] = {}
    rows: Counter[str] = Counter()

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            X = args[0].reshape(-1, args[0].shape[-1]).double()
            gram = X.T @ X
            rows[name] += len(X)
            grams[name] = grams[name] + gram if name in grams else gram

        return hook

    handles = [
        network.get_submodule(name).register_forward_pre_hook(watch(name)) for name in layers
    ]
    try:
        yield grams
        if rule == "mean":
            for name, count in rows.items():
                grams[name] /= count
    finally:
        for handle in handles:
            handle.remove()
