"""What every executor is: pieces of work in the items' order, a few of them ahead.

Every executor gives the same results, in the items' order: each piece runs under one torch
thread, wherever it runs, so that even the last bits agree. Small pieces side by side also gain
more than one piece spread over torch's own threads.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, Generic, TypeVar

import torch

from merge_core.errors import Cancelled, ExecutorError
from merge_core.work_sizes import AHEAD

Item = TypeVar("Item")
Result = TypeVar("Result")
Handle = TypeVar("Handle")

RETRIES = 3
POLL_SECONDS = 0.1


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


class WindowedExecutor(Executor, Generic[Handle]):
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
        with self._open_pool(function) as pool:
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
    def _open_pool(self, function: Callable[[Any], Any]) -> Any:
        """A context manager giving the workers' :class:`Pool`."""


class NotReady(Exception):  # noqa: N818 - a state rather than a fault
    """A piece is still being worked on."""


class Pool(ABC, Generic[Handle]):
    """Workers that run one function."""

    @abstractmethod
    def begin(self, item: Any) -> Handle:
        """Start one piece."""

    @abstractmethod
    def poll(self, handle: Handle) -> Any:
        """The result within :data:`POLL_SECONDS`, or :class:`NotReady`."""

    @abstractmethod
    def drop(self, handle: Handle) -> None:
        """Forget a piece that nobody waits for any more."""

    def recover(self, waiting: deque[tuple[Any, Handle]]) -> None:
        """Replace dead workers, and begin again what they had."""

    def wait(self, waiting: deque[tuple[Any, Handle]], cancel: threading.Event | None) -> Any:
        """The first piece's result; it is taken off the queue."""
        deaths = 0
        while True:
            stop_if_cancelled(cancel)
            try:
                result = self.poll(waiting[0][1])
            except NotReady:
                continue
            except BrokenProcessPool as error:
                deaths += 1
                if deaths > RETRIES:
                    raise _death_error(waiting[0][0]) from error
                self.recover(waiting)
                continue
            waiting.popleft()
            return result


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


def stop_if_cancelled(cancel: threading.Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise Cancelled("Cancelled; nothing was written.")


def _death_error(item: Any) -> ExecutorError:
    return ExecutorError(
        f"Worker processes died {RETRIES + 1} times around {item!s:.100}, perhaps for lack of "
        "memory. Take fewer workers (processes:1), or threads."
    )
