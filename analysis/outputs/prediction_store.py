"""What models gave for images, by content: computed once, and kept on disk.

A vector is known by the digests of the weights (a checkpoint, or the recipe and its inputs) and of
the task's data, head and architecture. It has one value per image of the split; images that were
not asked for yet are marked in it, and are filled in when they are. The store is a SQLite file in
the cache folder.
"""

from __future__ import annotations

import sqlite3
import threading
import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from merge_core.files import cache_dir, digest_of

FILE_NAME = "predictions.sqlite"
FORMAT = "predictions-1"
SCHEMA = "CREATE TABLE IF NOT EXISTS predictions (key TEXT PRIMARY KEY, labels BLOB NOT NULL)"
CLASSES = "classes"
VECTOR_BYTES = 100_000_000  # 25 million images

Vectors = dict[str, np.ndarray]


def output_key(weights: str, data: str, split: str, measure: str = CLASSES) -> str:
    """The key of a vector over the images of a task's split.

    Args:
        weights: digest of the weights.
        data: digest of the task's data, head and architecture.
        split: ``val`` or ``test``.
        measure: ``classes``, or another name of what is measured.
    """
    # "None" is how stores that are in use call the classes of all images.
    return digest_of(FORMAT, weights, data, split, "None" if measure == CLASSES else measure)


def is_missing(values: np.ndarray) -> np.ndarray:
    """Which entries were not computed (bool, as `values`): −1 among integers, NaN among floats."""
    missing: np.ndarray = np.isnan(values) if values.dtype.kind == "f" else values < 0
    return missing


def empty_vector(count: int, dtype: npt.DTypeLike) -> np.ndarray:
    """A vector of which no entry was computed."""
    return np.full(count, np.nan if np.dtype(dtype).kind == "f" else -1, dtype)


def fill_missing(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """`first`, with `second` where it is missing; the longer one's length, `first`'s dtype."""
    result = empty_vector(max(len(first), len(second)), first.dtype)
    for values in (second, first):
        known = ~is_missing(values)
        result[: len(values)][known] = values[known]
    return result


class PredictionStore:
    """Vectors by key, in one file.

    A store that cannot be opened or written costs time, never a result.

    Args:
        path: of the file; None for ``predictions.sqlite`` in the cache folder.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = cache_dir() / FILE_NAME if path is None else path
        self._lock = threading.Lock()

    def get(self, wanted: Mapping[str, npt.DTypeLike]) -> Vectors:
        """Vectors that are known, at least in part; short ones miss what follows.

        Args:
            wanted: key to the dtype of its values.
        """
        return _unpack(_read(self.path, list(wanted)), wanted)

    def put(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Keep vectors in one transaction; what is missing in one stays as it was stored.

        Args:
            vectors: key to int16 classes (−1 missing) or floats (NaN missing).
        """
        if not vectors:
            return
        with self._lock:
            try:
                self._write(vectors)
            except sqlite3.OperationalError:
                return  # read-only, full or locked
            except (sqlite3.DatabaseError, OSError):
                # Damaged beyond use: start afresh rather than compute everything for ever.
                with suppress(sqlite3.Error, OSError):
                    self.path.unlink(missing_ok=True)
                    self._write(vectors)

    def _write(self, vectors: Mapping[str, np.ndarray]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.path, timeout=5, isolation_level=None)) as connection:
            # Waiting for the disk takes longer than small forward passes. A power cut can then
            # damage the file, which costs time: rows carry a checksum.
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("BEGIN IMMEDIATE")  # nobody writes between reading and writing
            with connection:
                connection.execute(SCHEMA)
                types = {key: values.dtype for key, values in vectors.items()}
                known = _unpack(_select(connection, list(vectors)), types)
                rows = [
                    (key, _pack(fill_missing(values, known[key]) if key in known else values))
                    for key, values in vectors.items()
                ]
                connection.executemany("INSERT OR REPLACE INTO predictions VALUES (?, ?)", rows)


def _pack(values: np.ndarray) -> bytes:
    return zlib.compress(values.tobytes(), level=9)


def _unpack(rows: Mapping[str, Any], types: Mapping[str, npt.DTypeLike]) -> Vectors:
    """Rows as vectors; damaged ones are unknown."""
    found = {}
    for key, blob in rows.items():
        with suppress(zlib.error, ValueError, TypeError):
            unpacker = zlib.decompressobj()
            values = unpacker.decompress(blob, VECTOR_BYTES)
            if unpacker.eof:
                found[key] = np.frombuffer(values, dtype=types[key])
    return found


def _read(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Blobs by key; nothing where the store is missing or unreadable."""
    try:
        if not path.is_file():
            return {}
        uri = f"{path.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=5)) as connection:
            return _select(connection, keys)
    except (sqlite3.Error, OSError):
        return {}


def _select(connection: sqlite3.Connection, keys: Sequence[str]) -> dict[str, Any]:
    marks = ", ".join("?" * len(keys))
    query = f"SELECT key, labels FROM predictions WHERE key IN ({marks})"
    return dict(connection.execute(query, keys).fetchall())
