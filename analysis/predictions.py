"""Predictions by content: computed once, kept on disk, and shipped with a suite.

A prediction is known by the digests of the weights (a checkpoint, or the recipe and its inputs)
and of the task's data, head and architecture. The user's own store is a SQLite file in the cache
folder; a suite may carry one of the same form, ``predictions.sqlite``, which is only read.
"""

from __future__ import annotations

import sqlite3
import threading
import zlib
from contextlib import closing, suppress
from pathlib import Path

import numpy as np

from merge_core.files import cache_dir, digest_of

SHIPPED_NAME = "predictions.sqlite"
FORMAT = "predictions-1"
SCHEMA = "CREATE TABLE IF NOT EXISTS predictions (key TEXT PRIMARY KEY, labels BLOB NOT NULL)"


def prediction_key(weights: str, data: str, split: str, limit: int | None) -> str:
    """The key of a task's predictions.

    Args:
        weights: digest of the weights.
        data: digest of the task's data, head and architecture.
        split: ``val`` or ``test``.
        limit: only the first so many images, or None.
    """
    return digest_of(FORMAT, weights, data, split, str(limit))


class PredictionStore:
    """Predicted classes by key, read from `shipped` and from the user's store, written there.

    A store that cannot be opened or written costs time, never a result.

    Args:
        path: the user's store; None for ``predictions.sqlite`` in the cache folder.
        shipped: read-only stores beside suites.
    """

    def __init__(self, path: Path | None = None, shipped: tuple[Path, ...] = ()) -> None:
        self.path = cache_dir() / SHIPPED_NAME if path is None else path
        # Shipped stores are small and asked for often: a sweep looks up thousands of keys.
        self._shipped: dict[str, bytes] = {}
        for file in shipped:
            self._shipped |= _rows(file, "SELECT key, labels FROM predictions")
        self._lock = threading.Lock()

    def get(self, key: str) -> np.ndarray | None:
        """Predicted classes (int64, N), or None if never computed."""
        blob = self._shipped.get(key)
        if blob is None:
            rows = _rows(self.path, "SELECT key, labels FROM predictions WHERE key = ?", (key,))
            blob = rows.get(key)
        if blob is None:
            return None
        try:
            return np.frombuffer(zlib.decompress(blob), dtype=np.int16).astype(np.int64)
        except (zlib.error, ValueError, TypeError):
            return None

    def put(self, key: str, labels: np.ndarray) -> None:
        """Keep predicted classes (integers below 32768, N)."""
        blob = zlib.compress(labels.astype(np.int16).tobytes(), level=9)
        with self._lock:
            try:
                self._write(key, blob)
            except sqlite3.OperationalError:
                return  # read-only, full or locked
            except (sqlite3.DatabaseError, OSError):
                # Damaged beyond use: start afresh rather than compute everything for ever.
                with suppress(sqlite3.Error, OSError):
                    self.path.unlink(missing_ok=True)
                    self._write(key, blob)

    def _write(self, key: str, blob: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.path, timeout=5)) as connection, connection:
            connection.execute(SCHEMA)
            connection.execute("INSERT OR REPLACE INTO predictions VALUES (?, ?)", (key, blob))


def _rows(path: Path, query: str, arguments: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Keys and blobs that a query gives; nothing where the store is missing or unreadable."""
    try:
        if not path.is_file():
            return {}
        uri = f"{path.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=5)) as connection:
            return dict(connection.execute(query, arguments).fetchall())
    except (sqlite3.Error, OSError):
        return {}
