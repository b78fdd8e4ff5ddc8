"""How a library's own classifier goes on from its encoder, told by running it once, small.

Every family of transformers has a class that classifies texts or images: which vector of the
encoder it takes, and which layers follow, stands in its code alone. It is built with random
weights, and what its layers are given and give is held against what the candidates would be.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from analysis.networks.encoders import configuration_class, pool
from analysis.networks.limits import Size, build_within
from merge_core.executors.base import one_thread
from merge_core.suites.architectures import NOT_SHAPE, WHOLE, type_defaults
from merge_core.suites.suite_spec import ArchitectureSpec, Pooling

CLASSES = 3
LENGTHS = (5, 3)  # of two texts: padding must not be taken for a token
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers")
# What may stand between two layers without being a module.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda value: value,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda value: functional.gelu(value, approximate="tanh"),
    "silu": functional.silu,
}


@dataclass(frozen=True)
class Layer:
    """A layer of a classifier.

    Attributes:
        name: in the whole model, as a checkpoint calls it.
        module: whose form counts; its weights are random.
        before: activation that its input passes first.
    """

    name: str
    module: nn.Module
    before: str


@dataclass(frozen=True)
class Classifier:
    """From an encoder to logits.

    Attributes:
        pooling: what of the encoder it takes.
        layers: in their order; the last gives the logits.
    """

    pooling: Pooling
    layers: tuple[Layer, ...]


def find_classifier(architecture: ArchitectureSpec, path: Path, size: Size) -> Classifier | None:
    """The classifier that transformers has for a type; None where there is none to be followed.

    Args:
        architecture: of transformers; its pooling does not count.
        path: the file that names it, for messages.
        size: of the weights.

    Raises:
        SuiteError: an unknown type or argument.
    """
    configuration_class(architecture, path)
    args = {name: value for name, value in architecture.args.items() if not NOT_SHAPE.search(name)}
    return _find(architecture.name, json.dumps(args, sort_keys=True), size)


@lru_cache(maxsize=16)
@one_thread()
def _find(name: str, arguments: str, size: Size) -> Classifier | None:
    args = json.loads(arguments)
    shallow = {**args, **{field: 1 for field in DEPTHS if _is_deep(name, args, field)}}
    for given in [shallow, args]:
        try:
            whole: Any = build_within(size, given, partial(_build, name, given))
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                return _follow(whole.eval())
        except Exception:  # a library's classes raise what they like
            continue
    return None


def _is_deep(name: str, args: Mapping[str, Any], field: str) -> bool:
    depth = args.get(field, type_defaults(name).get(field))
    return isinstance(depth, int) and depth > 1


def _build(name: str, args: Mapping[str, Any]) -> nn.Module:
    """The library's classifier of a type; of a tower, that of the whole model."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    wholes = {tower: whole for whole, (tower, _, _) in WHOLE.items()}
    if name in wholes:
        small = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
        parts: dict[str, Any] = {"vision_config": dict(args), "text_config": small}
        config: Any = CONFIG_MAPPING[wholes[name]](**parts)
    else:
        config = CONFIG_MAPPING[name](**args)
    config.num_labels = CLASSES
    tables = (
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    )
    kind: Any = next(table[type(config)] for table in tables if type(config) in table)
    if isinstance(kind, tuple):
        kind = kind[0]
    model: nn.Module = kind(config)
    return model


def _follow(whole: Any) -> Classifier | None:
    """What a classifier does with two inputs, by the first candidate that gives its logits."""
    for value in whole.parameters():  # some start from zero
        value.add_(0.05 * torch.randn_like(value))
    encoder_name, encoder = _encoder_of(whole)
    arguments, there = _inputs(whole, encoder)
    layers = {
        name: module
        for name, module in whole.named_modules()
        if name
        and not f"{name}.".startswith(f"{encoder_name}.")
        and not list(module.children())
        and not isinstance(module, nn.Dropout | nn.Identity)
    }
    with _record(layers) as calls, _record({"": encoder}) as outputs:
        logits = whole(**arguments).logits
    output = outputs[0][2]
    chains = list(_chain([c for c in calls if list(layers[c[0]].parameters())], layers))
    for pooling in get_args(Pooling):
        for steps in chains:
            with_this = Classifier(pooling, steps)
            try:
                vectors = pool(output, there, pooling, encoder.config)
                found = run_layers(vectors, steps)
            except (ValueError, RuntimeError, AttributeError, IndexError, TypeError):
                continue
            if found.shape == logits.shape and _is_close(found, logits):
                return with_this
    return None


def run_layers(vectors: Tensor, layers: tuple[Layer, ...]) -> Tensor:
    """Logits from an encoder's vectors, N x width, by the layers' own weights."""
    for layer in layers:
        vectors = layer.module(ACTIVATIONS[layer.before](vectors))
    return vectors


def _encoder_of(whole: nn.Module) -> tuple[str, Any]:
    """Name and module of the encoder within a classifier: its largest part."""

    def size(module: nn.Module) -> int:
        return sum(value.numel() for value in module.parameters())

    parts = [(name, part) for name, part in whole.named_children() if hasattr(part, "config")]
    return max(parts, key=lambda part: size(part[1]))


def _inputs(whole: Any, encoder: Any) -> tuple[dict[str, Tensor], Tensor | None]:
    """Two inputs of a model: images, or texts of two lengths."""
    if whole.main_input_name == "pixel_values":
        config = encoder.config
        side = config.image_size if hasattr(config, "image_size") else 64
        sides = tuple(side) if isinstance(side, list | tuple) else (side, side)
        return {"pixel_values": torch.randn(2, config.num_channels, *sides)}, None
    whole.config.pad_token_id = whole.config.pad_token_id or 0
    special = {v for k, v in whole.config.to_dict().items() if k.endswith("token_id")}
    plain = [n for n in range(min(whole.config.vocab_size, 1000)) if n not in special]
    tokens = torch.full((2, max(LENGTHS)), whole.config.pad_token_id)
    there = torch.zeros_like(tokens)
    for row, length in enumerate(LENGTHS):
        drawn = torch.randint(len(plain), (length,))
        tokens[row, :length] = torch.tensor(plain)[drawn]
        there[row, :length] = 1
    return {"input_ids": tokens, "attention_mask": there}, there.bool()


@contextmanager
def _record(modules: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, Any, Any]]]:
    """Collects name, first input and output of every call."""
    calls: list[tuple[str, Any, Any]] = []
    handles = [
        module.register_forward_hook(
            lambda _module, given, output, name=name: calls.append(
                (name, given[0] if given else None, output)
            )
        )
        for name, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _chain(
    calls: list[tuple[str, Any, Any]], modules: Mapping[str, nn.Module]
) -> Iterator[tuple[Layer, ...]]:
    """Layers in the order of their calls, with the activations that stand before each.

    Before the first one nothing may stand, or any activation.
    """
    rest: list[Layer] = []
    for (_, _, output), (name, given, _) in pairwise(calls):
        fits = [key for key, act in ACTIVATIONS.items() if _is_close(act(output), given)]
        if not fits:
            return
        rest.append(Layer(name, modules[name], fits[0]))
    if calls:
        first = calls[0][0]
        for activation in ACTIVATIONS:
            yield (Layer(first, modules[first], activation), *rest)


def _is_close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-6)
