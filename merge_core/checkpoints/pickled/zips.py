"""The directory of a zip file, read with bounds on what it may claim.

Source: APPNOTE.TXT 4.3 (records), 4.4 (fields) and 4.5.3 (sizes of 64 bits). Python's
``zipfile`` reads a directory of any size into memory first; this one is bounded, and gives the
places of the entries' bytes so that they can be mapped.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from merge_core.checkpoints.pickled.machine import PickleFileError
from merge_core.checkpoints.pickled.tensors import Region

MOST_ENTRIES = 100_000
LARGEST_DIRECTORY = 1 << 25
# Trained weights shrink by a tenth; what shrinks more than this was made to fill the memory,
# except for short runs of zeros.
MOST_EXPANSION = 10
ALWAYS_EXPANDED = 1 << 24

END = struct.Struct("<4s4H2LH")
LOCATOR_64 = struct.Struct("<4sLQL")
END_64 = struct.Struct("<4sQ2H2L4Q")
ENTRY = struct.Struct("<4s6H3L5H2L")
HEADER = struct.Struct("<4s5H3L2H")
LONGEST_COMMENT = 0xFFFF
MOST_EXTRA_FIELDS = 16
LONGEST_NAME = 1 << 12
IN_64 = 0xFFFFFFFF
STORED, DEFLATED = 0, 8
DAMAGED = "its zip directory is truncated or damaged"


@dataclass(frozen=True, slots=True)
class Entry:
    """A member of the archive: where its header is, its sizes, and how it is packed."""

    header: int
    packed: int
    size: int
    method: int


def read_directory(stream: BinaryIO, file_size: int) -> dict[str, Entry]:
    """The members of a zip file by name.

    Args:
        stream: the file.
        file_size: its size in bytes.

    Raises:
        PickleFileError: no directory, a damaged one, or more entries than any model has.
    """
    try:
        number, size, start = _end_record(stream, file_size)
        if number > MOST_ENTRIES or size > LARGEST_DIRECTORY:
            raise PickleFileError(f"its zip directory has more than {MOST_ENTRIES:,} entries.")
        if start + size > file_size:
            raise PickleFileError.damaged(DAMAGED)
        stream.seek(start)
        directory = stream.read(size)
        entries: dict[str, Entry] = {}
        place = 0
        for _ in range(number):
            name, entry, place = _entry(directory, place)
            if name in entries:
                raise PickleFileError.damaged("its zip directory names an entry twice")
            entries[name] = entry
    except struct.error as error:
        raise PickleFileError.damaged(DAMAGED) from error
    return entries


def locate(stream: BinaryIO, file_size: int, entry: Entry, region: Region) -> None:
    """Fill in where an entry's bytes begin.

    Raises:
        PickleFileError: its header is not there, or it reaches beyond the file.
    """
    stream.seek(min(entry.header, file_size))
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise PickleFileError.damaged(DAMAGED)
    *_, name_size, extra_size = HEADER.unpack(header)
    region.start = entry.header + HEADER.size + name_size + extra_size
    if region.start + entry.packed > file_size:
        raise PickleFileError.damaged("it is truncated")


def region_of(entry: Entry) -> Region:
    """An entry as a place of tensors, not yet located.

    Raises:
        PickleFileError: packed in an unknown way, or one that expands more than weights do.
    """
    if entry.method == STORED and entry.size == entry.packed:
        return Region(entry.size)
    if entry.method != DEFLATED:
        raise PickleFileError.damaged("it is packed in a way that torch does not use")
    if entry.size > max(ALWAYS_EXPANDED, MOST_EXPANSION * entry.packed):
        raise PickleFileError(
            f"a storage in it is packed more than {MOST_EXPANSION} times, as no weights are. "
            "Save the model again."
        )
    return Region(entry.size, packed=entry.packed)


def inflate(packed: bytes | bytearray, size: int) -> bytearray:
    """Decompress exactly `size` bytes, never more.

    Raises:
        PickleFileError: they are not there.
    """
    try:
        data = bytearray(zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1))
    except zlib.error as error:
        raise PickleFileError.damaged("a compressed part of it is damaged") from error
    if len(data) != size:
        raise PickleFileError.damaged("a compressed part of it has another size than it says")
    return data


def _end_record(stream: BinaryIO, file_size: int) -> tuple[int, int, int]:
    """The number of entries, and the directory's size and place."""
    tail = min(file_size, END.size + LONGEST_COMMENT + LOCATOR_64.size)
    stream.seek(file_size - tail)
    data = stream.read(tail)
    at = data.rfind(b"PK\x05\x06")
    if at < 0:
        raise PickleFileError.damaged("it is truncated, or no zip file of torch's")
    _, _, _, _, number, size, start, _ = END.unpack_from(data, at)
    locator = data[max(0, at - LOCATOR_64.size) : at]
    if locator.startswith(b"PK\x06\x07"):
        stream.seek(min(LOCATOR_64.unpack(locator)[2], file_size))
        signature, *_, number, size, start = END_64.unpack(stream.read(END_64.size))
        if signature != b"PK\x06\x06":
            raise PickleFileError.damaged(DAMAGED)
    return number, size, start


def _entry(directory: bytes, place: int) -> tuple[str, Entry, int]:
    """One record of the directory, and where the next begins."""
    (
        signature, _, _, flags, method, _, _, _, packed, size,
        name_size, extra_size, comment_size, _, _, _, header,
    ) = ENTRY.unpack_from(directory, place)  # fmt: skip
    place += ENTRY.size
    after = place + name_size + extra_size + comment_size
    if signature != b"PK\x01\x02" or after > len(directory):
        raise PickleFileError.damaged(DAMAGED)
    if name_size > LONGEST_NAME:
        raise PickleFileError.damaged("its zip directory has a name that no file has")
    if flags & 1:
        raise PickleFileError("it is encrypted. Save it without a password.")
    name = directory[place : place + name_size].decode("utf-8", "replace")
    extra = directory[place + name_size : place + name_size + extra_size]
    if IN_64 in (size, packed, header):
        size, packed, header = _fill_64_bit_fields(extra, size, packed, header)
    return name, Entry(header, packed, size, method), after


def _fill_64_bit_fields(extra: bytes, *fields: int) -> list[int]:
    """Replace the fields that say "see the extra field" by its values, in their order."""
    place = 0
    for _ in range(MOST_EXTRA_FIELDS):
        kind, length = struct.unpack_from("<2H", extra, place)
        place += 4
        body, place = extra[place : place + length], place + length
        if kind == 1:
            values = iter(struct.unpack_from(f"<{len(body) // 8}Q", body))
            try:
                return [next(values) if field == IN_64 else field for field in fields]
            except StopIteration:
                break
    raise PickleFileError.damaged(DAMAGED)
