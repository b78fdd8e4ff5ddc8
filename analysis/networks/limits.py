"""What a description may have a library build: no more than the weights at hand could fill.

A ``suite.yaml`` or ``pool.yaml`` of a stranger names an architecture and arguments. A depth of a
hundred million, or a width, would take all memory before anything could be compared; a name or
argument that a library takes for a place would have it fetch or open files.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from merge_core.checkpoints.checkpoint import Checkpoint

# Images have sides of thousands of pixels, however small the weights are.
COMMON_NUMBER = 4096
LARGEST_NUMBER = 2_000_000
MOST_NUMBERS = 1_000  # of arguments, in all lists together
FACTOR = 2  # what weights leave out: heads, projections, tables of positions
SPARE_TENSORS, SPARE_ELEMENTS = 1_000, 4_000_000
BUFFER_ELEMENTS = 100_000_000  # masks and tables of positions, which weights do not hold
MODULES_PER_TENSOR = 20
TEXT_CHARACTERS = 200
# Arguments by which the libraries fetch weights, open files or run code.
FETCHING = re.compile(
    r"pretrained|checkpoint_path|cache_dir|scriptable|remote_code|auto_map|use_kernels"
    r"|_implementation|name_or_path|local_files|revision|hf_",
    re.IGNORECASE,
)
PLACE = re.compile(r"[:/\\]|^\.|^~")  # a hub's name, an address or a path


@dataclass(frozen=True)
class Size:
    """How large the weights are that a network is built for, by their headers.

    Attributes:
        tensors: how many.
        elements: of all together.
        longest: the largest dimension of any.
    """

    tensors: int = 20_000
    elements: int = 2_000_000_000
    longest: int = 100_000

    @classmethod
    def of(cls, weights: Checkpoint) -> Size:
        """The size of a checkpoint; nothing but its headers is read."""
        shapes = [weights.info(name).shape for name in weights]
        longest = max((max(shape, default=1) for shape in shapes), default=1)
        return cls(len(shapes), sum(map(math.prod, shapes)), longest)


class TooLargeError(Exception):
    """A network that the weights cannot fill, or one with no place in memory."""


def find_fetching(name: str, arguments: Mapping[str, Any]) -> str | None:
    """A name or argument by which a library would fetch or open something, in words.

    Args:
        name: of the architecture.
        arguments: for it, nested as they may be.

    Returns:
        Such as ``the argument 'pretrained'``; None if there is none.
    """
    if PLACE.search(name):
        return f"the name {name!r:.80}"
    return _find_fetching(arguments)


def _find_fetching(value: Any) -> str | None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            refused = str(key).startswith("_") or FETCHING.search(str(key))
            if refused and item not in (False, None):
                return f"the argument {str(key)!r:.80}"
            if (found := _find_fetching(item)) is not None:
                return found
    if isinstance(value, list | tuple):
        return next((found for item in value if (found := _find_fetching(item))), None)
    if isinstance(value, str) and (PLACE.search(value) or len(value) > TEXT_CHARACTERS):
        return f"the value {value!r:.80}"
    return None


def build_within(size: Size, arguments: Any, build: Callable[[], nn.Module]) -> nn.Module:
    """A network, after it was counted without memory and found to be as large as weights may be.

    Args:
        size: of the weights that are to fill it.
        arguments: the numbers that `build` takes, nested as they may be.
        build: makes the network; called twice, at first on the meta device.

    Raises:
        TooLargeError: an argument, or the network, is out of proportion to the weights.
    """
    most = min(max(COMMON_NUMBER, size.longest, size.tensors), LARGEST_NUMBER)
    numbers = list(_numbers(arguments))
    if len(numbers) > MOST_NUMBERS:
        raise TooLargeError(f"{len(numbers):,} numbers are out of proportion to any network")
    if large := [number for number in numbers if not abs(number) <= most]:
        raise TooLargeError(f"the number {large[0]:,} is out of proportion to the weights")
    with _counting(size) as counts, torch.device("meta"):
        try:
            build()
        finally:
            counts.check()
    return build()


def _numbers(value: Any) -> Iterator[float]:
    """Every number in arguments, as deep as it may be."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value


class _Counts:
    """What was registered in modules by one thread, against what may be."""

    def __init__(self, size: Size) -> None:
        self._tensors = FACTOR * size.tensors + SPARE_TENSORS
        self._modules = MODULES_PER_TENSOR * self._tensors
        self._elements = FACTOR * size.elements + SPARE_ELEMENTS
        self._buffers = BUFFER_ELEMENTS
        self._thread = threading.get_ident()

    def add_parameter(self, _module: nn.Module, _name: str, value: Tensor | None) -> None:
        self._add(1, 0 if value is None else value.numel(), 0, 0)

    def add_buffer(self, _module: nn.Module, _name: str, value: Tensor | None) -> None:
        self._add(1, 0, 0 if value is None else value.numel(), 0)

    def add_module(self, _module: nn.Module, _name: str, _value: nn.Module | None) -> None:
        self._add(0, 0, 0, 1)

    def _add(self, tensors: int, elements: int, buffers: int, modules: int) -> None:
        if threading.get_ident() != self._thread:
            return
        self._tensors -= tensors
        self._elements -= elements
        self._buffers -= buffers
        self._modules -= modules
        self.check()

    def check(self) -> None:
        """Raise if too much was registered, also where a library caught what was raised then."""
        if min(self._tensors, self._elements, self._buffers, self._modules) < 0:
            raise TooLargeError("it would have far more parameters than the weights")


@contextmanager
def _counting(size: Size) -> Iterator[_Counts]:
    """Count what this thread's modules register, and stop at what the weights allow."""
    counts = _Counts(size)
    with ExitStack() as stack:
        for register, count in (
            (hooks.register_module_parameter_registration_hook, counts.add_parameter),
            (hooks.register_module_buffer_registration_hook, counts.add_buffer),
            (hooks.register_module_module_registration_hook, counts.add_module),
        ):
            stack.callback(register(count).remove)
        yield counts


def check_memory(size: Size) -> None:
    """Refuse weights of which no float32 copy has a place in this machine's memory.

    Raises:
        TooLargeError: they are too large.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * size.elements > memory:
        raise TooLargeError(
            f"its weights take {4 * size.elements / 1e9:,.1f} GB in float32, and this machine has "
            f"{memory / 1e9:,.1f} GB of memory"
        )
