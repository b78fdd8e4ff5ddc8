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
QUEUE_LIMIT = 8  # of one session
EVERYONES_LIMIT = 100
USUAL_SECONDS = 10.0  # until a job of that title has ended
LEFT_SECONDS = 180.0  # a browser that reloads is back sooner
LOOK_SECONDS = 5.0
log = logging.getLogger(__name__)


@dataclass
class Job:
    """One piece of work and how far it is.

    Attributes:
        sessions: who waits for it.
        turn: the waiting job with the lowest is next.
        left: since when none of its sessions has been there (monotonic seconds), if so.
    """

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
    sessions: set[str] = field(default_factory=set)
    turn: float = 0.0
    left: float | None = None

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
    """Runs one job at a time; equal keys share one job.

    The next one is the one that would end first if all sessions shared the worker (fair queueing):
    short jobs before long ones, a session's first job before another's second, and no job waits
    for ever, since what comes later has a later turn. How long a job takes is taken from the last
    one of its title. A job whose sessions have all left is cancelled.

    Args:
        threads: torch threads of the worker; one core is left to the pages by default.
        is_active: whether a session is there; every one is by default.

    Source: Demers, Keshav and Shenker, Analysis and simulation of a fair queueing algorithm,
    SIGCOMM 1989.
    """

    def __init__(
        self, threads: int | None = None, is_active: Callable[[str], bool] = lambda _: True
    ) -> None:
        self._threads = threads or max(1, (os.cpu_count() or 2) - 1)
        self._is_active = is_active
        self._pool = ThreadPoolExecutor(1, "mergescope-job", initializer=self._prepare_worker)
        self._jobs: dict[str, Job] = {}
        self._waiting: list[tuple[Job, Callable[[Progress], Any], Device]] = []
        self._took: dict[str, float] = {}
        self._looked = time.monotonic()
        self._lock = threading.Lock()

    def submit(
        self, key: str, title: str, work: Callable[[Progress], Any], session: str = ""
    ) -> Job:
        """Start work, or join the job of the same key if it is under way or done.

        Args:
            key: what the work is determined by.
            title: what is being done.
            work: the work.
            session: who waits for it.

        Raises:
            MergeScopeError: too many jobs wait already.
        """
        with self._lock:
            self._forget_old()
            known = self._jobs.get(key)
            if known is not None and (known.state == "done" or known.wanted):
                known.sessions.add(session)
                return known
            self._check_room(session)
            job = Job(key, title, sessions={session}, turn=self._turn(title, session))

            def listener(done: int, total: int, label: str) -> None:
                job.done, job.total, job.label = done, total, label
                self._cancel_left()

            job.progress.listener = listener
            self._jobs[key] = job
            self._waiting.append((job, work, current_device()))
        self._pool.submit(self._run_next)
        return job

    def join(self, key: str, session: str) -> None:
        """A session waits for a job too."""
        job = self._jobs.get(key)
        if job is not None:
            job.sessions.add(session)

    def _check_room(self, session: str) -> None:
        """Refuse a job too many, of a session or of all."""
        active = [job for job in self._jobs.values() if job.active]
        own = sum(session in job.sessions for job in active)
        if own >= QUEUE_LIMIT or len(active) >= EVERYONES_LIMIT:
            raise MergeScopeError(
                f"{own if own >= QUEUE_LIMIT else len(active)} jobs are waiting already. Cancel "
                "one or wait a little."
            )

    def _turn(self, title: str, session: str) -> float:
        """When the job would end if its session had a worker of its own (monotonic seconds)."""
        own = [job.turn for job in self._jobs.values() if job.active and session in job.sessions]
        return max([time.monotonic(), *own]) + self._took.get(title, USUAL_SECONDS)

    def _cancel_left(self) -> None:
        """Let jobs end that nobody waits for any more; looks once every few seconds."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        with self._lock:
            active = [job for job in self._jobs.values() if job.active]
        for job in active:
            # What was not started by a session is nobody's to leave.
            if "" in job.sessions or any(map(self._is_active, tuple(job.sessions))):
                job.left = None
            elif job.left is None:
                job.left = now
            elif now - job.left > LEFT_SECONDS:
                job.progress.cancel.set()

    def _run_next(self) -> None:
        """Run the waiting job whose turn it is; called once for each."""
        with self._lock:
            chosen = min(self._waiting, key=lambda each: each[0].turn)
            self._waiting.remove(chosen)
        self._run(*chosen)

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
            job.state, begun = "running", time.monotonic()
            with use_device(device):
                job.result = work(job.progress)
            self._took[job.title] = time.monotonic() - begun
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
