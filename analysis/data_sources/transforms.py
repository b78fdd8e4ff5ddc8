"""From a stored image to the network's input, for evaluation: the same every time.

The geometry is timm's evaluation transform, which with open_clip's settings is open_clip's, up to
the 8-bit image; normalisation follows when a batch is run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from PIL import Image

from merge_core.errors import SuiteError
from merge_core.suites.data_spec import DataSpec, TransformSpec
from merge_core.suites.suite_spec import ArchitectureSpec

# open_clip.constants, and CLIPImageProcessor of transformers.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
USUAL_SIZE = 224


def resolve_transform(
    data: DataSpec, architecture: ArchitectureSpec | None, what: str
) -> TransformSpec | None:
    """The transform of a task's images, written out; None where they are only normalised.

    Args:
        data: what suite.yaml says; where it says nothing about a transform, that of the
            architecture's library.
        architecture: the suite's.
        what: whose data these are, for messages.

    Raises:
        SuiteError: the library's transform is asked for, and there is no architecture, or none
            that the library knows.
    """
    if data.normalised_only:
        return None
    if isinstance(data.transform, TransformSpec):
        return data.transform
    if architecture is None:
        raise SuiteError(
            f"{what[0].upper()}{what[1:]}: the suite names no architecture, so its transform is "
            "not known. Write it out: transform: {size: 224, mean: [...], std: [...]}."
        )
    name = data.transform or _usual(architecture)
    if name is None:
        raise SuiteError(
            f"{what[0].upper()}{what[1:]}: no preprocessor_config.json beside the base says how "
            f"{architecture.name!r} takes images. Write it out: transform: {{size: 224, "
            "mean: [...], std: [...]}."
        )
    if name == "timm":
        return _timm_transform(architecture, what)
    return TransformSpec(size=_image_size(architecture, what), mean=CLIP_MEAN, std=CLIP_STD)


def _usual(architecture: ArchitectureSpec) -> Literal["timm", "open_clip"] | None:
    """Whose transform images get where none is named."""
    if architecture.library == "timm":
        return "timm"
    clip = architecture.library == "open_clip" or architecture.name == "clip_vision_model"
    return "open_clip" if clip else None


def _timm_transform(architecture: ArchitectureSpec, what: str) -> TransformSpec:
    """timm's data configuration of the architecture, for the image size that its arguments set."""
    from timm import get_pretrained_cfg, is_model  # three seconds: only where images are prepared
    from timm.data import resolve_data_config

    name = architecture.name
    known = get_pretrained_cfg(name) if architecture.library == "timm" and is_model(name) else None
    if known is None:
        raise SuiteError(
            f"{what[0].upper()}{what[1:]}: timm knows no transform of {name!r}. Write it out: "
            "transform: {size: 224, mean: [...], std: [...]}."
        )
    size = architecture.args.get("img_size")
    args = {"img_size": size} if isinstance(size, int) else {}
    found: dict[str, Any] = resolve_data_config(args, known.to_dict())
    return TransformSpec(
        size=found["input_size"][-1],
        mean=found["mean"],
        std=found["std"],
        interpolation=found["interpolation"],
        crop_pct=found["crop_pct"],
        crop_mode=found["crop_mode"],
    )


def _image_size(architecture: ArchitectureSpec, what: str) -> int:
    """The image size of a CLIP's visual tower."""
    args = architecture.args
    if architecture.library == "timm":
        return _timm_transform(architecture, what).size
    if architecture.library == "transformers":
        size = args.get("image_size", USUAL_SIZE)
    else:
        try:
            from open_clip import get_model_config
        except ImportError as fault:
            raise SuiteError(
                "open_clip's models need the package open_clip_torch: "
                "pip install 'mergescope[clip]'."
            ) from fault
        vision = (get_model_config(architecture.name) or {}).get("vision_cfg", {})
        size = (vision | args.get("vision_cfg", {})).get("image_size", USUAL_SIZE)
    if not isinstance(size, int):
        raise SuiteError(
            f"{what[0].upper()}{what[1:]}: the network's images are no squares. Write the "
            "transform out."
        )
    return size


def geometric_transform(transform: TransformSpec | None) -> Callable[[Image.Image], np.ndarray]:
    """From an image to uint8, H x W x 3: resized and cropped, not normalised.

    Args:
        transform: written out; None leaves the size as it is.

    Example:
        >>> squared = geometric_transform(None)
        >>> squared(Image.new("L", (4, 2))).shape
        (2, 4, 3)
    """
    if transform is None:
        return lambda image: np.asarray(image.convert("RGB"))
    from timm.data import create_transform

    change = create_transform(
        input_size=(3, transform.size, transform.size),
        is_training=False,
        interpolation=transform.interpolation,
        mean=transform.mean,
        std=transform.std,
        crop_pct=transform.crop_pct,
        crop_mode=transform.crop_mode,
        normalize=False,
    )
    return lambda image: np.asarray(change(image.convert("RGB")).permute(1, 2, 0))
