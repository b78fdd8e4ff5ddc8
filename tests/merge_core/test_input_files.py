"""Strangers' files: where links lead, what is no file at all, and what state a file is in."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from merge_core.errors import MergeScopeError
from merge_core.files import path_below
from merge_core.input_files import (
    belongs_beside,
    check_regular,
    file_stamp,
    find_outside,
    open_regular,
    read_bounded,
    stays_inside,
)


def put(path: Path, content: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def link(path: Path, target: Path | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A snapshot as huggingface_hub lays it out, and a second repository beside it."""
    cache = tmp_path / "hub"
    for repo in ("models--org--mine", "models--org--other"):
        for blob in ("weights", "vocab"):
            put(cache / repo / "blobs" / blob)
    snapshot = cache / "models--org--mine" / "snapshots" / "0123abcd"
    link(snapshot / "model.safetensors", "../../blobs/weights")
    link(snapshot / "vocab.txt", "../../blobs/vocab")
    link(snapshot / "sub" / "vocab.txt", "../../../blobs/vocab")
    link(snapshot / "foreign.txt", "../../../models--org--other/blobs/vocab")
    link(snapshot / "secret.txt", put(tmp_path / "secret.txt"))
    return snapshot


@pytest.mark.parametrize(
    ("name", "inside"),
    [("model.safetensors", True), ("vocab.txt", True), ("sub/vocab.txt", True),
     ("foreign.txt", False), ("secret.txt", False)],
)  # fmt: skip
def test_a_snapshot_of_the_hub_reaches_its_own_blobs_and_nothing_else(
    hub: Path, name: str, inside: bool
) -> None:
    assert stays_inside(hub / name, hub) == inside
    assert belongs_beside(hub / name, hub / "model.safetensors") == inside
    assert stays_inside(hub / name, hub.parents[2]) == (name != "secret.txt")


def test_a_folder_that_only_calls_itself_a_snapshot_has_no_blobs_elsewhere(tmp_path: Path) -> None:
    secret = put(tmp_path / "keys" / "id_rsa")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    weights = put(snapshot / "model.safetensors")
    link(tmp_path / "models--a--b" / "blobs", secret.parent)
    vocab = link(snapshot / "vocab.txt", "../../blobs/id_rsa")
    assert not stays_inside(vocab, snapshot)
    assert not belongs_beside(vocab, weights)


def test_side_files_are_of_the_same_model(tmp_path: Path) -> None:
    """In the folder, beside what the weights link to, or in git-annex's or DVC's store."""
    model = tmp_path / "repo" / "models" / "mine"
    weights = put(model / "model.safetensors")
    annex = put(tmp_path / "repo" / ".git" / "annex" / "objects" / "a" / "key")
    dvc = put(tmp_path / "repo" / ".dvc" / "cache" / "ab" / "cd")
    assert belongs_beside(put(model / "config.json"), weights)
    assert belongs_beside(link(model / "merges.txt", "config.json"), weights)
    assert belongs_beside(link(model / "vocab.txt", annex), weights)
    assert belongs_beside(link(model / "vocab.json", dvc), weights)
    farm = link(tmp_path / "farm" / "model.safetensors", weights)
    assert belongs_beside(link(farm.parent / "config.json", model / "config.json"), farm)
    secret = put(tmp_path / "secret")
    for name, target in [
        ("a", secret), ("b", "../../../secret"), ("c", link(tmp_path / "hop", secret)),
        ("d", "d"), ("e", tmp_path / "repo" / ".git" / "config"),
    ]:  # fmt: skip
        assert not belongs_beside(link(model / name, target), weights)
    folder = link(model / "additional_chat_templates", put(tmp_path / "keys" / "a.jinja").parent)
    assert not belongs_beside(folder / "a.jinja", weights)
    assert belongs_beside(put(model / "sub" / "config.json"), weights)


def test_a_tree_is_looked_through_also_through_its_own_links(tmp_path: Path) -> None:
    root, secret = tmp_path / "root", put(tmp_path / "secret" / "file")
    put(root / "a" / "b" / "file")
    link(root / "a" / "up", root)  # a circle
    link(root / "a" / "file", "b/file")
    assert find_outside(root / "a", root) is None
    bad = link(root / "c" / "d" / "weights", secret)
    assert find_outside(root / "a", root) == root / "a" / "up" / "c" / "d" / bad.name
    assert find_outside(root / "a" / "b", root) is None
    assert find_outside(link(root / "out", secret.parent), root) == root / "out"


def test_no_way_leads_out_and_back(tmp_path: Path) -> None:
    """What lies beside a link on the way may be read as a model's description or shards."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    weights = put(root / "b" / "model.safetensors")
    way = link(root / "a.safetensors", link(outside / "model.safetensors", weights))
    assert way.resolve() == weights
    assert not stays_inside(way, root)
    assert stays_inside(link(root / "c", link(root / "d", weights)), root)
    assert stays_inside(root / "b" / ".." / "b", root)


def test_a_tree_beyond_counting_is_not_taken_for_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        put(tmp_path / "many" / str(number))
    monkeypatch.setattr("merge_core.input_files.MOST_ENTRIES", 2)
    assert find_outside(tmp_path / "many", tmp_path) == tmp_path / "many"


def pipe(path: Path) -> None:
    os.mkfifo(path)


def bind(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": pipe,
    "socket": bind,
    "folder": Path.mkdir,
    "zeros": lambda path: path.symlink_to("/dev/zero"),
    "link to a pipe": lambda path: (pipe(path.with_name("p")), path.symlink_to("p")),
    "circle": lambda path: path.symlink_to(path.name),
    "nothing": lambda _: None,
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_opened(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = Path("odd")
    KINDS[kind](path)
    for read in (check_regular, open_regular, lambda p: read_bounded(p, 10)):
        with pytest.raises(OSError, match=r"."):
            read(path)


def test_a_file_that_turns_into_a_pipe_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(tmp_path / "pipe")
    monkeypatch.setattr("merge_core.input_files.check_regular", lambda _: None)
    with pytest.raises(OSError, match="no regular file"):
        open_regular(tmp_path / "pipe")


def test_bounded_reading(tmp_path: Path) -> None:
    path = put(tmp_path / "file", "12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(ValueError, match="longer than 4"):
        read_bounded(path, 4)


@pytest.mark.parametrize("text", ["~nobody-of-that-name/x", "a\0b", "a" * 5000, "\udcff\0"])
def test_what_is_no_path_is_said(text: str, tmp_path: Path) -> None:
    with pytest.raises(MergeScopeError, match="is not a path"):
        path_below(tmp_path, text, MergeScopeError)


def test_a_circle_of_links_is_said(tmp_path: Path) -> None:
    link(tmp_path / "a", "b")
    link(tmp_path / "b", "a")
    with pytest.raises(MergeScopeError, match="is not a path"):
        path_below(tmp_path, "a/model", MergeScopeError)


def test_a_change_in_place_with_its_time_restored_is_seen(tmp_path: Path) -> None:
    path = put(tmp_path / "file", "before")
    before = file_stamp(path)
    state = path.stat()
    with path.open("r+") as stream:  # same inode, size and time of modification
        stream.write("after!")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    after = path.stat()
    same = ("st_size", "st_mtime_ns", "st_ino")
    assert [getattr(state, each) for each in same] == [getattr(after, each) for each in same]
    assert file_stamp(path) != before
    assert stat.S_ISREG(after.st_mode)
    assert file_stamp(tmp_path / "absent") is None
