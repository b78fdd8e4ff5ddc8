"""The executor that a user names."""

from __future__ import annotations

from merge_core.errors import ExecutorError
from merge_core.executors.base import Executor
from merge_core.executors.local import Processes, Serial, Threads


def choose_executor(text: str) -> Executor:
    """The executor that a user names.

    Args:
        text: ``serial``, ``threads``, ``processes`` or ``ray`` (on this machine), the last three
            with a number of workers after a colon if wanted; or a cluster's address,
            ``ray://host:port``.

    Raises:
        ExecutorError: an unknown name or number, or a cluster that does not answer.

    Example:
        >>> list(choose_executor("threads:2").map(abs, [-1, 2, -3]))
        [1, 2, 3]
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
    from merge_core.executors.ray import Ray  # Ray takes a second to import

    return Ray(address, workers)
