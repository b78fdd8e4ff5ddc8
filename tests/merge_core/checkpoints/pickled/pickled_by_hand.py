"""Pickles and their containers written byte by byte, to say what no honest writer would."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path

import torch

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import CheckpointError

HEAD = b"\x80\x02"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def row(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def storage(key: str = "0", numel: int = 6, kind: bytes = b"ctorch\nFloatStorage\n") -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cpu") + integer(numel) + b"tQ"


def tensor(
    shape: tuple[int, ...] = (2, 3),
    strides: tuple[int, ...] = (3, 1),
    offset: int = 0,
    source: bytes = storage(),
) -> bytes:
    return REBUILD + b"(" + source + integer(offset) + row(shape) + row(strides) + b"\x89NtR"


def entries(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in values.items()) + b"u"


def module(**parts: bytes) -> bytes:
    """An instance of a foreign class with a state."""
    return b"cforeign\nModule\n)\x81" + entries(**parts) + b"b"


DATA = torch.arange(6.0).numpy().tobytes()


def to_zip(pickled: bytes, packing: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", packing) as archive:
        archive.writestr("m/data.pkl", pickled)
        archive.writestr("m/version", "3")
        for name, data in (members or {"0": DATA}).items():
            archive.writestr(f"m/data/{name}", data)
    return stream.getvalue()


MAGIC = 0x1950A86A20F9469CFC6C


def legacy(pickled: bytes, tail: bytes) -> bytes:
    parts = (MAGIC, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in parts) + pickled + tail


def nest(inner: bytes) -> bytes:
    """A bare pickle of a storage that is a file in bytes."""
    return (
        HEAD + b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(inner)) + inner
        + b"\x85R."
    )  # fmt: skip


def read_all(path: Path) -> Checkpoint:
    checkpoint = Checkpoint(path)
    for name in checkpoint:
        checkpoint.tensor(name)
    return checkpoint


def outcome(path: Path) -> str | None:
    """None if a file was read, else the sentence that refuses it; any other error passes."""
    try:
        read_all(path)
    except CheckpointError as error:
        message = str(error)
        return message if path.name in message and message.isprintable() else f"UNCLEAR {message}"
    return None


def is_clear(message: str | None) -> bool:
    return message is None or not message.startswith("UNCLEAR")
