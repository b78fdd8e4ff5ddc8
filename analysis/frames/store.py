"""Answers on this machine: one file each, under the digest of its question."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from cachetools import LRUCache

from analysis.frames.entries import Asked, Kept
from analysis.frames.pack import Damaged, Pack, pack, read_pack
from merge_core.bounded_folder import BoundedFolder
from merge_core.files import cache_dir

DISK_BYTES = 2 << 30
MEMORY_BYTES = 64 << 20
LOOK_EVERY = 64 << 20
SUFFIX = ".frames"


def frames_limit() -> int:
    """Bytes that stored frames may take: ``$MERGESCOPE_FRAMES_GB``, else 2 GiB.

    Example:
        >>> frames_limit() >= 0
        True
    """
    with suppress(KeyError, ValueError, OverflowError):
        return max(0, int(float(os.environ["MERGESCOPE_FRAMES_GB"]) * (1 << 30)))
    return DISK_BYTES


class FrameStore:
    """Answers by content, in files and, the last ones, in memory.

    Threads and processes may share a folder: files appear whole or not at all, and those that
    were not used for longest go first when there are too many. A file that is damaged, or that
    holds the answer to another question than its name says, is as good as none.

    Args:
        folder: where files lie; None for ``frames/`` in the cache folder.
        disk_bytes: limit of the folder (:func:`frames_limit` when None).
        memory_bytes: limit of what is kept in memory.
        shipped: records that come with MergeScope, whose answers are looked up last and believed.
    """

    computes = True

    def __init__(
        self,
        folder: Path | None = None,
        disk_bytes: int | None = None,
        memory_bytes: int = MEMORY_BYTES,
        shipped: Sequence[Path] = (),
    ) -> None:
        self.folder = cache_dir() / "frames" if folder is None else folder
        limit = frames_limit() if disk_bytes is None else disk_bytes
        self._files = BoundedFolder(self.folder, limit, SUFFIX, LOOK_EVERY)
        self._memory: LRUCache[str, Kept] = LRUCache(memory_bytes, _count_bytes)
        self._shipped_paths = tuple(shipped)
        self._lock = threading.Lock()

    @cached_property
    def _shipped(self) -> list[Pack]:
        """The records that come with MergeScope, as far as they can be read."""
        packs = []
        for path in self._shipped_paths:
            with suppress(OSError, Damaged):
                packs.append(read_pack(path))
        return packs

    def get(self, asked: Asked) -> Kept | None:
        """The answer to a question, None where it is not kept."""
        with self._lock:
            kept = self._memory.get(asked.key)
        if kept is None:
            path = self._files.path(asked.key)
            with suppress(OSError, Damaged):
                kept = read_pack(path).get(asked)
                os.utime(path)
            if kept is None:
                kept = self._look_up_shipped(asked)
            if kept is None:
                return None
            self._remember(asked.key, kept)
        # Shallow: pandas copies a column before it is written to.
        return Kept({name: f.copy(deep=False) for name, f in kept.frames.items()}, kept.values)

    def _look_up_shipped(self, asked: Asked) -> Kept | None:
        with self._lock, suppress(Damaged):
            return next(filter(None, (each.get(asked) for each in self._shipped)), None)
        return None

    def put(self, asked: Asked, kept: Kept) -> None:
        """Keep an answer; a folder that cannot be written costs time, never a result."""
        self._files.write(asked.key, pack([(asked, kept)]))

    def refuse(self, asked: Asked) -> None:
        """Nothing is refused: what is not kept is computed."""

    def _remember(self, key: str, kept: Kept) -> None:
        with self._lock, suppress(ValueError):  # larger than all that may be held
            self._memory[key] = kept


def _count_bytes(kept: Kept) -> int:
    return 1000 + sum(int(f.memory_usage(deep=True).sum()) for f in kept.frames.values())
