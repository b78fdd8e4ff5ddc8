"""Numpy archives: ``{split}_images`` (uint8, N x H x W x 3) and ``{split}_labels``."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from analysis.data_sources.source import UNLABELLED, Pixels, Request, Source
from merge_core.errors import MergeScopeError, SuiteError
from merge_core.input_files import check_regular

ENDING = "_images"
MOST_CLASSES = 1_000_000
# Pictures drawn by rule shrink a hundredfold; what shrinks more was made to fill the memory.
MOST_EXPANSION = 200
ALWAYS_UNPACKED = 1_000_000_000


@dataclass(frozen=True)
class TaskInputs:
    """One split of one task.

    Attributes:
        images: uint8, N x H x W x channels; perhaps mapped from a file. Of texts their tokens,
            int32, N x L.
        labels: int64, N, in 0..classes−1; all :data:`UNLABELLED` where there are none.
        class_names: one per class.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]


def open_arrays(path: Path) -> Any:
    """The arrays of a ``.npz`` file by name, each read when asked for; a context manager.

    Raises:
        OSError, ValueError, zipfile.BadZipFile: no regular file, no archive, or one whose arrays
            are far larger than the file.
    """
    packed = check_regular(path).st_size
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > max(ALWAYS_UNPACKED, MOST_EXPANSION * packed):
        raise ValueError(f"its {packed:,} bytes unpack to {unpacked:,}")
    return np.load(path, allow_pickle=False)


def open_archive(request: Request) -> Source:
    """The splits of a ``.npz`` file; nothing pickled in it is opened.

    Raises:
        SuiteError: no such archive.
    """
    try:
        with open_arrays(request.path) as archive:
            names = [name.removesuffix(ENDING) for name in archive if name.endswith(ENDING)]
            classes = (
                tuple(str(name) for name in archive["class_names"])
                if "class_names" in archive
                else None
            )
    except (OSError, ValueError, TypeError, EOFError, MemoryError, zipfile.BadZipFile) as fault:
        raise SuiteError(
            f"{request.path} ({request.what}) cannot be read as a numpy archive: {fault}."
        ) from fault
    return Source(classes, {name: partial(_split, request, name) for name in names})


def _split(request: Request, split: str) -> Pixels:
    found = read_split(
        request.path,
        split,
        request.what,
        SuiteError,
        channels=3,
        labelled=request.data.labelled,
    )
    labels = found.labels if request.data.labelled else np.full(len(found.images), UNLABELLED)
    return Pixels(found.images, labels, f"{request.path.name}, {split}")


def read_split(
    path: Path,
    split: str,
    what: str,
    error: type[MergeScopeError],
    channels: int,
    limit: int | None = None,
    labelled: bool = True,
) -> TaskInputs:
    """Read one split of a numpy archive of images.

    Args:
        path: the archive.
        split: its arrays are ``{split}_images`` and ``{split}_labels``.
        what: whose data these are, for messages.
        error: what is raised.
        channels: the number of colour channels expected.
        limit: only this many images, from the first on.
        labelled: whether labels must be there; else they are :data:`UNLABELLED` where missing.

    Raises:
        MergeScopeError: of the given kind: a missing file, or content of another form.

    Example:
        >>> images = np.zeros((2, 4, 4, 3), np.uint8)
        >>> np.savez("images.npz", test_images=images, test_labels=np.array([0, 1]))
        >>> found = read_split(Path("images.npz"), "test", "images", SuiteError, channels=3)
        >>> found.labels.tolist(), found.class_names
        ([0, 1], ('0', '1'))
    """
    try:
        with open_arrays(path) as archive:
            images = archive[f"{split}_images"][:limit]
            if labelled or f"{split}_labels" in archive:
                labels = archive[f"{split}_labels"][:limit]
                least = 0
            else:
                labels, least = np.full(len(images), UNLABELLED), UNLABELLED
            if labels.dtype.kind not in "iu":
                raise ValueError(f"the labels are {labels.dtype}, not integers")
            labels = labels.astype(np.int64)
            count = int(labels.max(initial=-1)) + 1
            if count > MOST_CLASSES:
                raise ValueError(f"the labels go up to {count - 1:,}")
            names = (
                tuple(str(name) for name in archive["class_names"])
                if "class_names" in archive
                else tuple(str(i) for i in range(count))
            )
    except OSError as fault:
        raise error(f"{path} ({what}) cannot be read: {fault}.") from fault
    # TypeError: a lone .npy array; IndexError: a number instead of an array; the others: damage.
    except (
        ValueError,
        LookupError,
        TypeError,
        EOFError,
        RuntimeError,
        MemoryError,  # a size that an array claims
        zipfile.BadZipFile,
        zlib.error,
    ) as fault:
        raise error(
            f"{path} ({what}) is not a numpy archive with {split}_images and "
            f"{split}_labels ({fault})."
        ) from fault
    if images.ndim != 4 or images.shape[-1] != channels or images.dtype != np.uint8:
        raise error(
            f"{path}: {split}_images must be uint8 of shape N x height x width x {channels}, "
            f"got {images.dtype} of shape {images.shape}."
        )
    if labels.shape != (len(images),) or len(labels) == 0 or labels.min() < least:
        raise error(f"{path}: {split}_labels must be one class number per image, from 0.")
    return TaskInputs(images, labels, names)
