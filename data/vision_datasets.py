"""A user's own images: CIFAR-10, CIFAR-100, MNIST and folders, read through torchvision.

Normalisation constants belong to a dataset. The validation split is taken from the training
images, so that nothing is ever chosen on test images.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.pool_images import Constants, ImageTask, Split, limit_images
from data.tasks import stream
from data.tasks.canvas import Images, Labels
from merge_core.errors import PoolError

SHARE = 0.1  # of the training images, for validation
TINY_ANNOTATIONS = "val_annotations.txt"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class KnownDataset:
    """A dataset of torchvision.

    Attributes:
        title: for people.
        loader: the class in ``torchvision.datasets``.
        mean: of each channel over its training images, of pixels in [0, 1].
        std: likewise.
    """

    title: str
    loader: str
    mean: Constants
    std: Constants


# Measured over each dataset's own training images; the values in common use.
KNOWN = {
    "cifar10": KnownDataset(
        "CIFAR-10", "CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    ),
    "cifar100": KnownDataset(
        "CIFAR-100", "CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
    "mnist": KnownDataset("MNIST", "MNIST", (0.1307,), (0.3081,)),
}
FOLDER = "folder"
VISION_DATASETS = (*KNOWN, FOLDER)


def load_vision_dataset(
    name: str,
    root: Path,
    seed: int = 0,
    limit: int | None = None,
    size: int = 64,
    download: bool = False,
) -> ImageTask:
    """Read a dataset from disk.

    Args:
        name: one of :data:`VISION_DATASETS`.
        root: where torchvision keeps it; for ``folder`` the folder itself, either in the layout
            of Tiny-ImageNet (``train/<class>/images/*.JPEG``, ``val/images`` and
            ``val/val_annotations.txt``) or with one folder of images per class in ``train/`` and
            ``val/``. Its ``val`` is used as test split.
        seed: of the validation split.
        limit: the largest number of images of each split, drawn from all of it.
        size: of images from folders, which are resized to ``size x size`` where they differ.
        download: let torchvision fetch what is missing (not for ``folder``).

    Raises:
        PoolError: a folder missing, in another format, damaged, or without images in a class.
    """
    root = root.expanduser()
    if name in KNOWN:
        known = KNOWN[name]
        train, test, names = _read_torchvision(known, root, download)
        title, mean, std = known.title, known.mean, known.std
    elif name == FOLDER:
        train, test, names = _read_folder(root, size)
        title, (mean, std) = root.resolve().name, IMAGENET
    else:
        raise PoolError(f"No dataset {name!r}. Choose one of {', '.join(VISION_DATASETS)}.")
    fitting, held = _hold_out(train, len(names), stream(seed, name, "validation"), title)
    splits = {"train": fitting, "val": held, "test": test}
    return limit_images(ImageTask(name, title, names, splits, mean, std), limit, seed)


def _read_torchvision(
    known: KnownDataset, root: Path, download: bool
) -> tuple[Split, Split, tuple[str, ...]]:
    """Training and test images and the class names of a dataset that torchvision knows."""
    from torchvision import datasets  # type: ignore[import-untyped]  # no stubs

    if not download and not root.is_dir():
        raise PoolError(f"{root} is not a folder. Give the folder that holds {known.title}.")
    loader: Callable[..., Any] = getattr(datasets, known.loader)
    try:
        train, test = (loader(root, train=part, download=download) for part in (True, False))
    except (
        RuntimeError,  # torchvision: not found or corrupted
        OSError,
        ValueError,
        LookupError,
        EOFError,
        pickle.UnpicklingError,
        AssertionError,
        TypeError,
    ) as fault:
        reason = str(fault).split("\n")[0]
        hint = "" if download else " Give the folder that holds it, or ask for the download."
        raise PoolError(
            f"{root} does not hold {known.title} as torchvision stores it ({reason:.160}).{hint}"
        ) from fault
    names = tuple(str(name) for name in train.classes)
    first, second = (
        (_images(part.data, known.title), np.asarray(part.targets, dtype=np.int64))
        for part in (train, test)
    )
    for images, labels in (first, second):
        if len(labels) == 0 or len(images) != len(labels) or labels.max() >= len(names):
            raise PoolError(f"{root}: {known.title} is damaged: images and labels disagree.")
    return first, second, names


def _images(data: Any, title: str) -> Images:
    images = np.asarray(data)
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4:
        raise PoolError(f"{title} is damaged: images of {images.dtype}, shape {images.shape}.")
    return images


def _read_folder(root: Path, size: int) -> tuple[Split, Split, tuple[str, ...]]:
    """Training and test images and the class names of a folder of images."""
    if not root.is_dir():
        raise PoolError(f"{root} is not a folder. Give the folder that holds train/ and val/.")
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise PoolError(
                f"{root} holds no folder {part}/. Give a folder with train/ and val/, each with "
                "one folder of images per class, or Tiny-ImageNet's own layout."
            )
    paths, labels, names = _classes(root / "train")
    if (root / "val" / TINY_ANNOTATIONS).is_file():
        held, held_labels = _read_annotations(root / "val", names)
    else:
        held, held_labels, held_names = _classes(root / "val")
        if held_names != names:
            odd = sorted(set(names) ^ set(held_names))
            raise PoolError(
                f"{root}: train/ and val/ hold different classes ({', '.join(odd[:3])}). "
                "Give both the same folders."
            )
    return (_read(paths, size), labels), (_read(held, size), held_labels), _read_words(root, names)


def _classes(folder: Path) -> tuple[list[Path], Labels, tuple[str, ...]]:
    """Paths, labels and class names of one folder per class, searched at any depth."""
    from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]  # no stubs

    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as fault:  # no class at all, or one without images
        reason = str(fault).split("\n")[0]
        raise PoolError(
            f"{folder}: {reason:.200} Give every class a folder with images (JPEG, PNG, ...)."
        ) from fault
    labels = np.asarray(found.targets, dtype=np.int64)
    return [Path(path) for path, _ in found.samples], labels, tuple(found.classes)


def _read_annotations(folder: Path, names: Sequence[str]) -> tuple[list[Path], Labels]:
    """Paths and labels of Tiny-ImageNet's validation images: file, class, four box corners."""
    annotations = folder / TINY_ANNOTATIONS
    place = {name: number for number, name in enumerate(names)}
    paths, labels = [], []
    for number, line in enumerate(annotations.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in place:
            raise PoolError(
                f"{annotations}, line {number}: not a file and one of the classes in train/ "
                f"({line[:60]!r}). Restore the original file."
            )
        paths.append(folder / "images" / fields[0])
        labels.append(place[fields[1]])
    if not paths:
        raise PoolError(f"{annotations} names no images. Restore the original file.")
    return paths, np.asarray(labels, dtype=np.int64)


def _read_words(root: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """Tiny-ImageNet's words for its class numbers, where ``words.txt`` gives them."""
    path = root / "words.txt"
    if not path.is_file():
        return names
    lines = path.read_text(encoding="utf-8").splitlines()
    words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    return tuple(words.get(name, name).split(",")[0] for name in names)


def _read(paths: Sequence[Path], size: int) -> Images:
    """Images as RGB, uint8 N x size x size x 3."""
    images = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    for row, path in enumerate(paths):
        try:
            with Image.open(path) as file:
                picture = file.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as fault:
            raise PoolError(f"{path} cannot be read as an image ({fault}). Replace it.") from fault
        if picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        images[row] = np.asarray(picture)
    return images


def _hold_out(
    train: Split, classes: int, rng: np.random.Generator, title: str
) -> tuple[Split, Split]:
    """Training images in two parts: a tenth of each class, at least one image, is held out."""
    images, labels = train
    held = np.zeros(len(labels), dtype=bool)
    for number in range(classes):
        rows = np.flatnonzero(labels == number)
        if len(rows) < 2:
            raise PoolError(
                f"{title}: class {number} has {len(rows)} training images. Give every class at "
                "least two, as one is held out for validation."
            )
        held[rng.permutation(rows)[: max(1, round(SHARE * len(rows)))]] = True
    return (images[~held], labels[~held]), (images[held], labels[held])
