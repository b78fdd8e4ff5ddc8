"""Allowed folders: no text leads out of them, whatever links there are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from merge_core.errors import MergeScopeError
from ui.server import roots

NAMES = ("a", "b", "sub", "up", "out", "file.safetensors", "loop", "dangling")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with folders, links inside, and links to the outside."""
    place = tmp_path_factory.mktemp("roots")
    root = place / "root"
    for folder in (root / "a" / "b" / "sub", root / "b", place / "root-twin", place / "outside"):
        folder.mkdir(parents=True)
        (folder / "file.safetensors").touch()
    links = {
        root / "up": place,
        root / "a" / "out": place / "outside",
        root / "a" / "up": root / "b",  # stays inside
        root / "b" / "up": root / "..",
        root / "b" / "out": Path("/"),
        root / "loop": root / "loop",
        root / "dangling": place / "nowhere",
        root / "a" / "b" / "up": root / "a" / "out",
    }
    for link, target in links.items():
        link.symlink_to(target)
    return root


PARTS = st.one_of(
    st.sampled_from([*NAMES, "..", ".", "", "~", "root-twin", "/", "\0", "..\\..", "%2e%2e"]),
    st.text(max_size=6),
)


@given(st.lists(PARTS, max_size=8))
@example(["..", "root-twin"])
@example(["/etc"])
@example(["", "", "etc"])
@example(["a", "up"])
@example(["a" * 5000])
def test_no_text_leads_out(tree: Path, parts: list[str]) -> None:
    text = "/".join(parts)
    found: Path | None = None
    refused = ""
    try:
        found = roots.confine(text, tree)
    except MergeScopeError as error:
        refused = str(error).replace(repr(text), "")
    if found is None:
        assert str(tree.parent) not in refused
        return
    # An independent route: what the operating system says of where the text leads.
    real = os.path.realpath(os.path.join(tree, text))  # noqa: PTH118
    assert real == str(found)
    assert os.path.commonpath([real, os.path.realpath(tree)]) == os.path.realpath(tree)
    assert Path(real).is_dir()


@pytest.mark.parametrize("text", ["", ".", "a", "a/b/sub", "a/up", "./b"])
def test_what_is_inside_is_found(tree: Path, text: str) -> None:
    assert roots.confine(text, tree) == (tree / text).resolve()


@pytest.mark.parametrize(
    "text",
    ["..", "a/..", "../root-twin", "up", "a/out", "a/b/up", "b/up", "b/out/etc", "/etc", "~",
     "loop", "dangling", "file", "a/file.safetensors", "nothing", "a\0b"],
)  # fmt: skip
def test_what_is_not_is_refused(tree: Path, text: str) -> None:
    with pytest.raises(MergeScopeError, match="is not a folder below root"):
        roots.confine(text, tree)


def test_a_root_may_itself_be_a_link(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tree)
    assert roots.confine("a", tmp_path / "link") == tree / "a"


def test_the_list_holds_folders_with_weights_and_follows_no_links(tree: Path) -> None:
    found, complete = roots.folders(tree)
    assert found == ["a/b/sub", "b"]
    assert complete


def test_a_search_ends(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roots, "SECONDS", -1.0)
    assert roots.folders(tree) == ([], False)


def test_what_lies_too_deep_is_not_listed(tmp_path: Path) -> None:
    deep = tmp_path
    for level in range(roots.DEPTH + 2):
        (deep / "w.safetensors").touch()
        deep = deep / str(level)
        deep.mkdir()
    found, _ = roots.folders(tmp_path)
    assert [0 if f == "." else f.count("/") + 1 for f in found] == list(range(roots.DEPTH + 1))


def leads_out(path: str, tree: str, seen: set[str]) -> bool:
    """Whether a path, or anything that lies below it, is outside: by the system's own answers."""
    real = os.path.realpath(path)
    if os.path.commonpath([real, tree]) != tree:
        return True
    if real in seen or not os.path.isdir(real):  # noqa: PTH112
        return False
    seen.add(real)
    return any(leads_out(os.path.join(real, name), tree, seen) for name in os.listdir(real))  # noqa: PTH118, PTH208


@given(st.lists(PARTS, min_size=1, max_size=5), st.sampled_from(["a", "a/b", "b"]))
@example(["..", "..", "outside"], "a")
@example(["file.safetensors"], "b")
@example(["sub"], "a/b")
@example([".."], "b")
def test_a_document_that_names_something_outside_is_known(
    tree: Path, parts: list[str], folder: str
) -> None:
    text = "/".join(parts)
    document = {"experts": {"x": {"head": [text, 3, None]}}}
    named = roots.names_outside(document, tree / folder, tree)
    try:
        real = os.path.realpath(os.path.join(tree / folder, os.path.expanduser(text)))  # noqa: PTH111, PTH118
        outside = os.path.exists(real) and leads_out(real, str(tree), set())  # noqa: PTH110
    except ValueError:  # a NUL
        outside = False
    assert (named is not None) == outside


def test_a_set_of_weights_in_a_file_outside_is_outside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for place in (tmp_path, root):
        (place / "m.pt").write_bytes(b"x")
    document = {"base": "m.pt#ema", "experts": {"a": {"weights": f"{tmp_path}/m.pt#ema"}}}
    assert roots.names_outside(document, root, root) == f"{tmp_path}/m.pt#ema"
    assert roots.names_outside({"base": "../m.pt#ema"}, root, root) == "../m.pt#ema"
    assert roots.names_outside({"base": "m.pt#ema"}, root, root) is None


def test_roots_go_through_the_environment(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(roots.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert roots.roots() == (tmp_path,)
    for name, value in roots.environment([tree, tree / "a", tree]).items():
        monkeypatch.setenv(name, value)
    assert roots.roots() == (tree, tree / "a")
    assert roots.environment([]) == {}  # what is set stays


@pytest.mark.parametrize("name", ["nowhere", f"a{os.pathsep}b"])
def test_a_root_that_cannot_be_one_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / f"a{os.pathsep}b").mkdir()
    with pytest.raises(MergeScopeError, match="--root"):
        roots.environment([tmp_path / name])
