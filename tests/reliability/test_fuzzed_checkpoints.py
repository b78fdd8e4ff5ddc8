"""Damaged and forged safetensors files and indexes: a value or one clear error, whatever is in.

MERGESCOPE_FUZZ=20000 asks for a longer run.
"""

from __future__ import annotations

import json
import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import CheckpointError
from merge_core.merging.recipe import make_recipe
from merge_core.output.model_folder import merge_to_folder
from merge_core.suites.suite import load_suite
from tests.reliability.limits import SECONDS, run_confined

INPUTS = int(os.environ.get("MERGESCOPE_FUZZ", "1500"))

NAMES: tuple[Any, ...] = (
    "w", "w", "b", "", ".", "..", "../../etc/cron.d/x", "/etc/passwd", "a/b", "C:\\x", "a\nb",
    "\x1b[2J", "\0", "\u202e", "\ud800", "__metadata__", "n" * 5000, "module.w", "ö", "𝒲",
)  # fmt: skip
SIZES: tuple[Any, ...] = (
    0, 1, 2, 3, -1, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64,
    10**400, 1.0, 1.5, True, None, "3", [], {},
)  # fmt: skip
DTYPES: tuple[Any, ...] = (
    "F32", "F32", "F32", "BF16", "F16", "F64", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64",
    "F8_E8M0", "U64", "f32", "", "X", None, 3, [], "F" * 10000,
)  # fmt: skip
PIECES = (
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\ud800", b"\xff", b"\0", b" " * 50, b"-",
    b"e9", b"9" * 40, b'"w":', b'"shape":[4611686018427387904]',
    b'"data_offsets":[0,18446744073709551615]', b'"__metadata__":{"a":1},', b"[" * 3000,
    b'{"a":' * 3000, b"null", b"NaN", b"1e999",
)  # fmt: skip


def file_of(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (
        struct.pack("<Q", (len(header) if length is None else length) % (1 << 64)) + header + data
    )


def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def good_files() -> list[bytes]:
    made = {
        "blocks.0.attn.qkv.weight": torch.arange(12.0).reshape(3, 4),
        "norm.weight": torch.ones(3, dtype=torch.float16),
        "half": torch.ones(2, 2, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
    }
    return [save(made, {"format": "pt", "mergescope": "{}"}), save({"w": torch.ones(2)})]


def damage(good: bytes, source: random.Random) -> bytes:
    """A good file with bytes changed, cut, doubled, or pieces of a header put in."""
    data = bytearray(good)
    header = 8 + int.from_bytes(good[:8], "little")
    for _ in range(source.choice([1, 1, 1, 2, 5])):
        region = source.choice([8, header, header, len(data)])
        at = source.randrange(max(1, min(region, len(data))))
        match source.randrange(6):
            case 0 | 1:
                data[at : at + 1] = bytes([source.randrange(256)])
            case 2:
                data[at : at + 1] = bytes([data[at] ^ (1 << source.randrange(8))] if data else [])
            case 3:
                del data[at : at + source.choice([1, 2, 40])]
            case 4:
                data[at:at] = data[at : at + source.choice([1, 9, 80])]
            case _:
                data[at : at + source.choice([0, 1, 9])] = source.choice(PIECES)
    if source.random() < 0.4:  # the length follows, so that more than the length is tested
        grown = header - 8 + len(data) - len(good)
        data[:8] = struct.pack("<Q", max(grown, 0))
    return bytes(data[: source.randrange(len(data) + 1)] if source.random() < 0.15 else data)


def forge(source: random.Random) -> bytes:
    """A file made to deceive: entries that overlap, lie, repeat, or are of other types."""
    size = source.choice([0, 4, 8, 16, 64])
    parts = []
    at = 0
    for _ in range(source.choice([0, 1, 1, 2, 3, 8])):
        name, honest = source.choice(NAMES), source.choice([0, 1, 2])
        fields = entry([honest], [at, at + 4 * honest])
        at += 4 * honest
        for _ in range(source.choice([0, 0, 1, 2])):
            match source.randrange(5):
                case 0:
                    fields["shape"] = [
                        source.choice(SIZES) for _ in range(source.choice([1, 2, 40]))
                    ]
                case 1:
                    fields["data_offsets"] = [source.choice([*SIZES, at, size]) for _ in range(2)]
                case 2:
                    fields["dtype"] = source.choice(DTYPES)
                case 3:
                    del fields[source.choice(sorted(fields))]
                    break
                case _:
                    fields["more"] = source.choice(SIZES)
        value = source.choice(SIZES) if source.random() < 0.05 else fields
        parts.append(f"{json.dumps(name)}:{json.dumps(value)}")
    if source.random() < 0.3:
        parts.append(
            f'"__metadata__":{json.dumps(source.choice([{"a": "b"}, {"a": 1}, [], "", 3]))}'
        )
    header = ("{" + ",".join(parts) + "}").encode()
    length = len(header) if source.random() < 0.9 else source.choice([0, 1, 1 << 40, -1, 10**8])
    return file_of(header, bytes(at if source.random() < 0.7 else size), length)


def index(source: random.Random) -> bytes:
    """A shard index that may point anywhere."""
    files = (
        "one.safetensors", "one.safetensors", "two.safetensors", "../one.safetensors", "..", "",
        "/etc/passwd", "/dev/zero", "one.safetensors/", "one.bin", "a\0b", "\ud800", "x" * 300, 3,
        None, ["one.safetensors"], "fuzzed.safetensors.index.json", "~/one.safetensors",
    )  # fmt: skip
    names = [
        source.choice([*NAMES, "norm.weight", "half"]) for _ in range(source.choice([0, 1, 2, 5]))
    ]
    likely = source.random() < 0.5
    document: Any = {
        "metadata": source.choice([{}, {"total_size": -1}, 3, None]),
        "weight_map": {name: files[0] if likely else source.choice(files) for name in names},
    }
    if source.random() < 0.1:
        document = source.choice(
            [[], {}, {"weight_map": []}, {"weight_map": {"w": {}}}, None, 3, "x"]
        )
    text = json.dumps(document).encode()
    return damage_text(text, source) if source.random() < 0.4 else text


def damage_text(text: bytes, source: random.Random) -> bytes:
    data = bytearray(text)
    at = source.randrange(len(data))
    data[at : at + source.choice([0, 1, 3])] = source.choice(PIECES)
    return bytes(data)


def outcome(path: Path) -> str | None:
    """None if all was read, else the sentence that refuses it; any other error passes."""
    try:
        checkpoint = Checkpoint(path)
        for name in checkpoint:
            value = checkpoint.tensor(name)
            assert tuple(value.shape) == checkpoint.info(name).shape
    except CheckpointError as error:
        return str(error)
    return None


def assert_clear(message: str | None, path: Path) -> None:
    if message is not None:
        assert str(path.parent) in message, message
        assert message.isprintable(), message
        assert len(message) < 1000, message
        assert message.endswith("."), message


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def fuzz(folder: Path, seed: int, inputs: int) -> tuple[int, int]:
    """Fuzz; gives how many were refused and how many were read."""
    source, goods = random.Random(seed), good_files()
    (folder / "one.safetensors").write_bytes(goods[0])
    tallies = [0, 0]
    for place in range(inputs):
        kind = source.randrange(5)
        path = folder / ("fuzzed.safetensors.index.json" if kind == 4 else "fuzzed.safetensors")
        made = index(source) if kind == 4 else None
        made = made or (forge(source) if kind >= 2 else damage(source.choice(goods), source))
        path.write_bytes(made)  # the last one is left for whoever looks into a failure
        start = time.process_time()
        message = outcome(path)
        assert time.process_time() - start < SECONDS, place
        assert_clear(message, path)
        tallies[message is None] += 1
    return tallies[0], tallies[1]


def test_damage_and_forgery_give_a_value_or_one_clear_error(tmp_path: Path) -> None:
    refused, read = run_confined(lambda: fuzz(tmp_path, 0, INPUTS), 60 + INPUTS * SECONDS)
    assert refused > INPUTS // 3
    assert read > INPUTS // 40
    files = {"fuzzed.safetensors", "fuzzed.safetensors.index.json", "one.safetensors"}
    assert tree(tmp_path) == files


def test_a_file_cut_at_every_place_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    good = good_files()[0]
    for cut in range(len(good)):
        path.write_bytes(good[:cut])
        message = outcome(path)
        assert message is not None, cut
        assert_clear(message, path)


def quick_outcome(path: Path) -> str | None:
    """What opening and reading a file says, in bounded memory and processor time."""

    def timed() -> tuple[str | None, float]:
        start = time.process_time()
        return outcome(path), time.process_time() - start

    message, seconds = run_confined(timed, 30)
    assert seconds < SECONDS
    return message


def laughs(count: int) -> bytes:
    one = '"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join([one % i for i in range(count)]) + "}").encode()


HOSTILE: dict[str, Callable[[], bytes]] = {
    "a million empty tensors": lambda: file_of(laughs(1_000_000)),
    "ten thousand empty tensors": lambda: file_of(laughs(10_000)),
    "a size of 2^62": lambda: file_of(json.dumps({"w": entry([1 << 62], [0, 1 << 63])}).encode()),
    "none of 2^62": lambda: file_of(json.dumps({"w": entry([0, 1 << 62], [0, 0])}).encode()),
    "a hundred thousand dimensions": lambda: file_of(
        json.dumps({"w": entry([1] * 100_000, [0, 4])}).encode(), bytes(4)
    ),
    "a name of a million letters": lambda: file_of(
        json.dumps({"w" * 10**6: entry([1], [0, 4])}).encode(), bytes(4)
    ),
    "nested lists": lambda: file_of(b'{"w":' + b"[" * 10**6 + b"]" * 10**6 + b"}"),
    "nested tables": lambda: file_of(b'{"__metadata__":' + b'{"a":' * 10**6 + b"}" * (10**6 + 1)),
    "ninety megabytes of blanks": lambda: file_of(b"{" + b" " * 90_000_000 + b"}"),
    "forty megabytes of notes": lambda: file_of(
        json.dumps({"__metadata__": {"a": "x" * 40_000_000}}).encode()
    ),
    "a length of 2^63": lambda: file_of(b"{}", length=1 << 63),
    "a number of a million digits": lambda: file_of(
        b'{"w":{"dtype":"F32","shape":[' + b"9" * 10**6 + b'],"data_offsets":[0,4]}}', bytes(4)
    ),
    "overlapping tensors": lambda: file_of(
        json.dumps({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}).encode(), bytes(12)
    ),
    "a gap": lambda: file_of(json.dumps({"a": entry([1], [4, 8])}).encode(), bytes(8)),
    "bytes after the end": lambda: file_of(
        json.dumps({"a": entry([1], [0, 4])}).encode(), bytes(9)
    ),
    "a name twice": lambda: file_of(
        b'{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
        b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)
    ),
}  # fmt: skip
READ = {"ten thousand empty tensors"}


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_worst_files_take_neither_time_nor_memory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HOSTILE[kind]())
    message = quick_outcome(path)
    assert (message is None) == (kind in READ), message
    assert_clear(message, path)


def index_of(entry: str, size: int) -> bytes:
    """An index of some size in bytes, with as many entries as it holds."""
    body = ",".join(entry % i for i in range(size // len(entry % 0)))
    return ('{"weight_map":{' + body + "}}").encode()


INDEXES: dict[str, Callable[[], bytes]] = {
    "lists in lists": lambda: b"[" * 10**6,
    "tables in tables": lambda: b'{"weight_map":' * 10**5,
    "one long name": lambda: b'{"weight_map":{"w":"' + b"x" * 60_000_000,
    "48 MB": lambda: index_of('"w%d":"one.safetensors"', 48_000_000),
    "19 MB of short names": lambda: index_of('"%d":"a"', 19_000_000),
    "19 MB of lists": lambda: b'{"weight_map":{},"a":[' + b"[]," * 6_300_000 + b"[]]}",
    "19 MB of numbers": lambda: b'{"weight_map":{},"a":[' + b"1," * 9_000_000 + b"1]}",
    "19 MB of escapes": lambda: b'{"weight_map":{"' + b"\\ud800" * 3_000_000 + b'":"a"}}',
    "19 MB of long names": lambda: index_of(f'"%d{"n" * 400}":"one.safetensors"', 19_000_000),
    "19 MB of no text": lambda: b'{"weight_map":{"' + b"\xff" * 19_000_000 + b'":"a"}}',
}  # fmt: skip


@pytest.mark.parametrize("kind", INDEXES)
def test_the_worst_indexes_too(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "hostile.safetensors.index.json"
    path.write_bytes(INDEXES[kind]())
    message = quick_outcome(path)
    assert message is not None
    assert_clear(message, path)


def zip_of(count: int, name: bytes, extra: bytes) -> bytes:
    """A zip file of so many empty members, each with a long name and extra fields."""
    record = struct.pack(
        "<4s6H3L5H2L", b"PK\x01\x02", 45, 45, 0, 0, 0, 0, 0, 0xFFFFFFFF, 0,
        len(name) + 8, len(extra), 0, 0, 0, 0, 0,
    )  # fmt: skip
    directory = b"".join(record + name + b"%08d" % i + extra for i in range(count))
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(directory), 4, 0)
    return b"PK\x03\x04" + directory + end


ZIPS: dict[str, Callable[[], bytes]] = {
    "31 MB of extra fields": lambda: zip_of(480, b"a/data/", b"\0\0\0\0" * 16_000),
    "31 MB of long extra fields": lambda: zip_of(480, b"a/data/", b"\2\0\x0b\0" + b"x" * 64_000),
    "32 MB of undecodable names": lambda: zip_of(500, b"\xff" * 65_000, b""),
    "32 MB of undecodable names, each allowed": lambda: zip_of(8_000, b"\xff" * 4_000, b""),
    "32 MB of undecodable texts": lambda: (
        b"\x80\x02(" + (b"X" + struct.pack("<I", 4000) + b"\xff" * 4000) * 8_300 + b"l."
    ),
    "32 MB of halves of pairs": lambda: (
        b"\x80\x02(" + (b"V" + b"\\ud800" * 10_000 + b"\n") * 540 + b"l."
    ),
    "32 MB of undecodable lines": lambda: b"\x80\x02(" + (b"S'" + b"\xff" * 60_000 + b"'\n") * 540,
    "32 MB of undecodable globals": lambda: (
        b"\x80\x02(" + (b"c" + b"\xff" * 30_000 + b"\nx\n") * 1_000 + b"l."
    ),
}


@pytest.mark.parametrize("kind", ZIPS)
def test_the_worst_torch_files_too(tmp_path: Path, kind: str) -> None:
    """Work, not bytes, is bounded: what is no text takes a hundred times as long as text."""
    path = tmp_path / "hostile.pt"
    path.write_bytes(ZIPS[kind]())
    message = quick_outcome(path)
    assert message is not None
    assert_clear(message, path)


def test_names_like_paths_are_only_names(tmp_path: Path) -> None:
    """Whatever tensors are called, a merge writes its own files and nothing else."""
    names = [
        "../../up",
        "/tmp/absolute-mergescope",
        "a/b/c",
        "..",
        "C:\\x",
        "",
        "~",
        "$HOME",
        "%s%n",
    ]
    (tmp_path / "in").mkdir()
    state = {name: torch.full((2, 3), float(i)) for i, name in enumerate(names)}
    (tmp_path / "in" / "x.safetensors").write_bytes(save(state))
    suite = tmp_path / "in" / "suite.yaml"
    suite.write_text("name: s\nexperts: {x: {weights: x.safetensors}}\n")
    recipe = make_recipe({"suite": str(suite), "method": "average"})
    before = tree(tmp_path)
    merge_to_folder(recipe, load_suite(suite), tmp_path / "out", shard_bytes=30)
    assert {path.split("/")[0] for path in tree(tmp_path) - before} == {"out"}
    assert not Path("/tmp/absolute-mergescope").exists()
    merged = Checkpoint(tmp_path / "out")
    assert sorted(merged) == sorted(names)
    assert all(merged.tensor(name).equal(value) for name, value in state.items())


@pytest.mark.parametrize("name", ["__metadata__", "a\nb", "\x1b[2J", "n" * 501])
def test_names_that_no_output_could_hold_are_refused_in_pickles_too(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(2), name: torch.ones(2)}, path)
    message = outcome(path)
    assert message is not None
    assert_clear(message, path)
    assert "name" in message
