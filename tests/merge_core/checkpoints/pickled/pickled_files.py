"""What the tests of pickled files share: every way to write one, and a comparison to the bit."""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_core.checkpoints.checkpoint import Checkpoint

Save = Callable[[Any, Path], None]


def save_bare(content: Any, path: Path, protocol: int) -> None:
    path.write_bytes(pickle.dumps(content, protocol))


FORMATS: dict[str, Save] = {
    "zip": torch.save,
    "zip, protocol 4": partial(torch.save, pickle_protocol=4),
    "zip, protocol 5": partial(torch.save, pickle_protocol=5),
    "legacy": partial(torch.save, _use_new_zipfile_serialization=False),
    "legacy, protocol 4": partial(
        torch.save, pickle_protocol=4, _use_new_zipfile_serialization=False
    ),
    "bare, protocol 3": partial(save_bare, protocol=3),
    "bare, protocol 4": partial(save_bare, protocol=4),
    "bare, protocol 5": partial(save_bare, protocol=5),
}
every_format = pytest.mark.parametrize("save", FORMATS.values(), ids=FORMATS.keys())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def raw_bytes(value: Tensor) -> bytes:
    """The entries in order."""
    dense = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
    return dense.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert got.stride() == expected.stride() or got.numel() < 2
    assert raw_bytes(got) == raw_bytes(expected)
    assert got.data_ptr() % got.element_size() == 0


def assert_holds(path: Path, state: Mapping[str, Tensor]) -> Checkpoint:
    checkpoint = Checkpoint(path)
    assert list(checkpoint) == sorted(state)
    for name, value in state.items():
        assert checkpoint.info(name).shape == tuple(value.shape)
        assert checkpoint.info(name).dtype.torch == value.dtype
        assert_same(checkpoint.tensor(name), value)
    return checkpoint


@contextmanager
def make_importable(module: str, **classes: type) -> Iterator[None]:
    """Classes that can be imported, and so pickled, only inside the block."""
    parts = module.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    for name, value in classes.items():
        value.__module__, value.__qualname__ = module, name
        setattr(sys.modules[module], name, value)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def legacy(pickled: bytes, keys: list[str], storages: bytes, **machine: Any) -> bytes:
    about = {"protocol_version": 1001, "little_endian": True, **machine}
    parts = (0x1950A86A20F9469CFC6C, 1001, about)
    return (
        b"".join(pickle.dumps(part, 2) for part in parts)
        + pickled
        + pickle.dumps(keys, 2)
        + storages
    )
