"""Pickles and archives that lie about sizes or grow without bound: refused in time and memory.

Run as a script on a folder, it opens every file there in a process of its own and reports what
happened: events that Python's audit hooks saw, seconds, memory.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from merge_core.checkpoints.pickled.machine import MOST_STEPS
from tests.merge_core.checkpoints.pickled.pickled_by_hand import (
    DATA,
    HEAD,
    REBUILD,
    entries,
    integer,
    legacy,
    module,
    nest,
    read_all,
    row,
    storage,
    tensor,
    text,
    to_zip,
)

SECONDS = 2.0  # of processor time; about one on a quiet machine
MEGABYTES = 500

HUGE = 1 << 62
MANY = MOST_STEPS - 1000  # as much as is allowed
DEEP = 200_000


def claim(code: bytes, layout: str, size: int) -> bytes:
    return HEAD + code + struct.pack(layout, size) + b"abc."


def shared_modules(depth: int, bottom: bytes) -> bytes:
    """Modules that hold the one below twice: 2^depth names."""
    made = module(_modules=b"}", _parameters=bottom) + b"\x94"
    for place in range(depth):
        below = b"h" + bytes([place])
        made += module(_modules=entries(a=below, b=below)) + b"\x94"
    return to_zip(HEAD + made + b".")


def patch(data: bytes, **fields: Any) -> bytes:
    """A zip file with fields of its last directory entry or its end record overwritten."""
    raw = bytearray(data)
    entry, end = raw.rindex(b"PK\x01\x02"), raw.rindex(b"PK\x05\x06")
    places = {
        "flags": (entry + 8, "<H"), "method": (entry + 10, "<H"), "packed": (entry + 20, "<I"),
        "size": (entry + 24, "<I"), "name_size": (entry + 28, "<H"),
        "header": (entry + 42, "<I"), "number": (end + 10, "<H"),
        "directory_size": (end + 12, "<I"), "directory": (end + 16, "<I"),
    }  # fmt: skip
    for name, value in fields.items():
        place, layout = places[name]
        struct.pack_into(layout, raw, place, value)
    return bytes(raw)


def with_64_bits(data: bytes, **fields: int) -> bytes:
    """A zip file with an end record of 64 bits that claims what it likes."""
    at = data.rindex(b"PK\x05\x06")
    number, size, start = struct.unpack_from("<HII", data, at + 10)
    claims = {"number": number, "size": size, "start": start, "place": at} | fields
    record = struct.pack(
        "<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0,
        claims["number"], claims["number"], claims["size"], claims["start"],
    )  # fmt: skip
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, claims["place"], 1)
    return data[:at] + record + locator + data[at:]


def far_entry(data: bytes) -> bytes:
    """A zip file whose last entry lies at 2^64 - 1, as its extra field of 64 bits says."""
    data = patch(data, header=0xFFFFFFFF)
    entry, end = data.rindex(b"PK\x01\x02"), data.rindex(b"PK\x05\x06")
    extra = struct.pack("<HHQ", 1, 8, 2**64 - 1)
    raw = bytearray(data[:end] + extra + data[end:])
    struct.pack_into("<H", raw, entry + 30, len(extra))
    return patch(bytes(raw), directory_size=end + len(extra) - data.index(b"PK\x01\x02"))


LEGACY_STORAGE = storage()[:-2] + b"NtQ"  # with a view of nothing
GOOD_ZIP = to_zip(HEAD + entries(w=tensor()) + b".")
LIES: dict[str, Callable[[], bytes]] = {
    # sizes of texts, bytes and numbers
    "text": lambda: claim(b"\x8d", "<Q", HUGE),
    "text of 4 GiB": lambda: claim(b"X", "<I", 0xFFFFFFFF),
    "negative text": lambda: claim(b"T", "<i", -1),
    "bytes": lambda: claim(b"\x8e", "<Q", HUGE),
    "byte array": lambda: claim(b"\x96", "<Q", 2**64 - 1),
    "frame": lambda: HEAD + b"\x95" + struct.pack("<Q", HUGE) + b"N.",
    "number": lambda: claim(b"\x8b", "<i", 2**31 - 1),
    "negative number": lambda: claim(b"\x8b", "<i", -1),
    "long line": lambda: HEAD + b"I" + b"9" * 5_000_000 + b"\n.",
    "long name": lambda: HEAD + b"c" + b"a" * 5_000_000 + b"\nb\n.",
    # memo, stack and marks
    "far memo": lambda: HEAD + b"Nr\xff\xff\xff\xff.",
    "endless memo": lambda: HEAD + b"Np" + b"9" * 1000 + b"\n.",
    "missing memo": lambda: HEAD + b"h\x05.",
    "missing memo, long": lambda: HEAD + b"j\xff\xff\xff\xff.",
    "missing memo, text": lambda: HEAD + b"gx\n.",
    "empty stack": lambda: HEAD + b".",
    "no mark": lambda: HEAD + b"t.",
    "no target": lambda: HEAD + b"(u.",
    "odd items": lambda: HEAD + b"}(Nu.",
    "items of a number": lambda: HEAD + b"K\x01NNs.",
    "bad pop": lambda: HEAD + b"0.",
    "extension": lambda: HEAD + b"\x82\x01)R.",
    "outside buffer": lambda: HEAD + b"\x97.",
    "persistent": lambda: HEAD + b"K\x07Q.",
    "persistent text": lambda: HEAD + b"P../../etc/passwd\n.",
    "future protocol": lambda: b"\x80\x09N.",
    "number as a class": lambda: HEAD + b"K\x01)R.",
    # nesting
    "deep tuples": lambda: HEAD + b")" + b"\x85" * MANY + b".",
    "deep lists": lambda: HEAD + b"]" * (DEEP // 2) + b"a" * (DEEP // 2 - 1) + b".",
    "deep marks": lambda: HEAD + b"(" * DEEP + b".",
    "deep dictionaries": lambda: HEAD + b"}" + b"N}" * (DEEP // 4) + b"s" * (DEEP // 4) + b".",
    "deep wrappers": lambda: HEAD + (b"}" + text("model")) * 100_000 + b"}" + b"s" * 100_000 + b".",
    "deep states": lambda: HEAD + b"cf\nM\n)\x81" * 60_000 + b"b" * 59_999 + b".",
    "deep modules": lambda: HEAD
    + (b"cf\nM\n)\x81}" + text("_modules") + b"}" + text("a")) * 30_000
    + b"N" + b"ssb" * 30_000 + b".",
    "endless parents": lambda: HEAD + b"cf\nM\n)\x81\x94}" + text("_modules")
    + entries(a=b"h\x00") + b"sb.",
    "list in itself": lambda: HEAD + b"]\x94h\x00a.",
    "wrapper in itself": lambda: HEAD + b"}\x94" + text("model") + b"h\x00s.",
    "shared modules": lambda: shared_modules(200, entries(w=tensor())),
    "shared empty modules": lambda: shared_modules(200, b"}"),
    "keys of tuples": lambda: HEAD + b"})" + b"2\x86" * 60 + b"Ns.",
    "keys that collide": lambda: HEAD + b"}("
    + b"".join(integer((2**61 - 1) * i) + b"N" for i in range(100_000)) + b"u.",
    # numbers of things
    "many steps": lambda: HEAD + b"N0" * MOST_STEPS + b".",
    "many dictionaries": lambda: HEAD + b"(" + b"}" * MANY + b"l.",
    "many objects": lambda: HEAD + b"cf\nM\n\x94(" + b"h\x00)\x81" * (MANY // 8) + b"l.",
    "many bytes": lambda: HEAD + b"(" + b"C\x00" * (DEEP) + b"l.",
    "many names": lambda: HEAD + b"".join(b"cf%d\nM\n0" % i for i in range(MANY // 6)) + b".",
    "much text": lambda: HEAD + b"(" + text("\U0001f600" + "a" * 4000) * 20_000 + b"l.",
    "much short text": lambda: HEAD + b"(" + text("\U0001f600" + "a" * 30) * (MANY // 2) + b"l.",
    "many tensors": lambda: to_zip(
        HEAD + tensor() + b"\x940}("
        + b"".join(text(f"{i}") + b"h\x00" for i in range(100_001)) + b"u."
    ),
    "long names": lambda: to_zip(HEAD + entries(**{"n" * 2000: tensor()}) + b"."),
    "one list in many": lambda: HEAD + b"(" + b"N" * 100_000 + b"l\x85\x940("
    + b"ccollections\nOrderedDict\nh\x00R" * 20_000 + b"l.",
    "one key in many": lambda: to_zip(
        HEAD + b"(" + storage()[1:-2] + b"N" * DEEP + b"t\x940(" + b"h\x00Q" * 50_000 + b"l."
    ),
    "arguments in many": lambda: to_zip(
        HEAD + REBUILD + b"\x940(" + storage() + b"K\x00" + row((2,)) + row((1,)) + b"N" * DEEP
        + b"t\x940(" + b"h\x00h\x01R" * 50_000 + b"l."
    ),
    # storages
    "storage of 2^62": lambda: to_zip(HEAD + entries(w=tensor(source=storage(numel=HUGE))) + b"."),
    "storage too long": lambda: to_zip(HEAD + entries(w=tensor(source=storage(numel=7))) + b"."),
    "negative storage": lambda: to_zip(HEAD + entries(w=tensor(source=storage(numel=-1))) + b"."),
    "storage of a path": lambda: to_zip(
        HEAD + entries(w=tensor(source=storage(key="../../../../etc/passwd"))) + b"."
    ),
    "storage of no kind": lambda: to_zip(
        HEAD + entries(w=tensor(source=storage(kind=b"ctorch\nEvilStorage\n"))) + b"."
    ),
    "storage missing": lambda: to_zip(HEAD + entries(w=tensor(source=storage(key="9"))) + b"."),
    # tensors
    "beyond": lambda: to_zip(HEAD + entries(w=tensor(offset=1)) + b"."),
    "far beyond": lambda: to_zip(HEAD + entries(w=tensor(offset=HUGE)) + b"."),
    "negative offset": lambda: to_zip(HEAD + entries(w=tensor(offset=-1)) + b"."),
    "negative stride": lambda: to_zip(HEAD + entries(w=tensor(strides=(3, -1))) + b"."),
    "negative size": lambda: to_zip(HEAD + entries(w=tensor(shape=(-2, 3))) + b"."),
    "stride too long": lambda: to_zip(HEAD + entries(w=tensor(strides=(4, 1))) + b"."),
    "too few strides": lambda: to_zip(HEAD + entries(w=tensor(strides=(1,))) + b"."),
    "repeated without end": lambda: to_zip(HEAD + entries(w=tensor((1 << 40,), (0,))) + b"."),
    "repeated too often": lambda: to_zip(HEAD + entries(w=tensor((1 << 23,), (0,))) + b"."),
    "overflow": lambda: to_zip(HEAD + entries(w=tensor((1 << 32, 1 << 32), (0, 0))) + b"."),
    "empty overflow": lambda: to_zip(HEAD + entries(w=tensor((0, HUGE, HUGE), (1, 1, 1))) + b"."),
    "many dimensions": lambda: to_zip(HEAD + entries(w=tensor((1,) * 5000, (1,) * 5000)) + b"."),
    "size of a text": lambda: to_zip(
        HEAD + entries(w=REBUILD + b"(" + storage() + b"K\x00" + text("2") * 2 + b"\x89NtR") + b"."
    ),
    # zip
    "bomb in a storage": lambda: to_zip(
        HEAD + entries(w=tensor((1 << 23,), (1,), source=storage(numel=1 << 23))) + b".",
        zipfile.ZIP_DEFLATED, **{"0": bytes(1 << 25)},
    ),
    "bomb in the pickle": lambda: to_zip(
        claim(b"\x8d", "<Q", 65 << 20)[:-4] + bytes(65 << 20) + b".", zipfile.ZIP_DEFLATED
    ),
    "entries of the same bytes": lambda: patch(GOOD_ZIP, header=0),
    "entry beyond": lambda: patch(GOOD_ZIP, header=0xFFFFFFF0),
    "entry at 2^64": lambda: far_entry(GOOD_ZIP),
    "entry too long": lambda: patch(GOOD_ZIP, size=0x7FFFFFFF, packed=0x7FFFFFFF),
    "entry of two sizes": lambda: patch(GOOD_ZIP, size=4),
    "entry with a long name": lambda: patch(GOOD_ZIP, name_size=0xFFFF),
    "encrypted": lambda: patch(GOOD_ZIP, flags=1),
    "unknown packing": lambda: patch(GOOD_ZIP, method=99),
    "said to be packed": lambda: patch(GOOD_ZIP, method=8),
    "sizes elsewhere": lambda: patch(GOOD_ZIP, size=0xFFFFFFFF),
    "too many entries": lambda: patch(GOOD_ZIP, number=0xFFFE),
    "directory beyond": lambda: patch(GOOD_ZIP, directory=0x7FFFFFFF),
    "directory too long": lambda: patch(GOOD_ZIP, directory_size=0x7FFFFFFF),
    "2^62 entries": lambda: with_64_bits(GOOD_ZIP, number=HUGE),
    "directory of 2^62": lambda: with_64_bits(GOOD_ZIP, size=HUGE),
    "directory at 2^64": lambda: with_64_bits(GOOD_ZIP, start=2**64 - 1),
    "end beyond": lambda: with_64_bits(GOOD_ZIP, place=2**64 - 1),
    "name twice": lambda: to_zip(
        HEAD + entries(w=tensor()) + b".", **{"0": DATA, "1": DATA}
    ).replace(b"m/data/1", b"m/data/0"),
    # the legacy format
    "raw of 2^62": lambda: legacy(
        HEAD + entries(w=tensor(source=storage(numel=HUGE)[:-2] + b"NtQ")) + b".",
        HEAD + b"]" + text("0") + b"a." + struct.pack("<q", HUGE),
    ),
    "raw of -1": lambda: legacy(
        HEAD + entries(w=tensor(source=storage()[:-2] + b"NtQ")) + b".",
        HEAD + b"]" + text("0") + b"a." + struct.pack("<q", -1) + DATA,
    ),
    "raw cut": lambda: legacy(
        HEAD + entries(w=tensor(source=LEGACY_STORAGE)) + b".",
        HEAD + b"]" + text("0") + b"a." + struct.pack("<q", 6) + DATA[:-1],
    ),
    "raw of another size": lambda: legacy(
        HEAD + entries(w=tensor(source=LEGACY_STORAGE)) + b".",
        HEAD + b"]" + text("0") + b"a." + struct.pack("<q", 5) + DATA,
    ),
    "storage of two sizes": lambda: legacy(
        HEAD + b"(" + LEGACY_STORAGE + storage(numel=5)[:-2] + b"NtQl.",
        HEAD + b"]" + text("0") + b"a." + struct.pack("<q", 6) + DATA,
    ),
    "raw missing": lambda: legacy(
        HEAD + entries(w=tensor(source=storage()[:-2] + b"NtQ")) + b".", HEAD + b"]."
    ),
    "keys unknown": lambda: legacy(HEAD + b"}.", HEAD + b"]" + text("5") + b"a."),
    "view beyond": lambda: legacy(
        HEAD + entries(w=storage()[:-2] + b"(" + text("v") + integer(5) + integer(2) + b"ttQ")
        + b".", HEAD + b"].",
    ),
    "nested in nested": lambda: nest(nest(nest(HEAD + b"N."))),
    "nested in itself": lambda: HEAD + b"ctorch.storage\n_load_from_bytes\nC\x05abcde\x85\x94R"
    + b"ctorch.storage\n_load_from_bytes\nh\x00R" * 10_000 + b".",
}  # fmt: skip


REASONS = {
    "text": "more bytes than there are", "text of 4 GiB": "more bytes than there are",
    "negative text": "more bytes than there are", "bytes": "more bytes than there are",
    "byte array": "more bytes than there are", "negative number": "more bytes than there are",
    "many steps": "steps to read", "many names": "steps to read", "much text": "MiB of text",
    "many tensors": "100,000 tensors", "shared empty modules": "nested without end",
    "endless parents": "nested without end", "bomb in a storage": "10 times",
    "bomb in the pickle": "larger than any", "encrypted": "encrypted",
    "name twice": "an entry twice",
    "2^62 entries": "entries", "directory too long": "entries", "beyond": "beyond its storage",
    "storage too long": "smaller than it says", "repeated too often": "larger than its storage",
    "many dimensions": "without a shape", "arguments in many": "holds a list",
    "entry too long": "truncated", "entry at 2^64": "directory is truncated",
    "nested in nested": "_load_from_bytes", "raw cut": "truncated",
    "raw of another size": "two sizes",
    "storage of two sizes": "two sizes", "raw missing": "not in it",
    "view beyond": "beyond its storage", "raw of 2^62": "a size that no tensor has",
}  # fmt: skip
HARMLESS = {"entries of the same bytes"}  # numbers of no meaning, from the file itself


def test_lies_and_bombs_are_refused_in_time_and_in_memory(tmp_path: Path) -> None:
    """In a process of its own, which sees whatever Python reports of itself."""
    for name, make in LIES.items():
        (tmp_path / f"{name}.pt".replace("^", "")).write_bytes(make())
    torch.save(nn.Linear(2, 2), tmp_path / "0 good.pt")
    run = subprocess.run(
        [sys.executable, __file__, tmp_path], capture_output=True, text=True, check=False,
        timeout=300, cwd=Path(__file__).parents[4], env={**os.environ, "PYTHONPATH": "."},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(reports) == len(LIES) + 1
    slow = {r["name"]: r["seconds"] for r in reports if r["seconds"] > SECONDS}
    assert not slow
    assert max(r["megabytes"] for r in reports) < MEGABYTES
    # id() is reported too; by it storages that two tensors share are told.
    assert {event for r in reports for event in r["events"]} - {"builtins.id"} == {"open"}
    opened = {Path(r["name"]).stem for r in reports if r["error"] is None}
    assert opened == {"0 good", *HARMLESS}
    for report in reports:
        if report["error"] is not None:
            assert report["kind"] == "CheckpointError", report
            assert report["name"] in report["error"]
            assert report["error"].isprintable()
            reason = report["error"].partition(report["name"])[2]
            assert REASONS.get(Path(report["name"]).stem, "") in reason, report


def peak_megabytes() -> float:
    """The most memory that this process has held so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def open_all(folder: Path) -> None:
    """Open each file of a folder and print what happened, one JSON object a line."""
    watching: list[tuple[str, str]] | None = None

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if watching is not None:
            watching.append((event, str(args[0]) if event == "open" else ""))

    files = sorted(folder.glob("*.pt"))
    read_all(files[0])  # what is imported late is imported now
    sys.addaudithook(hook)
    baseline = peak_megabytes()
    for path in files:
        kind = error = None
        start, watching = time.process_time(), []
        try:
            read_all(path)
        except Exception as fault:
            kind, error = type(fault).__name__, str(fault)
        seconds, seen = time.process_time() - start, watching
        watching = None
        report = {
            "name": path.name, "kind": kind, "error": error, "seconds": seconds,
            "megabytes": peak_megabytes() - baseline,
            # A number is the handle of a file that is open already.
            "events": [
                e if e != "open" or f == str(path) or f.isdigit() else f"open {f}" for e, f in seen
            ],
        }  # fmt: skip
        print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    open_all(Path(sys.argv[1]))
