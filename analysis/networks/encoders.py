"""Encoders of transformers, built from a configuration alone: one vector for each text or image.

Nothing is fetched and no code of a checkpoint is run: the library's own class of a type is built
with random weights, and the suite's weights are put into it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analysis.networks.build import build_error
from analysis.networks.limits import Size, build_within
from merge_core.errors import SuiteError
from merge_core.suites.architectures import NOT_SHAPE, WHOLE, runnable_types
from merge_core.suites.suite_spec import ArchitectureSpec, Pooling

_EXTRAS = {"open_clip": ("open_clip_torch", "clip"), "transformers": ("transformers", "text")}
# Where rows of tokens keep which text of a pair each belongs to: above any token's number.
SEGMENT_BITS = 24


def import_library(name: str, path: Path) -> Any:
    """An optional library.

    Raises:
        SuiteError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as fault:
        package, extra = _EXTRAS[name]
        raise SuiteError(
            f"{path} names an architecture of {name}, but {package} is not installed. Run "
            f"pip install 'mergescope[{extra}]'."
        ) from fault


def configuration_class(architecture: ArchitectureSpec, path: Path) -> Any:
    """The class of a type's configuration, once the arguments are known to be fields of it.

    Raises:
        SuiteError: transformers is not installed or knows no encoder of that type, or its
            configuration lacks a field.
    """
    transformers = import_library("transformers", path)
    name = architecture.name
    if name not in runnable_types():
        near = [kind for kind in sorted(runnable_types()) if kind[:4] == name[:4]][:4]
        if name in WHOLE:
            near = [WHOLE[name][0]]
        raise SuiteError(
            f"{path}: transformers has no encoder of type {name!r:.80} that can be run."
            + (f" Similar: {', '.join(near)}." if near else "")
            + " Leave the architecture out to study weights only: merging needs none."
        )
    configure = transformers.CONFIG_MAPPING[name]
    fields = configure().to_dict()
    if unknown := [argument for argument in architecture.args if argument not in fields]:
        raise SuiteError(
            f"{path}: a {configure.__name__} of transformers has no {unknown[0]!r:.80}. Correct "
            "the args."
        )
    return configure


def build_model(
    architecture: ArchitectureSpec, path: Path, size: Size, classified: bool = False
) -> Any:
    """The bare model of a type, with random weights.

    Args:
        architecture: of transformers.
        path: the file that names it, for messages.
        size: of the weights that it is built for.
        classified: as the library's classifier of that type has it, perhaps with another last
            layer than when it stands alone.

    Raises:
        SuiteError: it cannot be built, or is larger than the weights.
    """
    configure = configuration_class(architecture, path)
    args = {name: value for name, value in architecture.args.items() if not NOT_SHAPE.search(name)}

    def build() -> nn.Module:
        if classified:
            return encoder_of(build_classifier(architecture.name, args))[1]
        from transformers import AutoModel

        model: nn.Module = AutoModel.from_config(configure(**args))
        return model

    try:
        model: Any = build_within(size, architecture.args, build)
    except Exception as fault:  # wrong arguments raise almost anything, from deep inside
        raise build_error(architecture, path, fault, SuiteError) from fault
    if getattr(model.config, "is_encoder_decoder", False):
        raise SuiteError(
            f"{path}: {architecture.name!r} is an encoder with a decoder, and features are those "
            "of encoders. Leave the architecture out to study weights only."
        )
    return model


def build_classifier(name: str, args: Mapping[str, Any], classes: int = 2) -> nn.Module:
    """The library's classifier of a type; of a tower, that of the whole model.

    Args:
        name: of the type.
        args: of its configuration.
        classes: of which it is.

    Raises:
        StopIteration: the library has none.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    wholes = {tower: whole for whole, (tower, _, _) in WHOLE.items()}
    if name in wholes:
        small = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
        parts: dict[str, Any] = {"vision_config": dict(args), "text_config": small}
        config: Any = CONFIG_MAPPING[wholes[name]](**parts)
    else:
        config = CONFIG_MAPPING[name](**args)
    config.num_labels = classes
    tables = (
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    )
    kind: Any = next(table[type(config)] for table in tables if type(config) in table)
    if isinstance(kind, tuple):
        kind = kind[0]
    model: nn.Module = kind(config)
    return model


def encoder_of(whole: nn.Module) -> tuple[str, Any]:
    """Name and module of the encoder within a classifier: its largest part."""

    def size(module: nn.Module) -> int:
        return sum(value.numel() for value in module.parameters())

    parts = [(name, part) for name, part in whole.named_children() if hasattr(part, "config")]
    return max(parts, key=lambda part: size(part[1]))


def as_encoder(model: Any, pooling: Pooling, normalize: bool = False) -> nn.Module:
    """The same model, which gives one vector for each input; its parameters keep their names.

    Args:
        model: of transformers.
        pooling: how the vectors of tokens or patches become one.
        normalize: whether it is divided by its norm.
    """
    takes_texts = model.main_input_name != "pixel_values"
    accepted = frozenset(inspect.signature(model.forward).parameters)
    given = _text_arguments if takes_texts else _image_arguments

    class Encoder(type(model)):  # type: ignore[misc]
        def forward(self, inputs: Tensor) -> Any:
            arguments, there = given(inputs, self.config, accepted)
            vectors = pool(super().forward(**arguments), there, pooling, self.config)
            return nn.functional.normalize(vectors, dim=-1) if normalize else vectors

    model.__class__ = Encoder
    encoder: nn.Module = model
    return encoder


Arguments = Callable[[Tensor, Any, frozenset[str]], tuple[Mapping[str, Tensor], Tensor | None]]


def _image_arguments(
    images: Tensor, _config: Any, _accepted: frozenset[str]
) -> tuple[dict[str, Tensor], None]:
    if images.ndim == 2:
        raise ValueError("it takes images, and these are texts")
    return {"pixel_values": images}, None


def _text_arguments(
    tokens: Tensor, config: Any, accepted: frozenset[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """What a text model is called with, and which tokens are no padding.

    Args:
        tokens: N x L, negative after the end of a text; bits above :data:`SEGMENT_BITS` number
            the texts of a pair.
        config: of the model.
        accepted: names of its arguments.
    """
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise ValueError("it takes texts, and these are images")
    there = tokens >= 0
    longest = max(int(there.sum(dim=1).max()), 1)
    tokens, there = tokens[:, :longest], there[:, :longest]
    segments = torch.where(there, tokens >> SEGMENT_BITS, 0)
    filler = getattr(config, "pad_token_id", None) or 0
    arguments = {"input_ids": torch.where(there, tokens & ((1 << SEGMENT_BITS) - 1), filler)}
    if "attention_mask" in accepted:
        arguments["attention_mask"] = there.long()
    elif not bool(there.all()):
        raise ValueError("it cannot tell padding from tokens, so texts must be of one length")
    if "token_type_ids" in accepted and bool(segments.any()):
        arguments["token_type_ids"] = segments
    return arguments, there


def pool(output: Any, there: Tensor | None, pooling: Pooling, config: Any) -> Tensor:
    """One vector for each input, N x width.

    Args:
        output: of a model of transformers.
        there: N x L, which tokens are no padding; None for images.
        pooling: how.
        config: of the model.

    Raises:
        ValueError: the model has no pooler, or no first token.
    """
    if pooling == "pooler":
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            raise ValueError("it has no pooler; name another 'pooling'")
        return pooled.flatten(1)
    hidden: Tensor = output.last_hidden_state
    if hidden.ndim == 4:  # maps of a convolutional network, N x width x H x W
        hidden = hidden.flatten(2).transpose(1, 2)
    if pooling == "first":
        return hidden[:, 0]
    if pooling == "last":
        if there is None:
            return hidden[:, -1]
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, (there.sum(dim=1) - 1).clamp(min=0)]
    if pooling == "mean":
        if there is None:
            return hidden.mean(dim=1)
        weight = there.to(hidden.dtype).unsqueeze(-1)
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-9)
    if there is not None:
        raise ValueError("texts have no patches; name another 'pooling'")
    patches = hidden[:, 1 + int(getattr(config, "num_register_tokens", 0) or 0) :].mean(dim=1)
    return patches if pooling == "patches" else torch.cat([hidden[:, 0], patches], dim=1)
