"""Small files in each format, written here and not by the code that reads them."""

from __future__ import annotations

import gzip
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from merge_core.suites.data_spec import DataSpec

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = [f"data_batch_{i}" for i in range(1, 6)]


def noise(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Seeded uint8 noise, count x shape."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def cycle(count: int, classes: int, seed: int = 0) -> np.ndarray:
    """Labels in a seeded order, every class about as often."""
    return np.random.default_rng(seed + 1).permutation(np.arange(count) % classes)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an array of bytes as MNIST's files are; packed if the name says so."""
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    data = head + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_mnist(folder: Path, train: int = 20, test: int = 12, packed: bool = False) -> None:
    """MNIST's four files with noise of 6 x 6 pixels in 3 classes."""
    folder.mkdir(parents=True, exist_ok=True)
    end = ".gz" if packed else ""
    for split, count, seed in (("train", train, 0), ("t10k", test, 1)):
        write_idx(folder / f"{split}-images-idx3-ubyte{end}", noise(count, 6, 6, seed=seed))
        write_idx(folder / f"{split}-labels-idx1-ubyte{end}", cycle(count, 3, seed))


def planes(images: np.ndarray) -> np.ndarray:
    """N x 32 x 32 x 3 as CIFAR's rows: red, green and blue planes."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def write_cifar10(folder: Path, protocol: int = 2, each: int = 4) -> dict[str, Any]:
    """The Python archive of CIFAR-10 with noise; split to (images, labels)."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {}
    for split, names in (("train", BATCHES), ("test", ["test_batch"])):
        images = noise(each * len(names), 32, 32, 3, seed=len(names))
        labels = cycle(len(images), 10, len(names))
        whole[split] = (images, labels)
        for row, name in enumerate(names):
            part = slice(row * each, (row + 1) * each)
            content = {
                b"data": planes(images[part]),
                b"labels": labels[part].tolist(),
                b"filenames": [b"a.png"] * each,
                b"batch_label": b"testing batch 1 of 1",
            }
            (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
    meta = {b"label_names": [name.encode() for name in CIFAR10], b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=protocol))
    return whole


def write_folder(folder: Path, splits: Mapping[str, int], classes: list[str]) -> None:
    """Image files of unequal sizes: `splits` says how many of each class."""
    for number, (split, count) in enumerate(splits.items()):
        for label, name in enumerate(classes):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(count):
                shape = (10 + i, 12, 3)
                picture = noise(1, *shape, seed=100 * number + 10 * label + i)[0]
                Image.fromarray(picture).save(place / f"{i}.png")


def spec(**fields: Any) -> DataSpec:
    """A DataSpec of those fields."""
    return DataSpec.model_validate(fields)
