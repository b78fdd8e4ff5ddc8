"""Classifiers within the experts' own checkpoints, as the library of their network runs them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analysis.networks.build import build_network
from analysis.networks.classifiers import ACTIVATIONS, Classifier, Layer, find_classifier
from analysis.networks.limits import Size
from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import SuiteError
from merge_core.suites.suite import Suite
from merge_core.suites.suite_spec import ArchitectureSpec


@dataclass(frozen=True)
class OwnHead:
    """A classifier read from a checkpoint.

    Attributes:
        before: what stands between features and the last layer.
        weight: of the last layer, classes x width.
        bias: of the last layer.
        width: of the features that it takes.
    """

    before: tuple[Callable[[Tensor], Tensor], ...]
    weight: Tensor
    bias: Tensor
    width: int


def read_own_head(suite: Suite, task: str) -> OwnHead:
    """The classifier that an expert's checkpoint holds beside its encoder.

    Raises:
        SuiteError: the architecture's library has no classifier that fits, or pools otherwise.
    """
    layers, expert = _layers(suite), suite.expert(task)
    start = _start(layers, expert)
    if start is None:
        raise _refusal(suite, f"the checkpoint of {task!r} lacks {layers[0].name + '.weight'!r}")
    states = [_state(expert, f"{start}{layer.name}.") for layer in layers]
    last = states[-1]
    if not isinstance(layers[-1].module, nn.Linear):
        raise _refusal(suite, "its last layer is not linear")
    first = states[0]["weight"]
    before: list[Callable[[Tensor], Tensor]] = [
        partial(_run, layer, state) for layer, state in zip(layers[:-1], states[:-1], strict=True)
    ]
    if layers[-1].before != "nothing":
        before.append(ACTIVATIONS[layers[-1].before])
    bias = last.get("bias", torch.zeros(len(last["weight"])))
    return OwnHead(tuple(before), last["weight"], bias, first.shape[-1])


def dense_activation(suite: Suite) -> Callable[[Tensor], Tensor]:
    """What stands between the two layers of a classification head (``dense``, ``out_proj``)."""
    architecture = suite.architecture
    if architecture is not None and architecture.library == "transformers" and suite.tasks:
        size = Size.of(suite.expert(suite.tasks[0]))
        known = find_classifier(architecture, suite.path, size)
        if known is not None and len(known.layers) == 2:
            return ACTIVATIONS[known.layers[1].before]
    return torch.tanh


def _layers(suite: Suite) -> tuple[Layer, ...]:
    """The layers of the classifier that the architecture's library has.

    Raises:
        SuiteError: there is none, or it takes other features than the suite's.
    """
    architecture = suite.architecture
    if architecture is None:
        raise SuiteError(f"The suite {suite.name!r} names no architecture.")
    size = Size.of(suite.expert(suite.tasks[0]))
    if architecture.library == "timm":
        name = _timm_classifier(architecture.model_dump_json(), suite.path, size)
        if name is None:
            raise _refusal(suite, "its classifier is more than one linear layer")
        return (Layer(name, nn.Linear(1, 1), "nothing"),)
    known: Classifier | None = None
    if architecture.library == "transformers":
        known = find_classifier(architecture, suite.path, size)
    if known is None:
        raise _refusal(suite, f"{architecture.library} has no classifier of it that can be run")
    if architecture.pooling not in (None, known.pooling):
        raise SuiteError(
            f"{suite.path}: classifiers within the experts' checkpoints take the pooling "
            f"{known.pooling!r}, and the suite names {architecture.pooling!r}. Leave 'pooling' "
            "out, or give heads that take it."
        )
    return known.layers


def _refusal(suite: Suite, reason: str) -> SuiteError:
    architecture = suite.architecture
    name = "" if architecture is None else f" of {architecture.name!r}"
    return SuiteError(
        f"{suite.path}: the classifiers within the experts' checkpoints are not taken as heads"
        f"{name}: {reason}. Add 'head:' to each expert."
    )


@lru_cache(maxsize=16)
def _timm_classifier(architecture: str, path: Path, size: Size) -> str | None:
    """Name of the last layer of a network of timm; None where it is not one linear layer."""
    spec = ArchitectureSpec(**json.loads(architecture))
    network: Any = build_network(spec, path, SuiteError, num_classes=2, size=size)
    found = network.get_classifier() if hasattr(network, "get_classifier") else None
    if not isinstance(found, nn.Linear):
        return None
    return next(name for name, module in network.named_modules() if module is found)


def _start(layers: Collection[Layer], expert: Checkpoint) -> str | None:
    """What the names of all layers begin with in a checkpoint; None where they are not there."""
    ends = [f"{layer.name}.weight" for layer in layers]
    starts = [
        {name.removesuffix(end) for name in expert if name == end or name.endswith(f".{end}")}
        for end in ends
    ]
    return min(set.intersection(*starts), key=len, default=None)


def _state(expert: Checkpoint, start: str) -> dict[str, Tensor]:
    names = [name for name in expert if name.startswith(start)]
    own = {name.removeprefix(start): expert.tensor(name).float() for name in names}
    return {name: value for name, value in own.items() if "." not in name}


def _run(layer: Layer, state: Mapping[str, Tensor], value: Tensor) -> Tensor:
    result: Tensor = torch.func.functional_call(
        layer.module, dict(state), (ACTIVATIONS[layer.before](value),)
    )
    return result
