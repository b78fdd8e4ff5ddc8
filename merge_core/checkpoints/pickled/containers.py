"""The files in which pickles and tensors lie: torch's zip and legacy formats, bare pickles.

Source: ``torch.serialization`` (``_save``, ``_legacy_save``, ``_legacy_load``). Storages' places
are found, their bytes are not read.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

from merge_core.checkpoints.dtypes import Dtype
from merge_core.checkpoints.pickled.machine import Blob, Budget, Pairs, PickleFileError, read_pickle
from merge_core.checkpoints.pickled.tensors import (
    Region,
    Storage,
    TensorMaker,
    count,
    storage_dtype,
)
from merge_core.checkpoints.pickled.zips import (
    DEFLATED,
    Entry,
    inflate,
    locate,
    read_directory,
    region_of,
)

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
ZIP_START = b"PK\x03\x04"
# The header of a tar file has this text here (POSIX ustar); GNU's begins so as well.
TAR_MARK, TAR_MARK_AT = b"ustar", 257
NUMBER = struct.Struct("<q")
LARGEST_PACKED_PICKLE = 1 << 26
BIG_ENDIAN = "it was written on a big-endian machine. Save it as safetensors there."


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        content: the pickled object, read as data.
        unsafe_globals: full names of the classes and functions in it that are not torch's
            own, sorted.
        unpacked: the pickle's bytes where they are compressed in the file, else None.
    """

    content: Any
    unsafe_globals: tuple[str, ...]
    unpacked: bytes | None = None


def read_contents(stream: BinaryIO, size: int) -> Contents:
    """Read the pickled object of a file as data; its tensors' bytes are not read.

    Args:
        stream: the file, opened for reading in binary.
        size: its size in bytes.

    Raises:
        PickleFileError: no file of torch's, a damaged or a hostile one.
        OSError: the file cannot be read.
    """
    head = stream.read(TAR_MARK_AT + len(TAR_MARK))
    stream.seek(0)
    if head.startswith(ZIP_START):
        return _read_zip(stream, size)
    if head[TAR_MARK_AT:] == TAR_MARK:
        raise PickleFileError(
            "it is a tar file; if torch before 0.1.11 wrote it, load it with torch and save it "
            "again, else unpack it and give the file within."
        )
    maker = _StreamMaker(stream, Budget())
    return Contents(_read_stream(stream, size, maker), tuple(sorted(maker.unsafe_globals)))


def _storage_key(key: Any) -> tuple[Dtype, str, int, Any]:
    """A storage's dtype, key, size in bytes and view, as a persistent id states them."""
    match key:
        case ("storage", kind, str() as name, _, numel) | (
            "storage",
            kind,
            str() as name,
            _,
            numel,
            _,
        ):
            dtype = storage_dtype(kind)
            part = key[5] if len(key) > 5 else None
            return dtype, name, count(numel) * dtype.itemsize, part
    raise PickleFileError.damaged("its pickle refers to something that is no storage")


class _ZipMaker(TensorMaker):
    def __init__(self, folder: str, entries: dict[str, Entry]) -> None:
        super().__init__()
        self._folder, self._entries = folder, entries
        self.regions: dict[str, Region] = {}

    def persistent_load(self, key: Any) -> Storage:
        dtype, name, size, _ = _storage_key(key)
        path = f"{self._folder}data/{name}"
        if path not in self.regions:
            if path not in self._entries:
                raise PickleFileError.damaged("a storage that it names is not in it")
            self.regions[path] = region_of(self._entries[path])
        region = self.regions[path]
        if size > region.size:
            raise PickleFileError.damaged("a storage in it is smaller than it says")
        return Storage(region, dtype, 0, size)


def _read_zip(stream: BinaryIO, file_size: int) -> Contents:
    entries = read_directory(stream, file_size)
    pickles = [name for name in entries if name in ("data.pkl", f"{name.split('/')[0]}/data.pkl")]
    if len(pickles) != 1:
        raise PickleFileError("it is a zip file that torch did not write. Give the original file.")
    folder = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{folder}byteorder")
    if order is not None and _member(stream, file_size, order, 16)[0].read(3) == b"big":
        raise PickleFileError(BIG_ENDIAN)
    maker = _ZipMaker(folder, entries)
    source, end = _member(stream, file_size, entries[pickles[0]], LARGEST_PACKED_PICKLE)
    content = read_pickle(source, end, maker, Budget())
    for path, region in maker.regions.items():
        locate(stream, file_size, entries[path], region)
    unpacked = (
        source.getvalue() if isinstance(source, io.BytesIO) and source is not stream else None
    )
    return Contents(content, tuple(sorted(maker.unsafe_globals)), unpacked)


def _member(
    stream: BinaryIO, file_size: int, entry: Entry, most_unpacked: int
) -> tuple[BinaryIO, int]:
    """A stream at the first byte of an entry, and where the entry ends in it."""
    place = Region(entry.size)
    locate(stream, file_size, entry, place)
    assert place.start is not None
    stream.seek(place.start)
    if entry.method != DEFLATED:
        return stream, place.start + entry.packed
    if max(entry.size, entry.packed) > most_unpacked:
        raise PickleFileError("its compressed pickle is larger than any model's. Save it again.")
    data = inflate(stream.read(entry.packed), entry.size)
    return io.BytesIO(data), len(data)


class _StreamMaker(TensorMaker):
    """For the legacy format, in which storages follow the pickle, and for bare pickles.

    In a bare pickle each storage is a call of ``torch.storage._load_from_bytes`` on bytes that
    hold a legacy file of their own.
    """

    def __init__(self, stream: BinaryIO, budget: Budget, bare: bool = True) -> None:
        super().__init__()
        self.budget = budget
        self._stream, self._bare = stream, bare
        self.regions: dict[str, tuple[Region, int]] = {}

    def persistent_load(self, key: Any) -> Any:
        match key:
            case ("module", kind, *_):
                return kind  # with its source text, which is of no use here
        dtype, name, size, part = _storage_key(key)
        region, _ = self.regions.setdefault(name, (Region(size), dtype.itemsize))
        if region.size != size:
            raise PickleFileError.damaged("a storage in it has two sizes")
        whole = Storage(region, dtype, 0, size)
        match part:
            case None:
                return whole
            case (_, offset, numel):
                return _part(whole, offset, numel)
        raise PickleFileError.damaged("a view in it is damaged")

    def read_nested(self, data: Any) -> Any:
        if not self._bare or not isinstance(data, Blob):
            return super().read_nested(data)
        place = self._stream.tell()
        inner = _StreamMaker(self._stream, self.budget, bare=False)
        self._stream.seek(data.start)
        storage = _read_stream(self._stream, data.start + data.size, inner)
        self._stream.seek(place)
        self.unsafe_globals |= inner.unsafe_globals
        return storage


def _part(storage: Storage, offset: Any, numel: Any) -> Storage:
    """A view of a storage: `numel` elements from element `offset` on."""
    begin, size = count(offset) * storage.dtype.itemsize, count(numel) * storage.dtype.itemsize
    if begin + size > storage.size:
        raise PickleFileError.damaged("a view in it reaches beyond its storage")
    return Storage(storage.region, storage.dtype, storage.begin + begin, size)


def _read_stream(stream: BinaryIO, end: int, maker: _StreamMaker) -> Any:
    """The object of a legacy file or of a bare pickle, whichever begins here."""
    first = read_pickle(stream, end, maker, maker.budget)
    if type(first) is not int or first != MAGIC:
        if maker.regions:
            raise PickleFileError.damaged("it is truncated")
        return first
    version = read_pickle(stream, end, maker, maker.budget)
    if type(version) is not int or version != PROTOCOL:
        raise PickleFileError(
            "it was written by a torch of unknown version. Save it as safetensors."
        )
    machine = read_pickle(stream, end, maker, maker.budget)
    if isinstance(machine, Pairs) and _value(machine, "little_endian") is False:
        raise PickleFileError(BIG_ENDIAN)
    content = read_pickle(stream, end, maker, maker.budget)
    keys = read_pickle(stream, end, maker, maker.budget)
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, str) or key not in maker.regions:
            raise PickleFileError.damaged("it lists a storage that it does not have")
        region, itemsize = maker.regions[key]
        _skip_bytes(stream, end, region, itemsize)
    if any(region.start is None for region, _ in maker.regions.values()):
        raise PickleFileError.damaged("a storage that it names is not in it")
    return content


def _value(pairs: Pairs, name: str) -> Any:
    entries = zip(pairs[::2], pairs[1::2], strict=True)
    return next((value for key, value in entries if isinstance(key, str) and key == name), None)


def _skip_bytes(stream: BinaryIO, end: int, region: Region, itemsize: int) -> None:
    """Note where raw bytes begin, after their number of elements, and go past them."""
    data = stream.read(NUMBER.size)
    if len(data) != NUMBER.size:
        raise PickleFileError.damaged("it is truncated")
    size = count(NUMBER.unpack(data)[0]) * itemsize
    start = stream.tell()
    if region.size != size:
        raise PickleFileError.damaged("a storage in it has two sizes")
    if start + size > end:
        raise PickleFileError.damaged("it is truncated")
    region.start = start
    stream.seek(start + size)
