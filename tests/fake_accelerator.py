"""An accelerator on the CPU: its tensors refuse to meet those of the CPU, and may not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._pytree import tree_map

from merge_core import devices
from merge_core.devices import CPU, Device


class There(Tensor):
    """A tensor of the accelerator: one of the CPU that nothing of the CPU can be mixed with."""

    inner: Tensor
    is_cpu = False  # type: ignore[assignment]
    # Whether it may meet what a library makes by `device=x.device`, which is the CPU's here.
    lenient = False

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device="cpu",
            storage_offset=inner.storage_offset(),
        )  # fmt: skip
        made.inner = inner
        return made

    def __init__(self, inner: Tensor) -> None:
        """Everything is done when it is made."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"There({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def open_up(value: Any) -> Any:
            if isinstance(value, There):
                return value.inner
            # Numbers of both may meet, as in torch; integers may be made by `device=x.device`.
            floats = isinstance(value, Tensor) and value.ndim > 0 and value.is_floating_point()
            if floats and not There.lenient:
                raise RuntimeError(f"{func} meets tensors of two devices")
            return value

        result = func(*tree_map(open_up, args), **tree_map(open_up, kwargs or {}))
        # As torch does: what changes a tensor in place gives that tensor back.
        if func._schema.is_mutable and args and result is open_up(args[0]):
            return args[0]
        return tree_map(lambda v: There(v) if isinstance(v, Tensor) else v, result)


class _Send(Function):
    """To the accelerator, differentiable as torch's own copies are."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return There(tensor.detach())

    @staticmethod
    def backward(ctx: Any, slope: Any) -> Tensor:
        return cast(Tensor, slope.inner)


class _Fetch(Function):
    """Back to the CPU."""

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        return cast(Tensor, tensor.inner.detach())

    @staticmethod
    def backward(ctx: Any, slope: Any) -> Tensor:
        return There(slope)


@dataclass(frozen=True)
class Fake(Device):
    """An accelerator whose tensors are :class:`There`.

    Attributes:
        room: called with what is sent, to raise where it does not fit.
        sent: how many tensors were sent.
    """

    room: Callable[[Tensor], None] = lambda tensor: None
    sent: list[int] = field(default_factory=list)

    def send(self, tensor: Tensor) -> Tensor:
        """The tensor there."""
        if isinstance(tensor, There):
            return tensor
        self.room(tensor)
        self.sent.append(tensor.numel())
        sent: Tensor = _Send.apply(tensor)
        return sent

    def fetch(self, tensor: Tensor) -> Tensor:
        """The tensor on the CPU."""
        if not isinstance(tensor, There):
            return tensor
        fetched: Tensor = _Fetch.apply(tensor)
        return fetched

    def inference(self) -> AbstractContextManager[None]:
        """Inference mode takes no tensors of a kind of one's own."""
        return torch.no_grad()

    def free_bytes(self) -> int | None:
        """As much as a small card has."""
        return 8 << 30

    def release(self) -> None:
        """Nothing is held."""


def fake(**fields: Any) -> Fake:
    """An accelerator by the name of a first CUDA device."""
    return Fake("cuda:0", "Fake Accelerator 3000", **fields)


@contextmanager
def only(device: Device) -> Iterator[None]:
    """Compute there, on a machine that has it beside the CPU."""
    found = devices.find_devices
    devices.find_devices = lambda: (device, CPU)  # type: ignore[assignment]
    try:
        with devices.use_device(device):
            yield
    finally:
        devices.find_devices = found
