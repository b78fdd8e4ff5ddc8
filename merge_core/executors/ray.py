"""Pieces of work on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from merge_core.errors import ExecutorError
from merge_core.executors.base import (
    POLL_SECONDS,
    RETRIES,
    NotReady,
    Pool,
    WindowedExecutor,
    one_thread,
)


class Ray(WindowedExecutor[Any]):
    """On a Ray cluster; a piece whose worker dies is run again by Ray.

    Needs ``pip install 'mergescope[cluster]'``. Paths must mean the same files on every node.

    Args:
        address: of a running cluster (``ray://host:10001``, or ``auto`` on one of its nodes);
            None starts one on this machine, which ends with this process.
        workers: pieces in flight; the cluster's number of CPUs when None.
        gpus: GPUs that each piece asks for (a fraction shares one); what the cluster has, shared
            evenly between the pieces in flight, when None.

    Raises:
        ExecutorError: Ray is not installed, or the cluster does not answer.

    Source: https://docs.ray.io/en/latest/ray-core/fault_tolerance/tasks.html
    """

    shares_memory = False

    def __init__(
        self, address: str | None = None, workers: int | None = None, gpus: float | None = None
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise ExecutorError(
                "Ray is not installed. Run: pip install 'mergescope[cluster]'."
            ) from error
        self._ray = ray
        if not ray.is_initialized():
            self._connect(address, workers)
        resources = ray.cluster_resources()
        count = int(resources.get("CPU", 1)) if workers is None else workers
        self._gpus = min(1.0, resources.get("GPU", 0) / count) if gpus is None else gpus
        super().__init__(count)

    def _connect(self, address: str | None, workers: int | None) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address is None:
            options |= {"num_cpus": workers, "include_dashboard": False}
        else:
            options["address"] = address
        try:
            self._ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise ExecutorError(
                f"The Ray cluster {address or 'on this machine'} does not answer: "
                f"{str(error).strip().splitlines()[0]:.200}. Start it with 'ray start --head'."
            ) from error

    @contextmanager
    def _open_pool(self, function: Callable[[Any], Any]) -> Iterator[Pool[Any]]:
        yield _RayPool(self._ray, function, self._gpus)


class _RayPool(Pool[Any]):
    def __init__(self, ray: Any, function: Callable[[Any], Any], gpus: float) -> None:
        self._ray = ray
        # Sent once to each node, however many items there are.
        self._function = ray.put(function)
        self._remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_run_remotely)

    def begin(self, item: Any) -> Any:
        return self._remote.remote(self._function, item)

    def poll(self, handle: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(handle, timeout=POLL_SECONDS)
        except errors.GetTimeoutError as error:
            if not any(node["Alive"] for node in self._ray.nodes()):
                raise ExecutorError(
                    "The Ray cluster is gone: none of its nodes is alive. Start it again, and run "
                    "the same command."
                ) from error
            raise NotReady from error
        except errors.RayTaskError as error:
            raise error.cause from None
        except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.RaySystemError) as error:
            raise ExecutorError(
                f"Ray's workers died {RETRIES + 1} times at one piece of work "
                f"({str(error).strip().splitlines()[0]:.200}). Give them more memory, or ask for "
                "fewer at once."
            ) from error

    def drop(self, handle: Any) -> None:
        self._ray.cancel(handle, force=False)


def _run_remotely(function: Callable[[Any], Any], item: Any) -> Any:
    with one_thread(workers=1):
        return function(item)
