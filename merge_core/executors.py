"""Where independent pieces of work run: in this thread, on threads, on processes, on Ray.

Every executor gives the same results, in the items' order: each piece runs under one torch
thread, wherever it runs, so that even the last bits agree. Small pieces side by side also gain
more than one piece spread over torch's own threads.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, Generic, TypeVar

import torch

from merge_core.errors import Cancelled, ExecutorError

Item = TypeVar("Item")
Result = TypeVar("Result")
Handle = TypeVar("Handle")

RETRIES = 3
POLL_SECONDS = 0.1
AHEAD = 2


class Executor(ABC):
    """Maps a function over items, several at once, a few ahead of whoever takes the results.

    Attributes:
        shares_memory: whether the function sees the caller's objects; if not, it and the items
            travel by pickle.
    """

    shares_memory: bool

    @abstractmethod
    def map(
        self,
        function: Callable[[Item], Result],
        items: Iterable[Item],
        cancel: threading.Event | None = None,
    ) -> Iterator[Result]:
        """Results in the order of the items.

        A piece whose worker dies is run again; work that was begun is finished when the consumer
        stops early, and what waited is dropped.

        Args:
            function: of one item; it must not depend on the others, and must give the same
                result when it is run twice.
            items: taken up only a few ahead of the results, so that memory stays bounded.
            cancel: set it to stop waiting.

        Raises:
            Cancelled: `cancel` was set.
            ExecutorError: workers died again and again at one item.
            Exception: whatever `function` raises, in its item's place.
        """


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
            _check(cancel)
            with one_thread(workers=1):
                result = function(item)
            yield result


class Ahead(Executor, Generic[Handle]):
    """A window of pieces in flight; subclasses say how one is begun and waited for."""

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ExecutorError(f"An executor needs at least one worker, not {workers}.")
        self.workers = workers

    def map(
        self,
        function: Callable[[Item], Result],
        items: Iterable[Item],
        cancel: threading.Event | None = None,
    ) -> Iterator[Result]:
        """See :meth:`Executor.map`."""
        with self._opened(function) as pool:
            rest = iter(items)
            # So far ahead that nobody is idle while one long piece among short ones holds up the
            # results, or while the consumer writes one.
            waiting = deque((i, pool.begin(i)) for i in islice(rest, AHEAD * self.workers))
            try:
                while waiting:
                    yield pool.wait(waiting, cancel)
                    waiting.extend((i, pool.begin(i)) for i in islice(rest, 1))
            finally:
                for _, handle in waiting:
                    pool.drop(handle)

    @abstractmethod
    def _opened(self, function: Callable[[Any], Any]) -> Any:
        """A context manager giving the workers' :class:`Pool`."""


class NotYet(Exception):  # noqa: N818 - a state rather than a fault
    """A piece is still being worked on."""


class Pool(ABC, Generic[Handle]):
    """Workers that run one function."""

    @abstractmethod
    def begin(self, item: Any) -> Handle:
        """Start one piece."""

    @abstractmethod
    def ready(self, handle: Handle) -> Any:
        """The result within :data:`POLL_SECONDS`, or :class:`NotYet`."""

    @abstractmethod
    def drop(self, handle: Handle) -> None:
        """Forget a piece that nobody waits for any more."""

    def mend(self, waiting: deque[tuple[Any, Handle]]) -> None:
        """Replace dead workers, and begin again what they had."""

    def wait(self, waiting: deque[tuple[Any, Handle]], cancel: threading.Event | None) -> Any:
        """The first piece's result; it is taken off the queue."""
        deaths = 0
        while True:
            _check(cancel)
            try:
                result = self.ready(waiting[0][1])
            except NotYet:
                continue
            except BrokenProcessPool as error:
                deaths += 1
                if deaths > RETRIES:
                    raise _died(waiting[0][0]) from error
                self.mend(waiting)
                continue
            waiting.popleft()
            return result


class Threads(Ahead[Future[Any]]):
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
    def _opened(self, function: Callable[[Any], Any]) -> Iterator[Pool[Future[Any]]]:
        try:
            with ThreadPoolExecutor(self.workers, initializer=_alone) as pool:
                yield _ThreadFutures(pool, function)
        finally:
            # Torch's number belongs to the thread that sets it, but new threads (a page's, say)
            # begin with the number that any thread set last: not with the workers'.
            torch.set_num_threads(torch.get_num_threads())


class Processes(Ahead[Future[Any]]):
    """On processes of this machine; one that is killed is replaced.

    Args:
        workers: how many; see :func:`usual_workers` when None.
    """

    shares_memory = False

    def __init__(self, workers: int | None = None) -> None:
        super().__init__(usual_workers() if workers is None else workers)

    @contextmanager
    def _opened(self, function: Callable[[Any], Any]) -> Iterator[Pool[Future[Any]]]:
        pool = _ProcessFutures(self.workers, function)
        try:
            yield pool
        finally:
            pool.close()


class _Futures(Pool[Future[Any]]):
    def ready(self, handle: Future[Any]) -> Any:
        done, _ = wait([handle], timeout=POLL_SECONDS)
        if not done:
            raise NotYet
        return handle.result()

    def drop(self, handle: Future[Any]) -> None:
        handle.cancel()


class _ThreadFutures(_Futures):
    def __init__(self, pool: ThreadPoolExecutor, function: Callable[[Any], Any]) -> None:
        self._pool = pool
        self._function = function

    def begin(self, item: Any) -> Future[Any]:
        return self._pool.submit(self._function, item)


class _ProcessFutures(_Futures):
    def __init__(self, workers: int, function: Callable[[Any], Any]) -> None:
        self._workers = workers
        self._function = function
        self._pool = self._fresh()

    def _fresh(self) -> ProcessPoolExecutor:
        # Spawned, not forked: a fork inherits the locks of threads that it does not have. The
        # function goes to each process once, as it may carry as much as a model.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(
            self._workers, context, initializer=_install, initargs=(self._function,)
        )

    def begin(self, item: Any) -> Future[Any]:
        try:
            return self._pool.submit(_installed, item)
        except BrokenProcessPool as error:
            # Found out by whoever waits for it, who mends.
            broken: Future[Any] = Future()
            broken.set_exception(error)
            return broken

    def mend(self, waiting: deque[tuple[Any, Future[Any]]]) -> None:
        self.close()
        self._pool = self._fresh()
        kept = [
            (item, handle if _succeeded(handle) else self.begin(item)) for item, handle in waiting
        ]
        waiting.clear()
        waiting.extend(kept)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def executor(text: str) -> Executor:
    """The executor that a user names.

    Args:
        text: ``serial``, ``threads``, ``processes`` or ``ray`` (on this machine), the last three
            with a number of workers after a colon if wanted; or a cluster's address,
            ``ray://host:port``.

    Raises:
        ExecutorError: an unknown name or number, or a cluster that does not answer.
    """
    if text.startswith("ray://"):
        return _ray(text, None)
    name, _, number = text.partition(":")
    if number and not (number.isdecimal() and int(number) >= 1):
        raise ExecutorError(f"{number!r} is not a number of workers; write {name}:2, say.")
    workers = int(number) if number else None
    if name == "serial" and workers is None:
        return Serial()
    if name == "threads":
        return Threads(workers)
    if name == "processes":
        return Processes(workers)
    if name == "ray":
        return _ray(None, workers)
    raise ExecutorError(
        f"{text!r} is not an executor: take serial, threads, processes, ray (with :N for N "
        "workers), or ray://host:port."
    )


def _ray(address: str | None, workers: int | None) -> Executor:
    from merge_core.ray_executor import Ray  # Ray takes a second to import

    return Ray(address, workers)


class _SetAside(threading.local):
    """The calling thread's workers while torch itself has one thread there."""

    workers: int | None = None


_SET_ASIDE = _SetAside()


def usual_workers() -> int:
    """How many workers an executor has that is made in the calling thread.

    As many as torch has threads there, or had before :func:`one_thread`.
    """
    return _SET_ASIDE.workers or torch.get_num_threads()


@contextmanager
def one_thread(workers: int | None = None) -> Iterator[None]:
    """Torch's own threads reduced to one in the calling thread; a function's decorator, too.

    An operation that torch splits ends when its slowest part does. Beside another busy process
    each part may wait for a processor, so that a loop of small operations takes ten times longer
    on two threads than on one; executors split work at its seams instead.

    Args:
        workers: of executors that are made inside; as many as outside when None.
    """
    threads, before = torch.get_num_threads(), _SET_ASIDE.workers
    _SET_ASIDE.workers = workers or usual_workers()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _SET_ASIDE.workers = before


def _alone() -> None:
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


def _installed(item: Any) -> Any:
    return _FUNCTION[0](item)


def _check(cancel: threading.Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise Cancelled("Cancelled; nothing was written.")


def _succeeded(handle: Future[Any]) -> bool:
    return handle.done() and not handle.cancelled() and handle.exception() is None


def _died(item: Any) -> ExecutorError:
    return ExecutorError(
        f"Worker processes died {RETRIES + 1} times around {item!s:.100}, perhaps for lack of "
        "memory. Take fewer workers (processes:1), or threads."
    )
