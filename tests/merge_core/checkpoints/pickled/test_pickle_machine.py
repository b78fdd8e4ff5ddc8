"""The pickle machine against Python's own pickles of plain values."""

from __future__ import annotations

import contextlib
import io
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.checkpoints.pickled.machine import Blob, Budget, Pairs, PickleFileError, read_pickle


class Inert:
    """A maker that is never asked."""

    def find(self, module: str, name: str) -> Any:
        assert (module, name) in {("__builtin__", "set"), ("__builtin__", "frozenset")}
        return name

    def make(self, maker: Any, args: Any) -> Any:
        return args[0] if args else []

    def persistent_load(self, key: Any) -> Any:
        raise AssertionError


def as_data(value: Any, data: bytes) -> Any:
    """What was read, as the Python values that went in."""
    if isinstance(value, Pairs):
        return {
            as_data(k, data): as_data(v, data) for k, v in zip(value[::2], value[1::2], strict=True)
        }
    if isinstance(value, Blob):
        return data[value.start : value.start + value.size]
    if isinstance(value, list | tuple):
        return type(value)(as_data(item, data) for item in value)
    return value


atoms = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_characters="\\\n", exclude_categories=["Cs"]))
)  # fmt: skip
values = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner) | st.tuples(inner) | st.tuples(inner, inner, inner, inner)
        | st.dictionaries(st.text(max_size=3, alphabet="abc") | st.integers(), inner)
    ),
    max_leaves=20,
)  # fmt: skip


@given(value=values, protocol=st.integers(1, 5), prefix=st.binary(max_size=5))
def test_the_machine_reads_plain_values_as_python_does(
    value: Any, protocol: int, prefix: bytes
) -> None:
    data = prefix + pickle.dumps(value, protocol) + b"rest"
    stream = io.BytesIO(data)
    stream.seek(len(prefix))
    assert as_data(read_pickle(stream, len(data), Inert(), Budget()), data) == value
    assert stream.read() == b"rest"


@pytest.mark.parametrize("protocol", range(6))
def test_the_machine_reads_every_kind_of_value(protocol: int) -> None:
    shared = [1.5, -(2**70), 2**2000]
    value = {
        "again": [shared, shared], "blob": b"\x80." * 3000, "short": b"ab", "false": False,
        "integers": [0, 255, 256, 65535, 65536, -1, -(2**31), 2**31, 10**30],
        "text": "x" * 255 + "é", "none": (None,), "pairs": {1: ()}, "three": (1, 2, 3),
    }  # fmt: skip
    if protocol < 3:
        value.pop("blob"), value.pop("short")  # Python writes them as calls
    data = pickle.dumps(value, protocol)
    assert as_data(read_pickle(io.BytesIO(data), len(data), Inert(), Budget()), data) == value


def test_the_machine_reads_sets_and_values_that_hold_themselves() -> None:
    loop: list[Any] = [{1, 2}, frozenset({3})]
    loop.append(loop)
    for protocol in (2, 4):
        data = pickle.dumps(loop, protocol)
        got = read_pickle(io.BytesIO(data), len(data), Inert(), Budget())
        assert [sorted(got[0]), got[1]] == [[1, 2], [3]]
        assert got[2] is got


def test_a_pickle_that_goes_on_after_its_place_is_refused() -> None:
    data = pickle.dumps([1, 2, 3])
    with pytest.raises(PickleFileError, match="longer than its place"):
        read_pickle(io.BytesIO(data), len(data) - 1, Inert(), Budget())


def test_lone_surrogates_of_protocol_0_are_fit_to_be_written() -> None:
    data = b"Va\\ud800b\n."
    assert pickle.loads(data) == "a\ud800b"
    assert read_pickle(io.BytesIO(data), len(data), Inert(), Budget()) == "a\\ud800b"


def test_texts_beyond_use_are_left_in_the_file() -> None:
    for data in (pickle.dumps("é" * 5000, protocol) for protocol in (1, 2, 4)):
        got = read_pickle(io.BytesIO(data), len(data), Inert(), Budget())
        assert isinstance(got, Blob)
        assert data[got.start : got.start + got.size].decode() == "é" * 5000


def test_numbers_beyond_use_are_left_in_the_file() -> None:
    data = pickle.dumps(2**20_000, 4)
    got = read_pickle(io.BytesIO(data), len(data), Inert(), Budget())
    assert isinstance(got, Blob)
    assert int.from_bytes(data[got.start : got.start + got.size], "little") == 2**20_000


INSTRUCTIONS = [
    b"(", b"0", b"1", b"2", b"]", b"}", b")", b"N", b"\x88", b"\x89", b"t", b"l", b"d",
    b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u", b"\x94", b"q\x00",
    b"q\x01", b"p1\n", b"r\x02\0\0\0", b"h\x00", b"h\x01", b"g2\n", b"j\x00\0\0\0", b"K\x07",
    b"M\x01\x02", b"J\xff\xff\xff\xff", b"I12\n", b"I01\n", b"I00\n", b"L-5L\n", b"F1.5\n",
    b"G?\xf8\0\0\0\0\0\0", b"\x8a\x00", b"\x8a\x02\x00\x80", b"\x8b\x01\0\0\0\x09", b"S'ab'\n",
    b"Vx\\u00e9\n", b"T\x01\0\0\0z", b"U\x02yz", b"X\x02\0\0\0\xc3\xa9", b"\x8c\x01q",
    b"\x8d\x01\0\0\0\0\0\0\0w", b"B\x01\0\0\0b", b"C\x02cc", b"\x8e\x01\0\0\0\0\0\0\0d",
    b"\x95\x00\0\0\0\0\0\0\0", b"\x80\x02",
]  # fmt: skip


@settings(max_examples=300)
@given(st.lists(st.sampled_from(INSTRUCTIONS), max_size=25))
def test_any_program_that_python_accepts_gives_the_same_value(program: list[bytes]) -> None:
    data = b"\x80\x04N" + b"".join(program) + b"."
    try:
        expected = pickle.loads(data, encoding="utf-8")
    except Exception:
        return
    got = as_data(read_pickle(io.BytesIO(data), len(data), Inert(), Budget()), data)
    with contextlib.suppress(RecursionError):  # a list in itself has no equal
        assert got == expected
