"""The network that a model's own ``config.json`` names, in the words of ``suite.yaml``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.compatibility.companions import companions_of
from merge_core.compatibility.config_values import class_defaults
from merge_core.opening.draft import Layout, guess_architecture
from merge_core.suites.suite_spec import ArchitectureSpec

# Types of transformers that can be run; the whole CLIP stands for its vision tower.
RUNNABLE = ("clip_vision_model", "gpt2", "roberta")
WHOLE = {"clip": ("clip_vision_model", "vision_config", "projection_dim")}
# What a network is built from; the rest of a configuration is training, tokens and labels.
ARGUMENTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("vocab_size", "max_position_embeddings", "type_vocab_size", "hidden_act", "layer_norm_eps"),
    *("n_embd", "n_inner", "n_layer", "n_head", "n_positions", "activation_function"),
    *("layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
    *("image_size", "patch_size", "num_channels", "projection_dim", "pad_token_id"),
)
TIMM_NAME = re.compile(r"[a-z0-9_]{1,80}")


def name_architecture(
    layouts: Sequence[Layout], members: Sequence[Checkpoint | None]
) -> ArchitectureSpec | None:
    """The network of all members, told from their layouts, else from their configurations.

    Args:
        layouts: shape of each parameter by name, of each member.
        members: the same members; None where headers are not known.

    Returns:
        None where nothing is told, or members tell different things.
    """
    guessed = [guess_architecture(layout) for layout in layouts]
    if guessed and guessed[0] is not None and all(each == guessed[0] for each in guessed):
        return guessed[0]
    told = [read_architecture(member) for member in members if member is not None]
    known = [each for each in told if each is not None]
    return known[0] if known and all(each == known[0] for each in known) else None


def read_architecture(member: Checkpoint) -> ArchitectureSpec | None:
    """What ``config.json`` beside a model names, where it is here and can be run."""
    files = companions_of(member) if member.files else None
    config = None if files is None else files.document("config.json")
    return None if config is None else of_config(config)


def of_config(config: Mapping[str, Any]) -> ArchitectureSpec | None:
    """The network of a configuration of timm or transformers; None where it cannot be run.

    Example:
        >>> of_config({"architecture": "resnet18", "num_classes": 10}).name
        'resnet18'
        >>> of_config({"model_type": "gpt2", "n_embd": 64, "n_head": 12}).args
        {'n_embd': 64}
    """
    name = config.get("architecture")
    if isinstance(name, str):
        args = config.get("model_args")
        plain = {k: v for k, v in args.items() if _is_plain(v)} if isinstance(args, dict) else {}
        return ArchitectureSpec(name=name, args=plain) if TIMM_NAME.fullmatch(name) else None
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in WHOLE:
        kind, part, beside = WHOLE[kind]
        inner = config.get(part)
        inner = inner if isinstance(inner, dict) else {}
        config = {**inner, **({beside: config[beside]} if beside in config else {})}
    if kind not in RUNNABLE:
        return None
    defaults = class_defaults(kind)
    args = {
        name: config[name]
        for name in ARGUMENTS
        if name in config and _is_plain(config[name]) and name in defaults
        if config[name] != defaults[name]
    }
    return ArchitectureSpec(name=kind, args=args, library="transformers") if defaults else None


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | int | float | str)
