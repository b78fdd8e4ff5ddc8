"""Frames as Arrow tables of a few plain types, and back with the same types and order.

Arrow's own files hold what they hold in so many bytes: unlike Parquet, nothing unfolds when it is
read. Only the types below are read; extension types and nested columns are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pandas as pd
import pyarrow as pa

MOST_COLUMNS = 64
NAME_CHARACTERS = 100
# What a column may be in pandas, by its name there; the two of texts are Arrow's strings.
TEXTS = ("str", "object")
NUMBERS: dict[str, pa.DataType] = {
    "bool": pa.bool_(),
    **{name: getattr(pa, name)() for name in ("int8", "int16", "int32", "int64", "uint8")},
    **{name: getattr(pa, name)() for name in ("float32", "float64")},
}
DAMAGED = (
    *(pa.ArrowException, struct.error, StopIteration),
    *(ValueError, TypeError, LookupError, OSError),
)


def columns_of(frame: pd.DataFrame) -> tuple[tuple[str, str], ...]:
    """Name and type of each column.

    Raises:
        TypeError: a name that is no text, another type, or rows that are not numbered from 0.

    Example:
        >>> columns_of(pd.DataFrame({"task": ["dots"], "accuracy": [0.5]}))
        (('task', 'str'), ('accuracy', 'float64'))
    """
    if not frame.index.equals(pd.RangeIndex(len(frame))):
        raise TypeError("The rows of a frame that is kept are numbered from 0.")
    found = tuple((name, str(frame[name].dtype)) for name in frame.columns)
    for name, dtype in found:
        if not isinstance(name, str) or dtype not in (*NUMBERS, *TEXTS):
            raise TypeError(f"Column {name!r} of type {dtype} cannot be kept.")
    return found


def to_table(frame: pd.DataFrame) -> pa.Table:
    """A frame as a table; missing texts are null, missing numbers NaN.

    Raises:
        TypeError: as :func:`columns_of`, or a column of several types.
    """
    columns, names = [], []
    for name, dtype in columns_of(frame):
        names.append(name)
        if dtype in NUMBERS:
            columns.append(pa.array(frame[name].to_numpy(), NUMBERS[dtype], from_pandas=False))
            continue
        values = [None if pd.isna(value) else value for value in frame[name]]
        if not all(value is None or isinstance(value, str) for value in values):
            raise TypeError(f"Column {name!r} holds other things than texts.")
        columns.append(pa.array(values, pa.string()))
    return pa.table(columns, names=names)


def to_frame(table: pa.Table, types: Sequence[str]) -> pd.DataFrame:
    """A table as the frame that it was made of.

    Args:
        table: checked by :func:`read_table`.
        types: the columns' types in pandas.

    Raises:
        ValueError: these are not the columns' types.
    """
    if len(types) != table.num_columns:
        raise ValueError("The types of other columns.")
    columns = {}
    for field, column, dtype in zip(table.schema, table.columns, types, strict=True):
        if field.type != NUMBERS.get(dtype, pa.string()) or dtype not in (*NUMBERS, *TEXTS):
            raise ValueError(f"Column {field.name!r} is no {dtype!r:.20}.")
        values = column.to_numpy() if dtype in NUMBERS else column.to_pylist()
        columns[field.name] = pd.Series(values, dtype=dtype, copy=True)
    return pd.DataFrame(columns, index=pd.RangeIndex(table.num_rows))


def write_table(table: pa.Table) -> bytes:
    """A table as the bytes of an Arrow stream: its schema and one batch of rows."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        for batch in table.combine_chunks().to_batches() or [_no_rows(table.schema)]:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _no_rows(schema: pa.Schema) -> pa.RecordBatch:
    return pa.record_batch([pa.array([], column.type) for column in schema], schema=schema)


def read_table(data: bytes) -> pa.Table:
    """The table in an Arrow stream, none of whose bytes is believed.

    Raises:
        ValueError: it is none, or holds other things than columns of plain types.
    """
    try:
        messages = pa.ipc.MessageReader.open_stream(pa.BufferReader(data))
        schema = pa.ipc.read_schema(messages.read_next_message())
        _check_schema(schema)
        message = messages.read_next_message()
        if message.type != "record batch" or _is_compressed(message.metadata.to_pybytes()):
            raise ValueError("a batch that no frame is written as")
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
        table = pa.Table.from_batches([batch], schema)
    except DAMAGED as error:
        raise ValueError(f"no Arrow table ({error!s:.100})") from error
    if sum(column.nbytes for column in table.columns) > len(data):
        raise ValueError("a table that is larger than its bytes")
    if any(column.null_count for column in table.columns if not pa.types.is_string(column.type)):
        raise ValueError("numbers that are missing")
    return table


def _check_schema(schema: pa.Schema) -> None:
    """Refuse what no frame is written as."""
    if schema.metadata or len(schema) > MOST_COLUMNS or len(set(schema.names)) < len(schema):
        raise ValueError("columns that no frame has")
    for column in schema:
        if column.metadata or column.type not in (pa.string(), *NUMBERS.values()):
            raise ValueError(f"a column of type {column.type!s:.40}")
        if not column.name.isprintable() or len(column.name) > NAME_CHARACTERS:
            raise ValueError("a column's name that no frame has")


def _is_compressed(metadata: bytes) -> bool:
    """Whether the header of a batch says that its buffers unfold when they are read.

    pyarrow would unfold them, however large they become, and does not tell before. The header is
    a flatbuffer: a ``Message`` whose field 2 is a ``RecordBatch``, whose field 3 is the
    compression.

    Raises:
        struct.error: it is none.

    Source: https://github.com/apache/arrow/blob/main/format/Message.fbs.
    """

    def place(table: int, number: int) -> int | None:
        (back,) = struct.unpack_from("<i", metadata, table)
        (size,) = struct.unpack_from("<H", metadata, table - back)
        at = 4 + 2 * number
        (offset,) = struct.unpack_from("<H", metadata, table - back + at) if at < size else (0,)
        return table + offset if offset else None

    def follow(at: int) -> int:
        (offset,) = struct.unpack_from("<I", metadata, at)
        return at + int(offset)

    header = place(follow(0), 2)
    return header is None or place(follow(header), 3) is not None
