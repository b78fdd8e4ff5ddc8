"""Long work in the background, with progress and cancel; it outlives a page change.

The work is a plain function that reports to a :class:`merge_core.progress.Progress` and never
calls Streamlit.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from merge_core.devices import Device, current_device, use_device
from merge_core.errors import Cancelled, MergeScopeError
from merge_core.progress import Progress

State = Literal["queued", "running", "done", "failed", "cancelled"]
KEPT_SECONDS = 1800.0
QUEUE_LIMIT = 8
log = logging.getLogger(__name__)


@dataclass
class Job:
    """One piece of work and how far it is."""

    key: str
    title: str
    state: State = "queued"
    done: int = 0
    total: int = 0
    label: str = ""
    result: Any = None
    error: str = ""
    started: float = field(default_factory=time.monotonic)
    finished: float | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def active(self) -> bool:
        """Whether it is still queued or running."""
        return self.state in ("queued", "running")

    @property
    def wanted(self) -> bool:
        """Whether it is under way and nobody asked it to stop."""
        return self.active and not self.progress.cancel.is_set()

    @property
    def share(self) -> float:
        """Completed share in [0, 1]."""
        return min(1.0, self.done / self.total) if self.total else 0.0


class JobRunner:
    """Runs one job at a time, in the order of arrival; equal keys share one job.

    Args:
        threads: torch threads of the worker; one core is left to the pages by default.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or max(1, (os.cpu_count() or 2) - 1)
        self._pool = ThreadPoolExecutor(1, "mergescope-job", initializer=self._prepare_worker)
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def submit(self, key: str, title: str, work: Callable[[Progress], Any]) -> Job:
        """Start work, or join the job of the same key if it is under way or done.

        Raises:
            MergeScopeError: too many jobs wait already.
        """
        with self._lock:
            self._forget_old()
            known = self._jobs.get(key)
            if known is not None and (known.state == "done" or known.wanted):
                return known
            if sum(job.active for job in self._jobs.values()) >= QUEUE_LIMIT:
                raise MergeScopeError(
                    f"{QUEUE_LIMIT} jobs are waiting already. Cancel one or wait a little."
                )
            job = Job(key, title)

            def listener(done: int, total: int, label: str) -> None:
                job.done, job.total, job.label = done, total, label

            job.progress.listener = listener
            self._jobs[key] = job
        self._pool.submit(self._run, job, work, current_device())
        return job

    def get(self, key: str) -> Job | None:
        """The job of that key, if known."""
        return self._jobs.get(key)

    def cancel(self, key: str) -> None:
        """Ask a job to stop at its next step."""
        job = self._jobs.get(key)
        if job is not None:
            job.progress.cancel.set()

    def _prepare_worker(self) -> None:
        import torch

        torch.set_num_threads(self._threads)

    def _run(self, job: Job, work: Callable[[Progress], Any], device: Device) -> None:
        try:
            job.progress.step(0, 0)
            job.state = "running"
            with use_device(device):
                job.result = work(job.progress)
            job.state = "done"
        except Cancelled as error:
            job.state, job.error = "cancelled", str(error)
        except MergeScopeError as error:
            job.state, job.error = "failed", str(error)
        except Exception as error:
            log.exception("job %s failed", job.title)
            job.state = "failed"
            job.error = (
                f"{job.title} failed unexpectedly ({type(error).__name__}). "
                "The server's log has the details."
            )
        finally:
            job.finished = time.monotonic()

    def _forget_old(self) -> None:
        now = time.monotonic()
        for key, job in list(self._jobs.items()):
            if job.finished is not None and now - job.finished > KEPT_SECONDS:
                del self._jobs[key]
