"""Configurations beside merged weights: what a merge makes untrue in them is put right."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.dtypes import Dtype
from merge_core.checkpoints.parameter_roles import describe
from merge_core.checkpoints.shards import TensorInfo
from merge_core.places import is_place

# transformers writes the first; what it wrote before version 5 has the second, or both.
DTYPE_KEYS = ("dtype", "torch_dtype")
# Packed weights are not merged as such: what is written is plain.
PACKED = ("quantization_config", "compression_config")
TIED = "tie_word_embeddings"
PLACES = re.compile(r"(name_or_path|_file|_path|_dir|^file|^path)$")


@dataclass(frozen=True)
class Written:
    """What the weights of an output are.

    Attributes:
        dtype: the one that most of the numbers have (see :func:`usual_dtype`).
        head_apart: whether its language head is another one than its embedding.
    """

    dtype: Dtype | None
    head_apart: bool = False

    @classmethod
    def of(cls, model: Checkpoint) -> Written:
        """What has been written, told from its headers; embedding and head are compared."""
        return cls(usual_dtype(model.info(name) for name in model), _is_head_apart(model))


def usual_dtype(tensors: Iterable[TensorInfo]) -> Dtype | None:
    """The floating dtype that most of the numbers have, the wider of two; None without any.

    A configuration has room for one. Libraries open a model in it, whatever single tensors (norms,
    routers) are stored in.
    """
    numbers: Counter[Dtype] = Counter()
    for tensor in tensors:
        if tensor.is_floating:
            numbers[tensor.dtype] += tensor.numel
    if not numbers:
        return None
    return max(numbers, key=lambda dtype: (numbers[dtype], dtype.itemsize, dtype.name))


def _is_head_apart(model: Checkpoint) -> bool:
    """Whether a language head lies beside an embedding of its shape and has other values."""
    import torch

    kinds = {name: describe(name, model.info(name)).kind for name in model}
    embeddings = [name for name, kind in kinds.items() if kind == "token embedding"]
    heads = [name for name, kind in kinds.items() if kind == "language head"]
    return any(
        model.info(head).shape == model.info(name).shape
        and not torch.equal(model.tensor(head), model.tensor(name))
        for head in heads
        for name in embeddings
    )


def is_configuration(name: str) -> bool:
    """Whether a side file may hold facts that a merge changes."""
    return name.endswith("config.json")


def true_configuration(
    document: Any, written: Written, name: str, vocabulary: tuple[int, int] | None
) -> Any:
    """A configuration that says what is written beside it, and names no place on this machine.

    Args:
        document: as it lies beside the input.
        written: what the output's weights are.
        name: of its file; ``config.json`` alone describes weights.
        vocabulary: tokens of the input and of the output, where these differ.

    Returns:
        The document itself where it holds.
    """
    if not isinstance(document, dict):
        return document
    document = _without_places(document)
    if name != "config.json":
        return document
    document = _of_weights(document, written, vocabulary)
    if "model_type" not in document:  # another library's than transformers
        return document
    if written.dtype is not None and not any(key in document for key in DTYPE_KEYS):
        document = {**document, DTYPE_KEYS[0]: written.dtype.name}
    if written.head_apart and document.get(TIED) is not False and not _scales(document):
        document = {**document, TIED: False}
    return document


def _of_weights(
    document: Mapping[str, Any], written: Written, vocabulary: tuple[int, int] | None
) -> dict[str, Any]:
    """Dtype, vocabulary and packing of a configuration and of those within it."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        if key in PACKED:
            continue
        if key in DTYPE_KEYS and written.dtype is not None:
            found[key] = written.dtype.name  # also where it was one for each part
        elif isinstance(value, dict):
            found[key] = _of_weights(value, written, vocabulary)
        elif key == "vocab_size" and vocabulary is not None and value == vocabulary[0]:
            found[key] = vocabulary[1]
        elif key == TIED and written.head_apart and not _scales(document):
            found[key] = False
        else:
            found[key] = value
    return found


def _scales(document: Mapping[str, Any]) -> bool:
    """Whether a model scales its outputs by whether it is said to be tied, as T5 does."""
    return document.get("is_encoder_decoder") is True


def _without_places(value: Any) -> Any:
    """A document without the fields that name a place on somebody's machine."""
    if isinstance(value, dict):
        return {
            key: _without_places(each)
            for key, each in value.items()
            if not (isinstance(each, str) and PLACES.search(key) and is_place(each))
        }
    return [_without_places(each) for each in value] if isinstance(value, list) else value
