"""Work in a process of its own, with little memory and time: whatever it meets, it must answer."""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

MEMORY = 500 << 20  # for one input, beyond what the imported libraries take
SECONDS = 1.0  # of processor time, for one input


def run_confined(work: Callable[[], Result], seconds: float) -> Result:
    """What `work` returns in a forked process that may take 500 MB more than this one has.

    Raises:
        AssertionError: it died, took too long, or raised.
    """
    answer, told = os.pipe()
    number = os.fork()
    if number == 0:
        os.close(answer)
        try:
            own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, own + MEMORY))
            result = pickle.dumps((True, work()))
        except BaseException as error:
            result = pickle.dumps((False, f"{type(error).__name__}: {error!s:.500}"))
        with os.fdopen(told, "wb") as stream:
            stream.write(result)
        os._exit(0)
    os.close(told)
    parts = []
    with os.fdopen(answer, "rb", buffering=0) as stream:
        while select.select([stream], [], [], seconds)[0] and (part := stream.read(1 << 20)):
            parts.append(part)
    if not parts:
        os.kill(number, signal.SIGKILL)
    _, status = os.waitpid(number, 0)
    assert parts, f"no answer within {seconds} s and 500 MB (status {status})"
    fine, result = pickle.loads(b"".join(parts))
    assert fine, result
    return result  # type: ignore[no-any-return]
