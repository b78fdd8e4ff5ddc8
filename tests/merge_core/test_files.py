"""Writes that are whole or absent, and digests that follow content."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from merge_core.errors import OutputError
from merge_core.files import (
    cache_dir,
    digest_of,
    file_digest,
    write_atomically,
    write_folder_atomically,
)

# https://github.com/BLAKE3-team/BLAKE3/blob/master/test_vectors/test_vectors.json, and of "abc".
PUBLISHED = {
    b"": "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    b"abc": "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85",
}


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for name, value, expected in [
        ("MERGESCOPE_CACHE", "/x/y", "/x/y"),
        ("MERGESCOPE_CACHE", "~/z", "/home/someone/z"),
        ("XDG_CACHE_HOME", "/xdg", "/xdg/mergescope"),
        ("XDG_CACHE_HOME", "", "/home/someone/.cache/mergescope"),
    ]:
        monkeypatch.delenv("MERGESCOPE_CACHE", raising=False)
        monkeypatch.setenv(name, value)
        assert cache_dir() == Path(expected)


@given(st.lists(st.text(max_size=4), max_size=4), st.lists(st.text(max_size=4), max_size=4))
def test_digests_of_parts_are_equal_only_for_equal_parts(a: list[str], b: list[str]) -> None:
    assert (digest_of(*a) == digest_of(*b)) == (a == b)


def test_digests_tell_where_parts_end() -> None:
    parts = [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("", "abc")]
    assert len({digest_of(*p) for p in parts}) == len(parts)
    assert digest_of("a") == digest_of(b"a")


def test_a_file_digest_is_the_blake3_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for data in (b"", b"abc", os.urandom((1 << 22) + 17)):
        path.write_bytes(data)
        expected = PUBLISHED.get(data) or blake3(data).hexdigest()
        assert file_digest(path) == expected
        assert file_digest(path) == expected


def test_a_known_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    first, original = file_digest(path), Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        assert self != path, "read again"
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    assert file_digest(path) == first


def test_a_file_digest_follows_every_kind_of_change(tmp_path: Path) -> None:
    path = tmp_path / "f"

    def check(data: bytes) -> None:
        assert file_digest(path) == blake3(data).hexdigest()

    path.write_bytes(b"aaaa")
    check(b"aaaa")
    path.write_bytes(b"bbbb")  # same size, at once
    check(b"bbbb")
    times = path.stat()
    path.write_bytes(b"cccc")  # same size, the old date put back
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    check(b"cccc")
    other = tmp_path / "g"
    other.write_bytes(b"dddd")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(path)  # another file under the name
    check(b"dddd")


@pytest.mark.parametrize("junk", [b"", b"\xff\xfe" * 32, b"short", b"z" * 64, b"a" * 63])
def test_a_damaged_memo_is_ignored_and_repaired(
    tmp_path: Path, fresh_cache: Path, junk: bytes
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    expected = file_digest(path)
    (memo,) = (fresh_cache / "digests").iterdir()
    memo.write_bytes(junk)
    assert file_digest(path) == expected
    assert memo.read_text() == expected


def test_a_missing_cache_folder_only_costs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "f").write_bytes(b"abc")
    assert file_digest(tmp_path / "f") == PUBLISHED[b"abc"]


def test_a_missing_file_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        file_digest(tmp_path / "absent")


def test_writing_replaces_the_whole_file_and_makes_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "f"
    for data in (b"a long first version", b"short", b""):
        write_atomically(path, data)
        assert path.read_bytes() == data
        assert names(path.parent) == ["f"]


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EACCES, "permission"),
     (errno.EROFS, "permission"), (errno.EIO, "could not be written")],
)  # fmt: skip
@pytest.mark.parametrize("step", ["replace", "mkstemp", "fdopen"])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str, step: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    folder = tmp_path / "out"
    write_atomically(folder / "f", b"old")
    target = {"replace": Path, "mkstemp": __import__("tempfile"), "fdopen": os}[step]
    monkeypatch.setattr(target, step, fail)
    with pytest.raises(OutputError, match=words) as caught:
        write_atomically(folder / "f", b"new")
    monkeypatch.undo()
    assert str(folder / "f") in str(caught.value)
    assert (folder / "f").read_bytes() == b"old"
    assert names(folder) == ["f"]


def test_a_folder_appears_whole_with_ordinary_permissions(tmp_path: Path) -> None:
    output = tmp_path / "parent" / "out"
    with write_folder_atomically(output) as staging:
        (staging / "f").write_text("x")
        assert not output.exists()
    assert (output / "f").read_text() == "x"
    assert names(output.parent) == ["out"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert stat.S_IMODE(output.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_an_empty_folder_may_be_taken(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with write_folder_atomically(output) as staging:
        (staging / "f").write_text("x")
    assert names(output) == ["f"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.EIO, "x")])
def test_a_failed_block_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    expected = OutputError if isinstance(error, OSError) else type(error)

    def fail() -> None:
        with write_folder_atomically(tmp_path / "in" / "out") as staging:
            (staging / "half").write_text("x")
            raise error

    with pytest.raises(expected):
        fail()
    assert names(tmp_path / "in") == []


def test_what_exists_is_never_overwritten(tmp_path: Path) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "precious").write_text("p")
    file.write_text("p")

    def write(output: Path) -> None:
        with write_folder_atomically(output):
            pytest.fail("the work was started")

    with pytest.raises(OutputError, match="not empty"):
        write(full)
    with pytest.raises(OutputError, match="is a file"):
        write(file)
    assert (full / "precious").read_text() == file.read_text() == "p"
    with pytest.raises(OutputError, match="could not be written"):
        write(file / "out")


def test_a_folder_that_fills_up_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "out"

    def write() -> None:
        with write_folder_atomically(output) as staging:
            (staging / "mine").write_text("x")
            output.mkdir()
            (output / "theirs").write_text("y")

    with pytest.raises(OutputError):
        write()
    assert names(tmp_path) == ["out"]
    assert names(output) == ["theirs"]
