"""Frames come back as they were; what is no frame is refused before it can grow."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from analysis.frames.tables import MOST_COLUMNS, columns_of, read_table, to_frame, to_table
from analysis.frames.tables import write_table as table_bytes

FRAME = pd.DataFrame(
    {
        "task": ["dots", "<b>bold</b>", "ς"],
        "accuracy": [0.1 + 0.2, np.nan, -np.inf],
        "single": np.array([1.5, 2.5, np.nan], np.float32),
        "count": np.array([3, -1, 2**40]),
        "small": np.array([1, 2, 3], np.int16),
        "kept": [True, False, True],
        "note": pd.Series(["a", None, ""], dtype=object),
    }
)


def there_and_back(frame: pd.DataFrame) -> pd.DataFrame:
    table = read_table(table_bytes(to_table(frame)))
    return to_frame(table, [dtype for _, dtype in columns_of(frame)])


@pytest.mark.parametrize("rows", [3, 1, 0])
def test_a_frame_comes_back_with_types_order_and_bits(rows: int) -> None:
    frame = FRAME.iloc[:rows]
    pd.testing.assert_frame_equal(there_and_back(frame), frame, check_exact=True)


def test_a_frame_that_was_read_can_be_written_to() -> None:
    frame = there_and_back(FRAME)
    frame.loc[0, "accuracy"] = 2.0
    assert frame["accuracy"][0] == 2.0


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"a": [1]}, index=[5]),
        pd.DataFrame({1: [1]}),
        pd.DataFrame({"a": pd.to_datetime(["2020-01-01"])}),
        pd.DataFrame({"a": pd.Series([1, "x"], dtype=object)}),
        pd.DataFrame({"a": pd.Series([[1]], dtype=object)}),
    ],
)
def test_what_would_not_come_back_alike_is_not_kept(frame: pd.DataFrame) -> None:
    with pytest.raises(TypeError):
        to_table(frame)


def stream(table: pa.Table, **options: object) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


ZEROS = pa.table({"a": np.zeros(1_000_000)})
HOSTILE = {
    "compressed": stream(ZEROS, compression="zstd"),
    "compressed otherwise": stream(ZEROS, compression="lz4"),
    "nested": stream(pa.table({"a": pa.array([[1], [2]])})),
    "a dictionary": stream(pa.table({"a": pa.array(["x", "y"]).dictionary_encode()})),
    "a date": stream(pa.table({"a": pa.array([1], pa.date32())})),
    "bytes": stream(pa.table({"a": pa.array([b"x"])})),
    "metadata": stream(pa.table({"a": [1]}).replace_schema_metadata({"pandas": "{}"})),
    "an extension": stream(
        pa.table(
            [pa.array([1])],
            pa.schema(
                [pa.field("a", pa.int64(), metadata={"ARROW:extension:name": "pandas.period"})]
            ),
        )
    ),
    "many columns": stream(pa.table({f"c{i}": [1] for i in range(MOST_COLUMNS + 1)})),
    "a name with a line break": stream(pa.table({"a\nb": [1]})),
    "two columns of one name": stream(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])),
    "numbers that are missing": stream(pa.table({"a": pa.array([1, None])})),
    "no table": b"PAR1 or anything",
    "nothing": b"",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_no_frame_is_written_as_is_refused(what: str) -> None:
    with pytest.raises(ValueError):
        read_table(HOSTILE[what])


def test_damage_anywhere_is_refused_or_gives_a_table_of_the_same_size() -> None:
    data = table_bytes(to_table(FRAME))
    random = np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(data)
        for place in random.integers(0, len(data), 3):
            bad[place] = int(random.integers(0, 256))
        try:
            table = read_table(bytes(bad))
        except ValueError:
            continue
        assert sum(column.nbytes for column in table.columns) <= len(data)
