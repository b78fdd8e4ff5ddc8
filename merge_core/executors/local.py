"""Pieces of work on this machine: in this thread, on threads, on processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

import torch

from merge_core.executors.base import (
    POLL_SECONDS,
    Executor,
    Item,
    NotReady,
    Pool,
    Result,
    WindowedExecutor,
    one_thread,
    stop_if_cancelled,
    usual_workers,
)


class Serial(Executor):
    """In the caller's thread, one piece after another."""

    shares_memory = True

    def map(
        self,
        function: Callable[[Item], Result],
        items: Iterable[Item],
        cancel: threading.Event | None = None,
    ) -> Iterator[Result]:
        """See :meth:`Executor.map`."""
        for item in items:
            stop_if_cancelled(cancel)
            with one_thread(workers=1):
                result = function(item)
            yield result


class Threads(WindowedExecutor[Future[Any]]):
    """On threads of this process, each with one torch thread.

    Args:
        workers: how many; see :func:`usual_workers` when None.
    """

    shares_memory = True

    def __init__(self, workers: int | None = None) -> None:
        super().__init__(usual_workers() if workers is None else workers)

    def map(
        self,
        function: Callable[[Item], Result],
        items: Iterable[Item],
        cancel: threading.Event | None = None,
    ) -> Iterator[Result]:
        """See :meth:`Executor.map`."""
        if self.workers == 1:
            return Serial().map(function, items, cancel)
        return super().map(function, items, cancel)

    @contextmanager
    def _open_pool(self, function: Callable[[Any], Any]) -> Iterator[Pool[Future[Any]]]:
        try:
            with ThreadPoolExecutor(self.workers, initializer=_use_one_thread) as pool:
                yield _ThreadFutures(pool, function)
        finally:
            # Torch's number belongs to the thread that sets it, but new threads (a page's, say)
            # begin with the number that any thread set last: not with the workers'.
            torch.set_num_threads(torch.get_num_threads())


class Processes(WindowedExecutor[Future[Any]]):
    """On processes of this machine; one that is killed is replaced.

    Args:
        workers: how many; see :func:`usual_workers` when None.
    """

    shares_memory = False

    def __init__(self, workers: int | None = None) -> None:
        super().__init__(usual_workers() if workers is None else workers)

    @contextmanager
    def _open_pool(self, function: Callable[[Any], Any]) -> Iterator[Pool[Future[Any]]]:
        pool = _ProcessFutures(self.workers, function)
        try:
            yield pool
        finally:
            pool.close()


class _Futures(Pool[Future[Any]]):
    def poll(self, handle: Future[Any]) -> Any:
        done, _ = wait([handle], timeout=POLL_SECONDS)
        if not done:
            raise NotReady
        return handle.result()

    def drop(self, handle: Future[Any]) -> None:
        handle.cancel()


class _ThreadFutures(_Futures):
    def __init__(self, pool: ThreadPoolExecutor, function: Callable[[Any], Any]) -> None:
        self._pool = pool
        self._function = function

    def begin(self, item: Any) -> Future[Any]:
        # The thread computes on the device that was chosen where the work began.
        return self._pool.submit(copy_context().run, self._function, item)


class _ProcessFutures(_Futures):
    def __init__(self, workers: int, function: Callable[[Any], Any]) -> None:
        self._workers = workers
        self._function = function
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPoolExecutor:
        # Spawned, not forked: a fork inherits the locks of threads that it does not have. The
        # function goes to each process once, as it may carry as much as a model.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(
            self._workers, context, initializer=_install, initargs=(self._function,)
        )

    def begin(self, item: Any) -> Future[Any]:
        try:
            return self._pool.submit(_run_installed, item)
        except BrokenProcessPool as error:
            # Whoever waits for it meets the error, and recovers.
            broken: Future[Any] = Future()
            broken.set_exception(error)
            return broken

    def recover(self, waiting: deque[tuple[Any, Future[Any]]]) -> None:
        self.close()
        self._pool = self._new_pool()
        kept = [
            (item, handle if _has_succeeded(handle) else self.begin(item))
            for item, handle in waiting
        ]
        waiting.clear()
        waiting.extend(kept)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _use_one_thread() -> None:
    torch.set_num_threads(1)


_FUNCTION: list[Callable[[Any], Any]] = []


def _install(function: Callable[[Any], Any]) -> None:
    """In a new worker process: what it is there for."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _FUNCTION[:] = [function]


def _end_with_parent() -> None:
    """Leave when the process that started this one is gone: a killed one cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_installed(item: Any) -> Any:
    return _FUNCTION[0](item)


def _has_succeeded(handle: Future[Any]) -> bool:
    return handle.done() and not handle.cancelled() and handle.exception() is None
