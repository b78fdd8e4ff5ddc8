"""Transforms: pixel by pixel those of timm and open_clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from analysis.data_sources.transforms import geometric_transform, resolve_transform
from analysis.outputs.inputs import normalise_pixels
from merge_core.errors import SuiteError
from merge_core.suites.preprocessors import transform_of
from merge_core.suites.suite_spec import ArchitectureSpec
from tests.analysis.data_sources.files import noise, spec

WHAT = "data of task 'a'"
SIZES = ((40, 29), (31, 64), (33, 33), (300, 260))


def pictures() -> list[Image.Image]:
    """Images of all sorts: sizes, grey, with transparency, with a palette."""
    found = [Image.fromarray(noise(1, *size, 3, seed=i)[0]) for i, size in enumerate(SIZES)]
    return [*found, found[0].convert("L"), found[1].convert("RGBA"), found[2].convert("P")]


def through_ours(picture: Image.Image, architecture: ArchitectureSpec, **fields: Any) -> Any:
    transform = resolve_transform(spec(file="a.npz", **fields), architecture, WHAT)
    assert transform is not None
    return normalise_pixels(
        geometric_transform(transform)(picture)[None], transform.mean, transform.std
    )[0]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 1}),
        ("vit_base_patch32_clip_224", {"depth": 1, "embed_dim": 24}),
        ("resnet18", {}),
        ("test_vit", {}),
        ("test_efficientnet", {}),
    ],
)
def test_timm(name: str, args: dict[str, Any]) -> None:
    given = ArchitectureSpec(name=name, args=args)
    model = timm.create_model(name, pretrained=False, **args)
    config = resolve_model_data_config(model, {k: v for k, v in args.items() if k == "img_size"})
    theirs = create_transform(**config, is_training=False)
    for picture in pictures():
        expected = theirs(picture.convert("RGB"))
        ours = through_ours(picture, given, transform="timm")
        assert ours.shape == expected.shape == config["input_size"]
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
def test_written_out(mode: str, interpolation: str) -> None:
    fields = {
        "size": 24,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.5, 0.6, 0.7),
        "interpolation": interpolation,
        "crop_pct": 0.8,
        "crop_mode": mode,
    }
    config = {k: v for k, v in fields.items() if k != "size"}
    theirs = create_transform((3, 24, 24), is_training=False, **config)  # type: ignore[arg-type]
    for picture in pictures():
        ours = through_ours(picture, ArchitectureSpec(name="any"), transform=fields)
        torch.testing.assert_close(ours, theirs(picture.convert("RGB")), rtol=0, atol=2e-7)


@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        (ArchitectureSpec(name="ViT-B-32", library="open_clip"), 224),
        (ArchitectureSpec(name="ViT-L-14-336", library="open_clip"), 336),
        (
            ArchitectureSpec(
                name="ViT-B-32", library="open_clip", args={"vision_cfg": {"image_size": 48}}
            ),
            48,
        ),
        (ArchitectureSpec(name="clip_vision_model", library="transformers"), 224),
        (
            ArchitectureSpec(name="x", library="transformers", args={"image_size": 30}),
            30,
        ),
        (ArchitectureSpec(name="test_vit", args={"img_size": 64}), 64),
    ],
)
def test_open_clip(architecture: ArchitectureSpec, size: int) -> None:
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.image_transform(size, is_train=False)
    for picture in pictures():
        ours = through_ours(picture, architecture, transform="open_clip")
        torch.testing.assert_close(ours, theirs(picture.convert("RGB")), rtol=0, atol=2e-7)


def test_what_is_not_said_comes_from_the_architecture() -> None:
    vit, clip = (
        ArchitectureSpec(name="test_vit"),
        ArchitectureSpec(name="clip_vision_model", library="transformers"),
    )
    folder = {"kind": "folder", "path": "f"}
    assert resolve_transform(spec(**folder), vit, WHAT) == resolve_transform(
        spec(file="a", transform="timm"), vit, WHAT
    )
    assert resolve_transform(spec(**folder), clip, WHAT) == resolve_transform(
        spec(file="a", transform="open_clip"), clip, WHAT
    )
    assert resolve_transform(spec(**folder, mean=[0, 0, 0]), vit, WHAT) is None
    assert resolve_transform(spec(file="a"), vit, WHAT) is None
    grey = Image.fromarray(noise(1, 5, 6)[0])
    np.testing.assert_array_equal(
        geometric_transform(None)(grey), np.stack([np.asarray(grey)] * 3, axis=-1)
    )


@pytest.mark.parametrize(
    "architecture", [None, ArchitectureSpec(name="mlp"), ArchitectureSpec(name="no_such")]
)
def test_a_transform_that_is_not_known_must_be_written_out(
    architecture: ArchitectureSpec | None,
) -> None:
    with pytest.raises(SuiteError, match=r"Data of task 'a'.*transform: \{size: 224"):
        resolve_transform(spec(file="a", transform="timm"), architecture, WHAT)


def test_a_network_of_transformers_without_a_processors_file_must_have_it_written_out() -> None:
    vit = ArchitectureSpec(name="vit", library="transformers")
    with pytest.raises(SuiteError, match=r"no preprocessor_config\.json.*'vit' takes images"):
        resolve_transform(spec(kind="folder", path="f"), vit, WHAT)


PROCESSORS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {"size": {"height": 32, "width": 32}},
    "BitImageProcessor": {  # DINOv2's
        **{"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "resample": 3},
        **{"do_center_crop": True, "image_mean": [0.485, 0.456, 0.406]},
    },
    "ConvNextImageProcessor": {"size": {"shortest_edge": 32}, "crop_pct": 0.875, "resample": 3},
    "SiglipImageProcessor": {"size": {"height": 32, "width": 32}, "resample": 3},
}


@pytest.mark.parametrize("kind", sorted(PROCESSORS))
def test_processors_of_transformers_give_what_their_files_say(kind: str, tmp_path: Path) -> None:
    """Smooth pictures whose margins are even: where they are odd, two libraries' centres are a
    pixel apart, and on noise the roundings of their resizing add up."""
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, kind)(**PROCESSORS[kind])
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    found = transform_of(config)
    assert found is not None
    for size in ((60, 60), (120, 60), (60, 120)):
        rows, columns = np.meshgrid(*(np.linspace(0, 3, n) for n in size), indexing="ij")
        waves = [np.sin(rows + phase) * np.cos(2 * columns) for phase in range(3)]
        picture = Image.fromarray((127 + 120 * np.stack(waves, axis=-1)).astype(np.uint8))
        theirs = processor(picture, return_tensors="pt")["pixel_values"][0]
        pixels = geometric_transform(found)(picture)[None]
        ours = normalise_pixels(pixels, found.mean, found.std)[0]
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 2.01 / 255 / min(found.std)  # two levels of 255
