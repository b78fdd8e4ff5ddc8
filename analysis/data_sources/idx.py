"""IDX files, the format of MNIST and its family, packed (.gz) or not.

Source: yann.lecun.com/exdb/mnist: two zero bytes, the type (8: unsigned bytes), the number of
dimensions, the sizes as big-endian 32-bit integers, then the data.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from analysis.data_sources.source import UNLABELLED, Pixels, Request, Source
from merge_core.errors import SuiteError
from merge_core.input_files import check_regular

UNSIGNED_BYTES = 8
NAME = re.compile(r"(?P<split>.+?)[-_]images[-.]idx3-ubyte(\.gz)?")
MOST_BYTES = 1 << 33  # 160 times MNIST


def open_idx(request: Request) -> Source:
    """The splits of a folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` etc.

    Splits are called as the files begin: ``train`` and ``t10k`` in MNIST.

    Raises:
        SuiteError: no such files.
    """
    images: dict[str, Path] = {}
    for path in sorted(request.path.iterdir()):  # an unpacked file comes before its .gz
        if match := NAME.fullmatch(path.name):
            images.setdefault(match["split"], path)
    if not images:
        raise SuiteError(
            f"{request.path} ({request.what}) holds no IDX files. They are called "
            "train-images-idx3-ubyte, t10k-labels-idx1-ubyte and so on, with .gz or without."
        )
    return Source(None, {name: partial(_split, request, p) for name, p in images.items()})


def _split(request: Request, path: Path) -> Pixels:
    images = read_idx(path, 3, request.what)
    if not request.data.labelled:
        return Pixels(images, np.full(len(images), UNLABELLED), path.name)
    stem = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    beside = [path.with_name(stem), path.with_name(stem + ".gz")]
    found = next((file for file in beside if file.is_file()), None)
    if found is None:
        raise SuiteError(
            f"{beside[0]} ({request.what}) is missing: the labels of {path.name}. Put it there, "
            "or say 'labelled: false'."
        )
    labels = read_idx(found, 1, request.what)
    if len(labels) != len(images):
        raise SuiteError(
            f"{found} ({request.what}) has {len(labels)} labels for {len(images)} images of "
            f"{path.name}. Give files of one dataset."
        )
    return Pixels(images, labels, path.name)


def read_idx(path: Path, dimensions: int, what: str) -> np.ndarray:
    """An array of unsigned bytes.

    Args:
        path: the file, unpacked or gzip.
        dimensions: how many the array must have.
        what: whose data these are, for messages.

    Raises:
        SuiteError: another format, or damage.
    """
    try:
        check_regular(path)
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
            zeros, kind, count = struct.unpack(">HBB", stream.read(4))
            if (zeros, kind, count) != (0, UNSIGNED_BYTES, dimensions):
                raise ValueError(f"it is no array of bytes with {dimensions} dimensions")
            shape = struct.unpack(f">{dimensions}I", stream.read(4 * dimensions))
            size = math.prod(shape)
            if size > MOST_BYTES:
                raise ValueError("it states a size that no dataset has")
            # One byte more than stated shows whether there is more; a small file that is stated
            # or unpacks to be large takes no more memory than it has bytes.
            data = stream.read(size + 1)
    except (OSError, EOFError, struct.error, ValueError, zlib.error) as fault:
        raise SuiteError(f"{path} ({what}) cannot be read as an IDX file: {fault}.") from fault
    if len(data) != size:
        raise SuiteError(
            f"{path} ({what}) is damaged: its header states {size:,} bytes, and there are "
            f"{'fewer' if len(data) < size else 'more'}. Copy or download it again."
        )
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)
