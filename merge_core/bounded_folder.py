"""A folder of derived results, one file a key, of which the least recently used go first."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

from merge_core.errors import OutputError
from merge_core.files import evict, write_atomically


class BoundedFolder:
    """Files by key below a limit; threads and processes may share it.

    Args:
        folder: where files lie.
        limit: bytes that they may take.
        suffix: of their names.
        look_every: bytes that are written between two looks at what is there, at most.
    """

    def __init__(self, folder: Path, limit: int, suffix: str, look_every: int) -> None:
        self.folder = folder
        self._limit = limit
        self._suffix = suffix
        self._look_after = min(look_every, limit // 4)
        self._written = 0
        self._lock = threading.Lock()

    def path(self, key: str) -> Path:
        """Where the file of a key lies, if it is there."""
        return self.folder / key[:2] / f"{key}{self._suffix}"

    def write(self, key: str, data: bytes) -> None:
        """Keep a file, whole or not at all; a full or read-only disk costs time, not a result."""
        with suppress(OutputError):
            write_atomically(self.path(key), data)
            self._make_room(len(data))

    def _make_room(self, written: int) -> None:
        """Evict what was not used for longest, now and then."""
        with self._lock:
            self._written += written
            due = self._written >= self._look_after
            if due:
                self._written = 0
        if due:
            with suppress(OSError):
                evict(self.folder, self._limit)
