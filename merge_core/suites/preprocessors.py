"""The transform of images that ``preprocessor_config.json`` beside a model says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.compatibility.companions import companions_of
from merge_core.suites.data_spec import TransformSpec

FILE = "preprocessor_config.json"
# PIL's numbers of resampling filters.
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
CROP_PCT = 0.875  # of ConvNeXt's processor where it does not say it
SQUASHED_FROM = 384  # at this size it resizes without a crop


def read_transform(member: Checkpoint) -> TransformSpec | None:
    """The evaluation transform beside a model of transformers; None where it cannot be told."""
    files = companions_of(member) if member.files else None
    config = None if files is None else files.document(FILE)
    return None if config is None else transform_of(config)


def transform_of(config: Mapping[str, Any]) -> TransformSpec | None:
    """A processor's configuration as a transform; None for one that is no resize and crop.

    Source: ``image_processing_*.py`` of transformers.

    Example:
        >>> vit = {"size": {"height": 224, "width": 224}, "resample": 2, "do_normalize": True}
        >>> found = transform_of({**vit, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
        >>> found.size, found.crop_mode, found.interpolation
        (224, 'squash', 'bilinear')
    """
    if config.get("do_resize") is False or config.get("do_rescale") is False:
        return None
    geometry = _geometry(config)
    interpolation = FILTERS.get(config.get("resample", 2))
    if geometry is None or interpolation is None:
        return None
    constants: dict[str, Any] = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    if config.get("do_normalize") is not False:
        constants = {"mean": config.get("image_mean"), "std": config.get("image_std")}
    try:
        return TransformSpec.model_validate(
            {**geometry, **constants, "interpolation": interpolation}
        )
    except ValidationError:  # a stranger's numbers
        return None


def _geometry(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Size, share and kind of the crop; None for images that come out in several sizes."""
    edge, square = _edge(config.get("size")), _square(config.get("size"))
    crop = _square(config.get("crop_size"))
    if config.get("do_center_crop") and crop is not None:
        whole = edge or square
        if whole is None or crop > whole:
            return None
        mode = "center" if edge is not None else "squash"
        return {"size": crop, "crop_pct": crop / whole, "crop_mode": mode}
    if "crop_pct" in config and edge is not None:  # ConvNeXt's
        if edge >= SQUASHED_FROM:
            return {"size": edge, "crop_mode": "squash"}
        share = config["crop_pct"] or CROP_PCT
        return {"size": edge, "crop_pct": share, "crop_mode": "center"}
    return None if square is None else {"size": square, "crop_mode": "squash"}


def _edge(size: Any) -> int | None:
    """The length of the shorter side."""
    edge = size.get("shortest_edge") if isinstance(size, dict) else None
    return edge if isinstance(edge, int) else None


def _square(size: Any) -> int | None:
    """The side of a square."""
    if isinstance(size, int):
        return size
    sides = [size.get("height"), size.get("width")] if isinstance(size, dict) else [None]
    return sides[0] if isinstance(sides[0], int) and sides[0] == sides[-1] else None
