"""Devices that compute: the only place that knows their names.

Whatever multiplies asks :func:`current_device`, sends tensors there and fetches results. Results
do not depend on the device but for rounding, so nothing that is kept is keyed by it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor

from merge_core.errors import DeviceError

VARIABLE = "MERGESCOPE_DEVICE"
AUTO = "auto"
GIB = 1 << 30
Result = TypeVar("Result")


@dataclass(frozen=True)
class Device:
    """One device of this machine.

    Attributes:
        name: by which it is chosen: ``cpu``, ``cuda:0``, ``mps``.
        title: what it is, such as ``NVIDIA H200``.
        accelerates: whether it is another one than the CPU.
        has_float64: whether it computes in float64.
    """

    name: str
    title: str
    accelerates: bool = True
    has_float64: bool = True

    @property
    def torch(self) -> torch.device:
        """The device as torch takes it."""
        return torch.device(self.name)

    @property
    def exact(self) -> Device:
        """Where float64 is computed: here, or on the CPU where this device has none."""
        return self if self.has_float64 else CPU

    def send(self, tensor: Tensor) -> Tensor:
        """The tensor on this device; itself where it is there already."""
        return tensor.to(self.torch)

    def fetch(self, tensor: Tensor) -> Tensor:
        """A tensor of this device on the CPU."""
        return tensor.cpu()

    def inference(self) -> AbstractContextManager[None]:
        """Where nothing is kept for derivatives."""
        return cast("AbstractContextManager[None]", torch.inference_mode())

    def free_bytes(self) -> int | None:
        """Free memory; None where nobody can say."""
        return _free_bytes(self.name)

    def release(self) -> None:
        """Give memory that torch holds for later back to the device."""
        if self.name.startswith("cuda"):
            torch.cuda.empty_cache()
        elif self.name == "mps":
            torch.mps.empty_cache()

    def synchronize(self) -> None:
        """Wait until all that was begun on the device is done."""
        if self.name.startswith("cuda"):
            torch.cuda.synchronize(self.torch)
        elif self.name == "mps":
            torch.mps.synchronize()

    def words(self) -> str:
        """What it is and how much of its memory is free, in words."""
        free = self.free_bytes()
        return self.title if free is None else f"{self.title}, {free / GIB:.1f} GiB free"


def _cpu_title() -> str:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU, {count} core{'' if count == 1 else 's'}"


CPU = Device("cpu", _cpu_title(), accelerates=False)


@cache
def find_devices() -> tuple[Device, ...]:
    """What this machine has, the one that ``auto`` takes first: CUDA, Apple's MPS, the CPU.

    Example:
        >>> find_devices()[-1].name
        'cpu'
    """
    found: list[Device] = []
    if torch.cuda.is_available():
        _compute_in_full_precision()
        found += [
            Device(f"cuda:{number}", torch.cuda.get_device_name(number))
            for number in range(torch.cuda.device_count())
        ]
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple GPU (MPS)", has_float64=False))
    return (*found, CPU)


def _compute_in_full_precision() -> None:
    """Float32 means float32: TF32, which convolutions take by default, has ten bits."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def choose_device(name: str | None = None, devices: Sequence[Device] | None = None) -> Device:
    """The device that a user names.

    Args:
        name: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; what :data:`VARIABLE` says, else
            ``auto``, when None.
        devices: what there is; what this machine has when None.

    Raises:
        DeviceError: an unknown name, or a device that is not there.

    Example:
        >>> choose_device("cpu").name
        'cpu'
    """
    said = f"${VARIABLE} names" if name is None else "You ask for"
    if name is None:
        name = os.environ.get(VARIABLE, "").strip() or AUTO
    found = find_devices() if devices is None else devices
    wanted = name.strip().lower()
    if wanted == AUTO:
        return found[0]
    for device in found:
        if wanted in (device.name, device.name.partition(":")[0]):
            return device
    offered = ", ".join([AUTO, *(device.name for device in found)])
    if not is_device_name(wanted):
        raise DeviceError(
            f"{said} {name!r:.60}, which is no device: take auto, cpu, cuda, cuda:N or mps "
            f"(here: {offered})."
        )
    kind = {"cuda": "CUDA", "mps": "MPS"}.get(wanted.partition(":")[0], wanted)
    which = f"no {kind} device" if ":" not in wanted else f"no device {wanted}"
    raise DeviceError(f"PyTorch finds {which} here; take one of {offered}.")


def is_device_name(name: str) -> bool:
    """Whether some machine may have a device of that name.

    Example:
        >>> is_device_name("cpu"), is_device_name("tpu")
        (True, False)
    """
    return re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name.strip().lower()) is not None


_CHOSEN: ContextVar[Device | None] = ContextVar("device", default=None)


def current_device() -> Device:
    """Where this thread computes: what was chosen, else what :func:`choose_device` takes.

    Raises:
        DeviceError: the environment names a device that is not there.

    Example:
        >>> with use_device(CPU):
        ...     current_device().name
        'cpu'
    """
    return _CHOSEN.get() or choose_device()


@contextmanager
def use_device(device: Device) -> Iterator[None]:
    """Compute there meanwhile, in this thread and in executors' threads that it begins.

    Example:
        >>> with use_device(CPU):
        ...     current_device().accelerates
        False
    """
    token = _CHOSEN.set(device)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def set_device(device: Device) -> None:
    """Compute there from now on, in this thread.

    Example:
        >>> set_device(CPU)
        >>> current_device().name
        'cpu'
    """
    _CHOSEN.set(device)


@contextmanager
def use_process_device(name: str | None) -> Iterator[Device]:
    """Compute there meanwhile: in this thread, in threads that choose nothing, in new processes.

    Args:
        name: see :func:`choose_device`.

    Raises:
        DeviceError: an unknown name, or a device that is not there.

    Example:
        >>> with use_process_device("cpu") as device:
        ...     os.environ[VARIABLE], device.name
        ('cpu', 'cpu')
    """
    device, before = choose_device(name), os.environ.get(VARIABLE)
    os.environ[VARIABLE] = device.name
    try:
        with use_device(device):
            yield device
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory left for what was asked of it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text
    )


def compute(work: Callable[[Device], Result], exact: bool = False) -> Result:
    """What work gives on the current device; on the CPU where that has too little memory.

    Args:
        work: sends what it needs to the device that it is given, and fetches its result.
        exact: whether it computes in float64.

    Example:
        >>> compute(lambda device: device.fetch(device.send(torch.ones(2)) * 2))
        tensor([2., 2.])
    """
    device = current_device().exact if exact else current_device()
    if device.accelerates:
        try:
            return work(device)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
        device.release()
    return work(CPU)


def _free_bytes(name: str) -> int | None:
    if name.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(name))[0])
    if name == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    with suppress(OSError, ValueError, IndexError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        said = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(said.split()[1]) << 10
    return None
