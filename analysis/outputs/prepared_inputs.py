"""Inputs as networks take them, prepared once in a process and held within bounds."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakValueDictionary

from torch import Tensor

from analysis.data_sources.archive import TaskInputs
from merge_core.devices import Device

# On the CPU, of one split and of all; a larger split is prepared a batch at a time.
ONE_BYTES, ALL_BYTES = 1 << 28, 1 << 30
# Of the free memory of an accelerator, what prepared inputs may take.
SHARE = 4


class PreparedInputs:
    """Normalised inputs by content and device; those used longest ago go first."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._read: WeakValueDictionary[str, TaskInputs] = WeakValueDictionary()
        self._lock = threading.RLock()
        self._reading: dict[str, threading.RLock] = {}

    def read(self, key: str, read: Callable[[], TaskInputs]) -> TaskInputs:
        """Decoded or tokenised inputs, which all who hold them at one time share.

        Args:
            key: their content.
            read: gives them.
        """
        with self._lock:
            turn = self._reading.setdefault(key, threading.RLock())
        with turn:
            found = self._read.get(key)
            if found is None:
                found = self._read[key] = read()
            self._reading.pop(key, None)
            return found

    def fits(self, size: int, device: Device) -> bool:
        """Whether so many bytes are held on a device, rather than prepared a batch at a time."""
        with self._lock:
            return size <= self._limits(device)[0]

    def get(self, key: str, device: Device, prepare: Callable[[], Tensor]) -> Tensor:
        """Prepared inputs on a device.

        Args:
            key: their content.
            device: where they are wanted.
            prepare: makes them there.
        """
        place = (device.name, key)
        with self._lock:
            if place in self._held:
                self._held.move_to_end(place)
                return self._held[place]
        made = prepare()
        with self._lock:
            _, most = self._limits(device)
            self._held[place] = made
            mine = [held for held in self._held if held[0] == device.name and held != place]
            while mine and self._bytes(device) > most:
                del self._held[mine.pop(0)]
        return made

    def _limits(self, device: Device) -> tuple[int, int]:
        """Bytes of one split, and of all, that are held on a device."""
        if not device.accelerates:
            return ONE_BYTES, ALL_BYTES
        share = ((device.free_bytes() or 0) + self._bytes(device)) // SHARE
        return share, share

    def _bytes(self, device: Device) -> int:
        return sum(held.nbytes for (name, _), held in self._held.items() if name == device.name)


PREPARED = PreparedInputs()
"""Of this process."""
