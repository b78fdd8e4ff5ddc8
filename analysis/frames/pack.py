"""Many answers in one file: a zip of JSON and Arrow, whose reader believes nothing.

``index.json`` names every question and where its answer lies; ``table_N.arrow`` holds the rows of
all answers whose frames have the same columns, one after another. One answer of the store is such
a file with one entry; a record is one with thousands, and a card.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from analysis.frames.entries import FORMAT, Asked, Kept
from analysis.frames.tables import MOST_COLUMNS, columns_of, read_table, to_frame, to_table
from analysis.frames.tables import write_table as table_bytes
from merge_core.input_files import open_regular

INDEX = "index.json"
MOST_BYTES = 64_000_000  # of the file
MOST_MEMBER_BYTES = 100_000_000  # of a part, unpacked
MOST_INDEX_BYTES = 16_000_000
MOST_INDEX_VALUES = 3_000_000
MOST_UNPACKED_BYTES = 300_000_000
MOST_PARTS = 1_000
MOST_ENTRIES = 200_000

Text = Annotated[str, Field(max_length=10_000)]


class Damaged(ValueError):  # noqa: N818 - what it is, not what went wrong
    """A file that is no pack, or that claims what none holds; the message says what."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Rows(_Strict):
    """Where the rows of a frame lie: a table, its first row, and how many."""

    table: int = Field(ge=0)
    start: int = Field(ge=0)
    rows: int = Field(ge=0)


class _Entry(_Strict):
    name: Text
    version: int
    inputs: int = Field(ge=0)
    arguments: dict[Text, Any]
    values: dict[Text, Any] = Field(default_factory=dict)
    frames: dict[Text, _Rows] = Field(default_factory=dict)


class _Index(_Strict):
    """What a pack holds.

    Attributes:
        format: :data:`analysis.frames.entries.FORMAT`.
        inputs: the digests that entries name by their place.
        tables: the types in pandas of each table's columns.
        entries: the questions, and where their answers lie.
    """

    format: str
    inputs: list[Annotated[str, Field(max_length=128)]]
    tables: list[Annotated[list[str], Field(max_length=MOST_COLUMNS)]]
    entries: list[_Entry] = Field(max_length=MOST_ENTRIES)


class _Writer:
    """Gathers the rows of equal columns in one table."""

    def __init__(self) -> None:
        self._tables: dict[tuple[str, str, tuple[tuple[str, str], ...]], list[pd.DataFrame]] = {}
        self._rows: list[int] = []
        self._inputs: dict[str, int] = {}
        self._entries: list[_Entry] = []

    def add(self, asked: Asked, kept: Kept) -> None:
        """One question and its answer."""
        entry = _Entry(
            name=asked.name,
            version=asked.version,
            inputs=self._inputs.setdefault(asked.inputs, len(self._inputs)),
            arguments=dict(asked.arguments),
            values=dict(kept.values),
            frames={name: self._place(asked, name, f) for name, f in kept.frames.items()},
        )
        self._entries.append(entry)

    def _place(self, asked: Asked, name: str, frame: pd.DataFrame) -> _Rows:
        kind = (asked.name, name, columns_of(frame))
        if kind not in self._tables:
            self._tables[kind] = []
            self._rows.append(0)
        number = list(self._tables).index(kind)
        place = _Rows(table=number, start=self._rows[number], rows=len(frame))
        self._tables[kind].append(frame)
        self._rows[number] += len(frame)
        return place

    def parts(self) -> Iterator[tuple[str, bytes]]:
        """The files of the pack, by name."""
        types = [[dtype for _, dtype in columns] for _, _, columns in self._tables]
        index = _Index(
            format=FORMAT, inputs=list(self._inputs), tables=types, entries=self._entries
        )
        yield INDEX, index.model_dump_json(exclude_defaults=True).encode()
        for number, frames in enumerate(self._tables.values()):
            joined = pa.concat_tables([to_table(frame) for frame in frames])
            yield _table_name(number), table_bytes(joined)


def pack(entries: Iterable[tuple[Asked, Kept]], files: Mapping[str, bytes] | None = None) -> bytes:
    """Answers as one file.

    Args:
        entries: questions and answers; each question once.
        files: further parts, by name.

    Raises:
        TypeError: a frame of other types (see :func:`.tables.columns_of`).
    """
    writer = _Writer()
    for asked, kept in entries:
        writer.add(asked, kept)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name, data in [*(files or {}).items(), *writer.parts()]:
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def _table_name(number: int) -> str:
    return f"table_{number}.arrow"


class Pack:
    """The answers in a file; tables are read when they are first asked for.

    Args:
        data: the file's bytes.

    Attributes:
        questions: every question that it answers, by its key.

    Raises:
        Damaged: it is no pack, or claims what none holds.
    """

    def __init__(self, data: bytes) -> None:
        self._archive = _open_archive(data)
        text = self.part(INDEX, MOST_INDEX_BYTES)
        if sum(map(text.count, (b",", b"[", b"{"))) > MOST_INDEX_VALUES:
            raise Damaged("its index holds more values than any")
        try:
            index = _Index.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise Damaged(f"its index is wrong ({first['msg']:.80})") from error
        except RecursionError as error:
            raise Damaged("its index is nested too deeply") from error
        if index.format != FORMAT:
            raise Damaged(f"it has the format {index.format!r:.40}, not {FORMAT!r}")
        self._types = index.tables
        self._tables: dict[int, pa.Table] = {}
        self.questions: dict[str, Asked] = {}
        self._entries: dict[str, _Entry] = {}
        for entry in index.entries:
            if entry.inputs >= len(index.inputs):
                raise Damaged("its index names inputs that it does not hold")
            inputs = index.inputs[entry.inputs]
            asked = Asked(entry.name, entry.version, inputs, entry.arguments)
            try:
                key = asked.key
            except (ValueError, RecursionError) as error:
                raise Damaged("its index holds values that are no numbers") from error
            self.questions[key], self._entries[key] = asked, entry

    def get(self, asked: Asked) -> Kept | None:
        """The answer to a question, None where it holds none.

        Raises:
            Damaged: its rows are not there.
        """
        entry = self._entries.get(asked.key)
        if entry is None:
            return None
        frames = {name: self._frame(rows) for name, rows in entry.frames.items()}
        return Kept(frames, entry.values)

    def part(self, name: str, most: int = MOST_MEMBER_BYTES) -> bytes:
        """The bytes of one part, unpacked.

        Raises:
            Damaged: there is none, it is damaged, or larger than `most`.
        """
        try:
            with self._archive.open(name) as stream:
                data = stream.read(most + 1)
        except (KeyError, OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
            raise Damaged(f"its part {name!r:.40} cannot be read") from e
        if len(data) > most:
            raise Damaged(f"its part {name!r:.40} is larger than {most:,} bytes")
        return data

    def _frame(self, rows: _Rows) -> pd.DataFrame:
        if rows.table not in self._tables:
            try:
                self._tables[rows.table] = read_table(self.part(_table_name(rows.table)))
            except Damaged:
                raise
            except ValueError as error:
                raise Damaged(f"a table of it is {error}") from error
        table = self._tables[rows.table]
        if rows.start + rows.rows > table.num_rows or rows.table >= len(self._types):
            raise Damaged("rows of it are missing")
        try:
            return to_frame(table.slice(rows.start, rows.rows), self._types[rows.table])
        except ValueError as error:
            raise Damaged(f"a table of it does not fit its index ({error!s:.80})") from error


def read_pack(path: Path) -> Pack:
    """The pack in a file.

    Raises:
        Damaged: it is none, or larger than any.
        OSError: it cannot be read.
    """
    with open_regular(path) as stream:
        data = stream.read(MOST_BYTES + 1)
    return Pack(data)


def _open_archive(data: bytes) -> zipfile.ZipFile:
    """The archive, whose parts together unpack to a bounded size.

    Raises:
        Damaged: it is none, or its parts are too many, too large, or packed in another way.
    """
    if len(data) > MOST_BYTES:
        raise Damaged(f"it is larger than {MOST_BYTES / 1e6:.0f} MB")
    if data.count(b"PK\1\2") > MOST_PARTS:  # before zipfile makes an object of each
        raise Damaged(f"it has more than {MOST_PARTS:,} parts")
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, LookupError, struct.error) as error:
        raise Damaged("it is no zip file") from error
    if len({info.filename for info in infos}) < len(infos):
        raise Damaged("a part of it stands there twice")
    if any(info.compress_type != zipfile.ZIP_DEFLATED or info.flag_bits & 1 for info in infos):
        raise Damaged("a part of it is packed in another way")
    sizes = [info.file_size for info in infos]
    if max(sizes, default=0) > MOST_MEMBER_BYTES or sum(sizes) > MOST_UNPACKED_BYTES:
        raise Damaged(f"it unpacks to more than {MOST_UNPACKED_BYTES / 1e6:.0f} MB")
    return archive
