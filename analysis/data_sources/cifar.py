"""CIFAR-10 and CIFAR-100 as their authors publish them: Python or binary archives.

The Python archives are pickles; they are read as data and nothing in them runs. Source of the
layouts: cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from analysis.data_sources.source import UNLABELLED, Pixels, Request, Source
from merge_core.checkpoints.pickled.machine import (
    Blob,
    Budget,
    Global,
    Pairs,
    PickleFileError,
    Record,
    read_pickle,
)
from merge_core.errors import SuiteError
from merge_core.input_files import open_regular, read_bounded

SIDE = 32
PIXELS = 3 * SIDE * SIDE
LONGEST_NAME = 200
NAMES_BYTES = 1_000_000
SPLITS = ("train", "test")
# All that a pickled array of bytes needs, in the versions of Python and numpy since 2009.
NEEDED = {
    f"{numpy}.{name}"
    for numpy in ("numpy.core", "numpy._core")
    for name in ("multiarray._reconstruct", "numeric._frombuffer")
} | {"numpy.ndarray", "numpy.dtype", "_codecs.encode"}


class Layout(NamedTuple):
    """How one of the archives is laid out."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    label_bytes: int  # in front of each image of a binary file; 0: a pickle


BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
LAYOUTS = (
    Layout("cifar-10-batches-py", BATCHES, ("test_batch",), "batches.meta", 0),
    Layout("cifar-100-python", ("train",), ("test",), "meta", 0),
    Layout(
        "cifar-10-batches-bin",
        tuple(f"{name}.bin" for name in BATCHES),
        ("test_batch.bin",),
        "batches.meta.txt",
        1,
    ),
    Layout("cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt", 2),
)


def open_cifar(request: Request) -> Source:
    """The splits train and test of CIFAR-10 or CIFAR-100 (fine labels).

    The folder is the unpacked archive, or the one that holds it.

    Raises:
        SuiteError: it is neither.
    """
    for layout in LAYOUTS:
        for folder in (request.path, request.path / layout.folder):
            there = [s for s in SPLITS if all((folder / f).is_file() for f in getattr(layout, s))]
            if there:
                names = _class_names(folder / layout.names, layout, request.what)
                return Source(
                    names, {s: partial(_split, request, folder, layout, s) for s in there}
                )
    raise SuiteError(
        f"{request.path} ({request.what}) holds no CIFAR archive. Unpack it, and give the folder "
        f"with {', '.join(layout.folder for layout in LAYOUTS)}, or one of these."
    )


def _class_names(path: Path, layout: Layout, what: str) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    if layout.label_bytes:
        lines = read_bounded(path, NAMES_BYTES).decode("utf-8", "replace").splitlines()
        return tuple(line.strip() for line in lines if line.strip())
    found = _PickledDict(path, what)
    names = found.get("fine_label_names", found.get("label_names"))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise found.error("it names no classes")
    return tuple(names)


def _split(request: Request, folder: Path, layout: Layout, split: str) -> Pixels:
    read = _read_binary if layout.label_bytes else _read_pickled
    parts = [
        read(folder / name, layout.label_bytes, request.what) for name in getattr(layout, split)
    ]
    planes = np.concatenate([planes for planes, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    if not request.data.labelled:
        labels = np.full(len(planes), UNLABELLED)
    images = planes.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return Pixels(np.ascontiguousarray(images), labels, f"{folder.name}, {split}")


def _read_binary(path: Path, label_bytes: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Planes (N x 3072) and labels: the last byte in front of an image is the (fine) label."""
    with open_regular(path) as stream:
        data = np.frombuffer(stream.read(), dtype=np.uint8)
    if len(data) % (label_bytes + PIXELS):
        raise SuiteError(
            f"{path} ({what}) is damaged: it does not hold whole images of {PIXELS} bytes. "
            "Download it again."
        )
    rows = data.reshape(-1, label_bytes + PIXELS)
    return rows[:, label_bytes:], rows[:, label_bytes - 1].astype(np.int64)


def _read_pickled(path: Path, _: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    found = _PickledDict(path, what)
    planes = found.array("data")
    labels = found.get("fine_labels", found.get("labels"))
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise found.error("it holds no list of labels")
    if len(labels) != len(planes):
        raise found.error(f"it has {len(labels)} labels for {len(planes)} images")
    if not all(0 <= label < 256 for label in labels):
        raise found.error("a label is no class number")
    return planes, np.asarray(labels, dtype=np.int64)


class _InertMaker:
    """Records the names and arguments of imports and calls in place of running them."""

    def find(self, module: str, name: str) -> Global:
        found = Global(module, name)
        if str(found) not in NEEDED:
            raise PickleFileError(
                f"it asks for {found.shown}, which no CIFAR archive needs. Nothing was run; do "
                "not use this file."
            )
        return found

    def make(self, maker: Any, args: Any) -> Record:
        return Record(maker, args)

    def persistent_load(self, key: Any) -> Any:
        raise PickleFileError(f"it refers to something outside it ({type(key).__name__}).")


class _PickledDict:
    """A pickled dictionary of one of the archives, read as data."""

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what
        try:
            with open_regular(path) as stream:
                end = stream.seek(0, 2)
                stream.seek(0)
                content = read_pickle(stream, end, _InertMaker(), Budget())
                if not isinstance(content, Pairs):
                    raise self.error("it holds no dictionary")
                keys = [_text(key, stream) for key in content[::2]]
                self._entries = dict(zip(keys, content[1::2], strict=True))
                for name in ("label_names", "fine_label_names"):
                    if isinstance(self._entries.get(name), list):
                        self._entries[name] = [_text(n, stream) for n in self._entries[name]]
        except PickleFileError as fault:
            raise self.error(str(fault).rstrip(".")) from fault
        except (OSError, ValueError) as fault:
            raise self.error(str(fault)) from fault

    def error(self, reason: str) -> SuiteError:
        """An error that names the file."""
        return SuiteError(f"{self._path} ({self._what}) cannot be read as CIFAR's: {reason}.")

    def get(self, name: str, other: Any = None) -> Any:
        """An entry as the pickle machine gives it."""
        return self._entries.get(name, other)

    def array(self, name: str) -> np.ndarray:
        """An N x 3072 array of bytes.

        Raises:
            SuiteError: the entry is something else.
        """
        match self.get(name):
            case Record(
                Global(name="_reconstruct"),
                state=(_, tuple() as shape, Record() as kind, order, raw),
            ) if order in (False, 0):
                pass
            case Record(Global(name="_frombuffer"), (raw, Record() as kind, tuple() as shape, "C")):
                pass
            case _:
                raise self.error(f"{name!r} is no array")
        match kind:
            case Record(Global("numpy", "dtype"), ("u1" | "|u1", *_)):
                pass
            case _:
                raise self.error(f"{name!r} does not consist of bytes")
        if len(shape) != 2 or shape[1] != PIXELS or not all(type(n) is int for n in shape):
            raise self.error(f"{name!r} does not consist of images of {SIDE} x {SIDE} pixels")
        try:
            with self._path.open("rb") as stream:
                data = _bytes(raw, stream)
        except (OSError, ValueError) as fault:
            raise self.error(f"{name!r} cannot be read ({fault})") from fault
        if data is None or len(data) != math.prod(shape):
            raise self.error(f"{name!r} is smaller or larger than it says")
        return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _read(blob: Blob, stream: BinaryIO) -> bytes:
    stream.seek(blob.start)
    return stream.read(blob.size)


def _text(value: Any, stream: BinaryIO) -> Any:
    """A key or class name, which Python 3 may have written as bytes; else what is no text."""
    if isinstance(value, str | Blob | Record):
        found = value.encode() if isinstance(value, str) else _bytes(value, stream)
        return None if found is None else found[:LONGEST_NAME].decode("utf-8", "replace")
    return None


def _bytes(raw: Any, stream: BinaryIO) -> bytes | None:
    """The bytes of an array: as they are, or as text in which Python 3's old protocols put them."""
    match raw:
        case Blob():
            return _read(raw, stream)
        case Record(Global("_codecs", "encode"), (Blob() | str() as text, "latin1")):
            whole = text if isinstance(text, str) else _read(text, stream).decode()
            return whole.encode("latin1")
    return None
