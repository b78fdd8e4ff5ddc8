"""Pieces of work that worker processes can import."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from merge_core.errors import SuiteError


def square(item: int) -> tuple[int, int]:
    """The square, and the number of torch threads that it was computed with."""
    return item * item, torch.get_num_threads()


def dies_once(marker: str) -> str:
    """Its own argument; where that names a file to make, only a second try gets so far."""
    path = Path(marker)
    if path.suffix == ".dies" and not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if path.suffix == ".fails":
        raise SuiteError("no such suite")
    return marker


def dies(item: int) -> None:
    """Kill the worker, every time."""
    os.kill(os.getpid(), signal.SIGKILL)
