"""Configurations in one form: names and values that libraries write differently made equal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

from merge_core.compatibility.config_fields import (
    ACTIVATION_FIELDS,
    ACTIVATIONS,
    EPS_FIELDS,
    MODEL_TYPES,
    PART_NAMES,
    PARTS,
)

MOST_NESTED = 4
LONGEST_NAME = 80
CLOSE = 1e-4  # decimals are written with fewer digits here and there
ROTARY = (
    *("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq"),
    *("global_rope_theta", "local_rope_theta", "rotary_emb_base", "rotary_pct"),
    "partial_rotary_factor",
)
# A number, or sides by name, as versions of image processors write them.
SIZES = frozenset({"size", "crop_size"})
TEXT = "text_config"
PART_TYPES = {"vision_config": "{}_vision_model", "text_config": "{}_text_model"}

Fields = dict[str, Any]


def align_types(documents: Mapping[str, Fields]) -> dict[str, Fields]:
    """The configurations, or the parts of them that describe what all members are.

    A vision tower saved by itself has the type that the whole model gives its part.

    Args:
        documents: configuration by member.
    """
    types = {_type_of(document) for document in documents.values()} - {""}
    if len(types) < 2:
        return dict(documents)
    for wanted in sorted(types):
        aligned = {member: _part_of_type(config, wanted) for member, config in documents.items()}
        if all(part is not None for part in aligned.values()):
            return {member: part for member, part in aligned.items() if part is not None}
    return dict(documents)


def _type_of(config: Fields) -> str:
    named = config.get("model_type")
    return MODEL_TYPES.get(named, named) if isinstance(named, str) else ""


def _part_of_type(config: Fields, wanted: str) -> Fields | None:
    if _type_of(config) == wanted:
        return config
    for name, pattern in PART_TYPES.items():
        part = config.get(name)
        if isinstance(part, dict):
            of = _type_of(part) or pattern.format(config.get("model_type"))
            if MODEL_TYPES.get(of, of) == wanted:
                return {**part, "model_type": wanted}
    return None


def align_parts(documents: Mapping[str, Fields]) -> dict[str, Fields]:
    """The configurations, the text's fields in a part of their own where others have them there.

    Older files of models of images and text keep them beside the part of the images.

    Args:
        documents: configuration by member.

    Example:
        >>> old, new = {"hidden_act": "silu"}, {"text_config": {"hidden_act": "silu"}}
        >>> align_parts({"a": old, "b": new})["a"] == new
        True
    """
    parts = [config.get(TEXT) for config in documents.values()]
    named = {name for part in parts if isinstance(part, dict) for name in part}
    beside = {name for config in documents.values() if TEXT in config for name in config}
    moved = {*named, *(ROTARY if named & set(ROTARY) else ())} - beside

    def align(config: Fields) -> Fields:
        own = {name: value for name, value in config.items() if name in moved}
        if TEXT in config or not own:
            return config
        rest = {name: value for name, value in config.items() if name not in moved}
        return {**rest, TEXT: own}

    return {member: align(config) for member, config in documents.items()}


def flatten(config: Fields, prefix: str = "", depth: int = 0) -> Fields:
    """Fields by their paths, with one name and one form for each thing.

    Args:
        config: a configuration.
        prefix: path of the object that it is.
        depth: of that object.

    Returns:
        Path (``vision_config.hidden_act``) to a value that can be compared by ``==``.

    Example:
        >>> old = {"rope_theta": 1e4, "rope_scaling": None, "hidden_act": "swish"}
        >>> new = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000},
        ...        "hidden_act": "silu"}
        >>> flatten(old) == flatten(new)
        True
    """
    fields: Fields = {}
    plain = {name: value for name, value in config.items() if name not in ROTARY}
    for name, value in (_settle_windows(_settle_activation(plain)) | rotary(config)).items():
        path = f"{prefix}{name[:LONGEST_NAME]}"
        if isinstance(value, dict) and depth < MOST_NESTED and _is_part(name):
            fields |= flatten(value, f"{path}.", depth + 1)
        else:
            fields[path] = normalise(name, value)
    return fields


def _is_part(name: str) -> bool:
    return name.endswith(PARTS) or name in PART_NAMES


def normalise(name: str, value: object) -> object:
    """A field's value in one form.

    Example:
        >>> normalise("hidden_act", "gelu_new") == normalise("hidden_act", "gelu_pytorch_tanh")
        True
        >>> normalise("eos_token_id", [2]) == normalise("eos_token_id", 2)
        True
    """
    if name in ACTIVATION_FIELDS and isinstance(value, str):
        return ACTIVATIONS.get(value.lower(), value.lower())
    if name.endswith("token_id") and isinstance(value, list):
        return value[0] if len(value) == 1 else sorted(value, key=repr)
    if name in SIZES and isinstance(value, dict):
        lengths = [value[side] for side in sorted(value) if value[side] is not None]
        return lengths[0] if lengths and all(each == lengths[0] for each in lengths) else lengths
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        return value["content"]  # a token with what its tokenizer does about it
    return value


def rotary(config: Fields) -> Fields:
    """What a configuration says of rotary positions, under one set of names.

    transformers 5 writes ``rope_parameters``, once or for each type of layer; older files have
    ``rope_theta`` and ``rope_scaling``, GPT-NeoX has ``rotary_emb_base`` and ``rotary_pct``.

    Returns:
        ``rope_theta``, ``rope_type``, ``rope_factor`` and so on, only what is said; fields of
        layers with sliding windows end with ``[sliding_attention]``.
    """
    found: Fields = {}
    for ours, theirs in (
        ("rope_theta", ("rope_theta", "global_rope_theta", "rotary_emb_base")),
        ("rope_theta[sliding_attention]", ("rope_local_base_freq", "local_rope_theta")),
        ("partial_rotary_factor", ("partial_rotary_factor", "rotary_pct")),
    ):
        for name in theirs:
            if config.get(name) is not None:
                found[ours] = config[name]
    for name in ("rope_scaling", "rope_parameters"):
        value = config.get(name)
        if not isinstance(value, dict):
            continue
        kinds = {kind: part for kind, part in value.items() if isinstance(part, dict)}
        for kind, part in (kinds or {"full_attention": value}).items():
            ending = "" if kind == "full_attention" else f"[{kind[:LONGEST_NAME]}]"
            found |= {f"{name}{ending}": v for name, v in _rotary_part(part).items()}
    return found


def _rotary_part(part: Fields) -> Fields:
    kind = part.get("rope_type", part.get("type"))
    kind = "default" if kind in (None, "mrope") else kind
    rest = {
        name: value
        for name, value in part.items()
        if name not in ("rope_type", "type") and value is not None
    }
    if kind == "linear" and rest.get("factor") == 1:
        kind = "default"
    if kind == "default":
        rest.pop("factor", None)
    named = {
        name if name in ROTARY or name.startswith("rope_") else f"rope_{name}": value
        for name, value in rest.items()
    }
    return named if kind == "default" else {"rope_type": kind, **named}


def _settle_activation(config: Fields) -> Fields:
    """T5's and Gemma's activation under the one field that counts."""
    config = dict(config)
    if "feed_forward_proj" in config:
        config.pop("dense_act_fn", None)
        config.pop("is_gated_act", None)
    if str(config.get("model_type", "")).startswith("gemma") and "hidden_act" in config:
        # The first Gemma's files say gelu; the library takes the approximation all the same.
        config.setdefault("hidden_activation", "gelu_pytorch_tanh")
        config["hidden_activation"] = config["hidden_activation"] or "gelu_pytorch_tanh"
        del config["hidden_act"]
    return config


def _settle_windows(config: Fields) -> Fields:
    """Sliding windows that are switched off, or are never left, count as none."""
    config = dict(config)
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    if config.get("use_sliding_window") is False:
        config["sliding_window"] = None
        config.pop("max_window_layers", None)
    elif isinstance(window, int) and isinstance(longest, int) and window >= longest:
        config["sliding_window"] = None
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds):
        del config["layer_types"]
    return config


def are_equal(name: str, one: object, other: object) -> bool:
    """Whether two values of a field are one: numbers up to the digits that are written."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        with suppress(OverflowError):  # integers without end
            return math.isclose(one, other, rel_tol=CLOSE if name in EPS_FIELDS else 1e-9)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(are_equal(name, a, b) for a, b in zip(one, other, strict=True))
    return one == other


@lru_cache(maxsize=64)
def class_defaults(model_type: str) -> Mapping[str, Any]:
    """What transformers' configuration of a type says where a file does not, by path.

    The class is made without any value of the file, so that nothing of a stranger's is run.

    Returns:
        Empty for a type that it does not know, or where it is not installed.
    """
    try:
        from transformers import CONFIG_MAPPING

        return flatten(CONFIG_MAPPING[model_type]().to_dict())
    except Exception:  # another library's constructors raise what they like
        return {}
