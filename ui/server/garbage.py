"""Garbage collection at intervals, not after every run of a page.

Streamlit collects all garbage after each run of a script or fragment. With everything imported
that takes about 0.25 s, in which no other thread runs: a job whose progress is polled four times
a second would stand still most of the time.
"""

from __future__ import annotations

import atexit
import gc
import threading
import time

INTERVAL_SECONDS = 20.0
_lock = threading.Lock()
_last = time.monotonic()
atexit.register(gc.unfreeze)  # else the interpreter's last collection misses what is hidden


def freeze_objects() -> None:
    """Called at the end of a run: hide all objects from the collection, unless one is due."""
    global _last
    with _lock:
        now = time.monotonic()
        if now - _last < INTERVAL_SECONDS:
            gc.freeze()
        else:
            _last = now
            gc.unfreeze()
