"""Heads made of class names by the text tower of a CLIP.

The weight of class c is e^s · n(mean over templates of n(text features)), n dividing by the norm
and s the model's log scale of logits; features of images are divided by their norm as well.
Source: Radford et al., arXiv:2103.00020, section 3.1.4, and the code released with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.data_sources.prepared import class_names
from analysis.data_sources.text import open_tokenizer
from analysis.networks.limits import Size, build_within, find_fetching
from analysis.networks.towers import open_clip_config
from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import CheckpointError, SuiteError
from merge_core.files import cache_dir, digest_of, write_atomically
from merge_core.input_files import read_bounded
from merge_core.suites.data_files import head_identity, read_names, tower_path
from merge_core.suites.data_spec import HeadSpec, ZeroShotSpec
from merge_core.suites.suite import Suite

FORMAT = "zero-shot-1"
MARK = "{}"
SCALE = "logit_scale"
CONFIG_BYTES = 10_000_000

# From texts to their features, texts x width.
Encode = Callable[[Sequence[str]], Tensor]


def zero_shot_weight(suite: Suite, task: str, made: ZeroShotSpec) -> Tensor:
    """The weight of a task's zero-shot head; computed once and kept by content.

    Args:
        suite: the suite.
        task: whose head.
        made: how it is made.

    Returns:
        float32, classes x width.

    Raises:
        SuiteError: no class names, a template without a place for them, a tower that is not
            there or does not fit, or a package that is not installed.
        HubError: a tower on the hub that is not downloaded.
    """
    from safetensors.torch import load, save

    what = f"head of task {task!r}"
    names = _names(suite, task, made, what)
    templates = read_names(made.templates, suite.file, f"templates of {what}")
    if bad := [template for template in templates if template.count(MARK) != 1]:
        raise SuiteError(f"Templates of {what}: {bad[0]!r:.80} must hold {MARK} once.")
    identity = head_identity(HeadSpec(zero_shot=made), suite.file, what)
    path = cache_dir() / "heads" / f"{digest_of(FORMAT, identity, *names)}.safetensors"
    try:
        return load(path.read_bytes())["weight"]
    except Exception:  # missing, or damaged in any way: made again
        pass
    encode, scale = _tower(made, tower_path(made, suite.file, what), what)
    weight = class_weights(encode, scale, names, templates)
    write_atomically(path, save({"weight": weight}))
    return weight


@torch.no_grad()
def class_weights(
    encode: Encode, scale: float, names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """The weight of a zero-shot head.

    Args:
        encode: the text tower.
        scale: by which cosines are multiplied (e^s).
        names: of the classes.
        templates: texts in which ``{}`` stands for the name.

    Returns:
        float32, classes x width; every row has norm `scale`.
    """
    rows = []
    for name in names:
        features = encode([template.replace(MARK, name) for template in templates])
        mean = torch.nn.functional.normalize(features, dim=-1).mean(dim=0)
        rows.append(scale * torch.nn.functional.normalize(mean, dim=0))
    return torch.stack(rows).float().contiguous()


def _names(suite: Suite, task: str, made: ZeroShotSpec, what: str) -> tuple[str, ...]:
    if made.classes is not None:
        return read_names(made.classes, suite.file, f"classes of {what}")
    data = suite.spec.experts[task].data
    names = None if data is None else class_names(data, suite.file, f"data of task {task!r}")
    if not names:
        raise SuiteError(
            f"The zero-shot {what} needs class names, and its data have none. Add 'classes' to "
            "'zero_shot'."
        )
    return tuple(name.replace("_", " ") for name in names)  # apple_pie is written as apple pie


def _tower(made: ZeroShotSpec, path: Path, what: str) -> tuple[Encode, float]:
    """What encodes texts, and the scale of its logits."""
    try:
        checkpoint = Checkpoint(path)
        if SCALE not in checkpoint:
            raise SuiteError(
                f"{path} ({what}) holds no {SCALE!r}, so it is no whole CLIP. Give one as "
                "text_tower."
            )
        scale = math.exp(float(checkpoint.tensor(SCALE)))
        if made.model is None:
            return _transformers_encoder(path, checkpoint, what), scale
        return _open_clip_encoder(made.model, path, checkpoint, what), scale
    except CheckpointError as fault:
        raise SuiteError(f"Text tower of the {what}: {fault}") from fault


def _transformers_encoder(path: Path, checkpoint: Checkpoint, what: str) -> Encode:
    try:
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection
    except ImportError as fault:
        raise SuiteError(
            "A text tower of transformers needs that package: pip install 'mergescope[text]'."
        ) from fault
    try:
        fields = _text_fields(path / "config.json", CLIPTextConfig().to_dict())
        tokenizer = open_tokenizer(path)
        model: Any = build_within(
            Size.of(checkpoint),
            fields,
            lambda: CLIPTextModelWithProjection(CLIPTextConfig(**fields)),
        ).eval()
    except Exception as fault:  # files of another form make the library raise almost anything
        raise _misfit_error(path, what, fault) from fault
    _fill(model, checkpoint, path, what)

    def encode(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        features: Tensor = model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).text_embeds
        return features

    return encode


def _text_fields(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """The text half of a CLIP's configuration: numbers and names alone, of those that are known.

    Raises:
        ValueError, OSError: it cannot be read, or names something to fetch.
    """
    whole = json.loads(read_bounded(path, CONFIG_BYTES))
    given = whole.get("text_config_dict") or whole.get("text_config") or {}  # old files have both
    fields = {
        name: value
        for name, value in given.items()
        if name in known
        and not name.startswith("_")
        and isinstance(value, bool | int | float | str)
    }
    if (fetching := find_fetching("clip", fields)) is not None:
        raise ValueError(f"{fetching} would fetch files")
    return fields | {"projection_dim": whole.get("projection_dim", known["projection_dim"])}


def _open_clip_encoder(name: str, path: Path, checkpoint: Checkpoint, what: str) -> Encode:
    try:
        import open_clip
    except ImportError as fault:
        raise SuiteError(
            "A text tower of open_clip needs the package open_clip_torch: "
            "pip install 'mergescope[clip]'."
        ) from fault
    config = open_clip_config(open_clip, name)
    if config is None:
        raise SuiteError(f"The {what}: open_clip knows no model {name!r:.80}.")
    if any(key.startswith("hf_") for key in config["text_cfg"]):
        raise SuiteError(
            f"The {what}: the text tower of {name!r} is one of the hub's, which would be "
            "fetched. Give a CLIP with a text tower of its own."
        )
    try:
        model: Any = build_within(
            Size.of(checkpoint),
            [],
            lambda: open_clip.create_model(
                name, load_weights=False, device=torch.get_default_device()
            ),
        ).eval()
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as fault:  # as above
        raise _misfit_error(path, what, fault) from fault
    _fill(model, checkpoint, path, what, only=_text_parameters(model))

    def encode(texts: Sequence[str]) -> Tensor:
        features: Tensor = model.encode_text(tokenizer(list(texts)))
        return features

    return encode


def _text_parameters(model: Any) -> set[str]:
    """The parameters of an open_clip model that its text features need."""
    visual = ("visual.", SCALE, "logit_bias")
    return {name for name in model.state_dict() if not name.startswith(visual)}


def _fill(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    path: Path,
    what: str,
    only: set[str] | None = None,
) -> None:
    """Put a checkpoint's tensors into a model, all of those that are asked for."""
    own: Mapping[str, Tensor] = model.state_dict()
    wanted = set(own) if only is None else only
    if missing := sorted(name for name in wanted if name not in checkpoint):
        raise SuiteError(
            f"{path} ({what}) lacks {missing[0]!r} ({len(missing)} in all), so it is no CLIP of "
            "this form. Correct text_tower or model."
        )
    for name in wanted:
        value = checkpoint.tensor(name)
        if value.shape != own[name].shape:
            raise SuiteError(
                f"{path} ({what}): {name!r} has shape {tuple(value.shape)}, not "
                f"{tuple(own[name].shape)}. Correct text_tower or model."
            )
        own[name].copy_(value)  # own holds the model's memory


def _misfit_error(path: Path, what: str, fault: Exception) -> SuiteError:
    reason = str(fault).strip().split("\n")[0]
    return SuiteError(f"{path} ({what}) cannot be used as a text tower: {reason:.200}")
