"""Garbage collection at intervals, not after every run of a page, and when everybody has left.

Streamlit collects all garbage after each run of a script or fragment. With everything imported
that takes about 0.25 s, in which no other thread runs: a job whose progress is polled four times
a second would stand still most of the time.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import threading
import time
from contextlib import suppress

INTERVAL_SECONDS = 20.0
_lock = threading.Lock()
_last = time.monotonic()
_used = False
atexit.register(gc.unfreeze)  # else the interpreter's last collection misses what is hidden


def freeze_objects() -> None:
    """Called at the end of a run: hide all objects from the collection, unless one is due."""
    global _last, _used
    with _lock:
        _used = True
        now = time.monotonic()
        if now - _last < INTERVAL_SECONDS:
            gc.freeze()
        else:
            _last = now
            gc.unfreeze()


def release(complete: bool) -> None:
    """Collect everything, and give free memory back to the system, if pages have run since.

    Args:
        complete: whether nothing more will be let go before the next run of a page.
    """
    global _used
    with _lock:
        if not _used:
            return
        _used = not complete
        gc.unfreeze()
        gc.collect()
    with suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)
