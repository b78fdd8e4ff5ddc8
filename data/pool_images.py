"""Images of one classification task in three splits: what pools are trained and measured on."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.tasks import stream
from data.tasks.canvas import Images, Labels
from merge_core.errors import PoolError
from merge_core.files import write_atomically

SPLITS = ("train", "val", "test")

Split = tuple[Images, Labels]
Constants = tuple[float, ...]


@dataclass(frozen=True)
class ImageTask:
    """A classification task.

    Attributes:
        name: short, such as ``digits``.
        title: for people.
        class_names: one per class.
        splits: train, val and test: uint8 images N x H x W x channels and int64 labels N.
        mean: normalisation constants of the dataset, one per channel, of pixels in [0, 1].
        std: likewise.
        shipped: how many training images are stored beside the models; all when None.
    """

    name: str
    title: str
    class_names: tuple[str, ...]
    splits: dict[str, Split] = field(repr=False)
    mean: Constants
    std: Constants
    shipped: int | None = None

    @property
    def channels(self) -> int:
        """The number of colour channels."""
        return int(self.splits["train"][0].shape[-1])

    @property
    def size(self) -> int:
        """Pixels along a side."""
        return int(self.splits["train"][0].shape[1])


def pixel_constants(images: Images) -> tuple[Constants, Constants]:
    """Mean and standard deviation of each channel of N x H x W x C, in units of the full scale."""
    pixels = images.reshape(-1, images.shape[-1]) / 255
    return (
        tuple(round(float(value), 4) for value in pixels.mean(axis=0)),
        tuple(round(float(value), 4) for value in pixels.std(axis=0)),
    )


def normaliser(
    mean: Sequence[float], std: Sequence[float], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """From uint8 N x C x H x W to float32 (x / 255 − mean) / std, like `outputs.inputs.scaled`."""
    shift, scale = (torch.tensor(c, device=device).reshape(-1, 1, 1) for c in (mean, std))
    return lambda images: (images.float() / 255 - shift) / scale


def image_digests(images: Images) -> set[bytes]:
    """A digest of each of N images."""
    return {hashlib.sha256(image.tobytes()).digest() for image in images}


def check_disjoint(task: ImageTask) -> None:
    """Refuse splits of which two share an image.

    Raises:
        PoolError: they do.
    """
    digests = {name: image_digests(images) for name, (images, _) in task.splits.items()}
    for first, second in itertools.combinations(SPLITS, 2):
        if shared := digests[first] & digests[second]:
            raise PoolError(
                f"{task.name}: {first} and {second} share {len(shared)} images. "
                "Remove the duplicates, or choose another seed."
            )


def subset(split: Split, most: int | None, rng: np.random.Generator) -> Split:
    """At most `most` images of a split, drawn at random, in their old order."""
    images, labels = split
    if most is None or most >= len(labels):
        return split
    rows = np.sort(rng.permutation(len(labels))[:most])
    return images[rows], labels[rows]


def limit_images(task: ImageTask, limit: int | None, seed: int) -> ImageTask:
    """A task with at most `limit` images in each split.

    Raises:
        PoolError: a limit below 1.
    """
    if limit is None:
        return task
    if limit < 1:
        raise PoolError(f"The limit must be at least 1 image, got {limit}.")
    splits = {
        name: subset(split, limit, stream(seed, task.name, name, "limit"))
        for name, split in task.splits.items()
    }
    return replace(task, splits=splits)


def write_inputs(path: Path, task: ImageTask) -> None:
    """Write a task as the numpy archive that pools read.

    Raises:
        OutputError: the file cannot be written.
    """
    arrays: dict[str, np.ndarray] = {"class_names": np.array(task.class_names)}
    for name, split in task.splits.items():
        most = task.shipped if name == "train" else None
        images, labels = subset(split, most, stream(0, task.name, "shipped"))
        arrays[f"{name}_images"], arrays[f"{name}_labels"] = images, labels
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # numpy's stubs
    write_atomically(path, buffer.getvalue())
