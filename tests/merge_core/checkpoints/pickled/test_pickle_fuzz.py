"""Damaged pickled files: whatever is changed, a value or one clear error, and nothing runs.

MERGESCOPE_FUZZ=20000 asks for a longer run.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.merge_core.checkpoints.pickled.pickled_by_hand import is_clear, outcome

pytestmark = pytest.mark.filterwarnings("ignore")

SECONDS = 2.0  # of processor time, for each
INPUTS = int(os.environ.get("MERGESCOPE_FUZZ", "300"))


PIECES = (
    b"cos\npath\n", b"ccanary\ntouch\n)R", b"c__builtin__\ngetattr\n", b"N0", b"K\x01K\x02\x86",
    b"(", b"}", b"0", b"R", b"b", b"\x85", b"\x94", b"h\x00", b"\xff" * 8,
    struct.pack("<q", 1 << 62),
)  # fmt: skip


def samples() -> dict[str, bytes]:
    """Good files of each format, small."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    made = {"bare": pickle.dumps(model, 4), "state": pickle.dumps(model.state_dict(), 3)}
    for name, options in (("zip", {}), ("legacy", {"_use_new_zipfile_serialization": False})):
        stream = io.BytesIO()
        torch.save(model, stream, **options)
        made[name] = stream.getvalue()
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(made["zip"])) as old,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    made["packed"] = stream.getvalue()
    return made


def damage(good: bytes, source: random.Random) -> bytes:
    """A good file with bytes changed, cut, doubled, or pieces of pickle put in."""
    data = bytearray(good)
    for _ in range(source.choice([1, 1, 2, 8])):
        at = source.randrange(len(data))
        match source.randrange(6):
            case 0 | 1:
                data[at] = source.randrange(256)
            case 2:
                data[at] ^= 1 << source.randrange(8)
            case 3:
                del data[at : at + source.choice([1, 4, 1000])]
            case 4:
                data[at:at] = data[at : at + source.choice([1, 9, 200])]
            case _:
                piece = source.choice(PIECES)
                data[at : at + source.choice([0, len(piece)])] = piece
        if not data:
            return b"N."
    return bytes(data[: source.randrange(1, len(data) + 1)] if source.random() < 0.1 else data)


def test_damage_anywhere_gives_a_value_or_one_clear_error(tmp_path: Path) -> None:
    source = random.Random(0)
    goods = samples()
    for name, good in goods.items():
        (tmp_path / f"{name}.pt").write_bytes(good)
        assert outcome(tmp_path / f"{name}.pt") is None
    modules = set(sys.modules) | {"encodings.raw_unicode_escape"}  # of texts of protocol 0
    refused = 0
    for place in range(INPUTS):
        name = list(goods)[place % len(goods)]
        path = tmp_path / f"{name}.pt"  # the last one is left for whoever looks into a failure
        path.write_bytes(damage(goods[name], source))
        start = time.process_time()
        message = outcome(path)
        assert time.process_time() - start < SECONDS
        assert is_clear(message), message
        assert set(sys.modules) <= modules
        refused += message is not None
    assert INPUTS // 3 < refused < INPUTS


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    source = random.Random(1)
    for name, good in samples().items():
        path = tmp_path / f"{name}.pt"
        for cut in source.sample(range(1, len(good)), 30):
            path.write_bytes(good[:cut])
            message = outcome(path)
            assert message is not None
            assert is_clear(message), message
