"""A tiny suite that can be evaluated, and routes to its numbers that share no code with ours."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_core.suites.suite import Suite, load_suite
from merge_core.yaml_text import dump_yaml

TASKS = ("digits", "shapes", "lines")
WIDTH, CLASSES, SIZE, IMAGES = 16, 4, 16, 20
ARCHITECTURE: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "args": {"img_size": SIZE, "patch_size": 8, "embed_dim": WIDTH, "depth": 1, "num_heads": 2},
}
# Each task its own constants, so that a mix-up of tasks changes the numbers.
MEANS = {"digits": (0.5, 0.5, 0.5), "shapes": (0.4, 0.45, 0.5), "lines": (0.1, 0.2, 0.3)}
STDS = {"digits": (0.5, 0.5, 0.5), "shapes": (0.2, 0.25, 0.3), "lines": (0.3, 0.3, 0.2)}


def timm_model(architecture: Mapping[str, Any] = ARCHITECTURE) -> torch.nn.Module:
    """The bare timm model in evaluation mode."""
    model = timm.create_model(architecture["name"], num_classes=0, **architecture["args"])
    return model.eval()


def by_hand(
    state: Mapping[str, Tensor], folder: Path, task: str, split: str, limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted classes and labels of one split: load_state_dict, numpy normalisation, F.linear."""
    model = timm_model()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    with np.load(folder / f"inputs/{task}.npz") as archive:
        images, labels = archive[f"{split}_images"][:limit], archive[f"{split}_labels"][:limit]
    pixels = (images.astype(np.float32) / 255 - np.float32(MEANS[task])) / np.float32(STDS[task])
    head = load_file(folder / f"heads/{task}.safetensors")
    with torch.no_grad():
        features = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).contiguous())
        logits = torch.nn.functional.linear(features, head["weight"], head["bias"])
    return logits.argmax(1).numpy(), labels


def write_evaluable(
    folder: Path, tasks: Sequence[str] = TASKS, seed: int = 0, with_base: bool = True, **fields: Any
) -> Path:
    """Write a suite whose experts are right on most images of their own task.

    Labels are the expert's own predictions with every fourth one moved by a class.

    Returns:
        Path of its suite.yaml; `fields` replace or add fields of that file.
    """
    for name in ("experts", "heads", "inputs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    source = torch.Generator().manual_seed(seed)
    numbers = np.random.default_rng(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    shapes = {name: value.shape for name, value in timm_model().state_dict().items()}
    base = {
        n: 0.25 * draw(*s) + float("norm" in n and n.endswith("weight")) for n, s in shapes.items()
    }
    for task in tasks:
        expert = {name: value + 0.3 * draw(*value.shape) for name, value in base.items()}
        save_file(expert, folder / f"experts/{task}.safetensors")
        head = {"weight": draw(CLASSES, WIDTH), "bias": 0.1 * draw(CLASSES)}
        save_file(head, folder / f"heads/{task}.safetensors")
        arrays: dict[str, np.ndarray] = {}
        for split in ("val", "test"):
            arrays[f"{split}_images"] = numbers.integers(
                0, 256, (IMAGES, SIZE, SIZE, 3), dtype=np.uint8
            )
            arrays[f"{split}_labels"] = np.zeros(IMAGES, dtype=np.int64)
        arrays["class_names"] = np.array([f"{task}-{i}" for i in range(CLASSES)])
        np.savez(folder / f"inputs/{task}.npz", **arrays)
        for split in ("val", "test"):
            labels, _ = by_hand(expert, folder, task, split)
            labels[::4] = (labels[::4] + 1) % CLASSES
            arrays[f"{split}_labels"] = labels
        np.savez(folder / f"inputs/{task}.npz", **arrays)
    document: dict[str, Any] = {
        "name": "evaluable",
        "architecture": ARCHITECTURE,
        "experts": {
            task: {
                "weights": f"experts/{task}.safetensors",
                "head": f"heads/{task}.safetensors",
                "data": {
                    "file": f"inputs/{task}.npz",
                    "mean": list(MEANS[task]),
                    "std": list(STDS[task]),
                },
            }
            for task in tasks
        },
    }
    if with_base:
        save_file(base, folder / "base.safetensors")
        document["base"] = "base.safetensors"
    return write_document(folder, {**document, **fields})


@cache
def _master() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    write_evaluable(Path(folder.name))
    return folder


def copy_evaluable(folder: Path) -> Suite:
    """A fresh copy of the suite of :func:`write_evaluable`, free to be edited."""
    shutil.copytree(_master().name, folder)
    return load_suite(folder)


def state_of(suite: Suite, task: str | None = None) -> dict[str, Tensor]:
    """An expert's (or the base's) tensors, straight from the file."""
    name = "base.safetensors" if task is None else f"experts/{task}.safetensors"
    return load_file(suite.root / name)


def write_document(folder: Path, document: Mapping[str, Any]) -> Path:
    """Write a suite.yaml and return its path."""
    path = folder / "suite.yaml"
    path.write_text(dump_yaml(dict(document)), encoding="utf-8")
    return path


def edit_document(folder: Path, **fields: Any) -> Suite:
    """Change top-level fields of a written suite.yaml (None removes) and load it."""
    document = yaml.safe_load((folder / "suite.yaml").read_text(encoding="utf-8"))
    document |= fields
    kept = {name: value for name, value in document.items() if value is not None}
    return load_suite(write_document(folder, kept))


def edit_arrays(path: Path, **arrays: np.ndarray | None) -> None:
    """Replace arrays of a numpy archive (None removes one)."""
    with np.load(path) as archive:
        kept = dict(archive)
    kept |= arrays
    np.savez(path, **{name: value for name, value in kept.items() if value is not None})
