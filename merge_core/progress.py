"""Progress and cancellation of long work, without any knowledge of who is watching."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from merge_core.errors import Cancelled


@dataclass
class Progress:
    """What a long computation reports to, and where it learns that it should stop.

    Attributes:
        listener: called as ``listener(done, total, label)`` after each unit of work.
        cancel: set it (from any thread) to stop the work at the next unit.
    """

    listener: Callable[[int, int, str], None] | None = None
    cancel: threading.Event = field(default_factory=threading.Event)

    def step(self, done: int, total: int, label: str = "") -> None:
        """Report that `done` of `total` units are complete.

        Raises:
            Cancelled: `cancel` was set.
        """
        if self.cancel.is_set():
            raise Cancelled(f"Cancelled after {done} of {total} steps; nothing was written.")
        if self.listener is not None:
            self.listener(done, total, label)
