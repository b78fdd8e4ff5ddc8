"""Hostile files and links on a page: one sentence, no traceback."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import streamlit as st

from tests.evaluable import write_evaluable
from tests.pages.test_pages import open_page
from tests.reliability.test_fuzzed_checkpoints import HOSTILE as FILES
from tests.reliability.test_fuzzed_yaml import HOSTILE as TEXTS
from ui.sections.own_recipes import MOST_RECIPES
from ui.server import session_files
from ui.server.catalog import SUITES


@pytest.fixture(autouse=True)
def empty_caches() -> Iterator[None]:
    """No test sees what another one left in the server's caches."""
    yield
    st.cache_data.clear()
    st.cache_resource.clear()


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a suite named ``mine`` that the dashboard offers."""
    path = write_evaluable(tmp_path / "mine")
    monkeypatch.setenv("MERGESCOPE_SUITES", str(path))
    return path.parent


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def expert(kind: str) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / "experts" / "shapes.safetensors").write_bytes(FILES[kind]()) and None
    )


def text(kind: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "suite.yaml").write_text(TEXTS[kind]) and None


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a million tensors": (expert("a million empty tensors"), "shapes.safetensors"),
    "2^62": (expert("a size of 2^62"), "shapes.safetensors"),
    "laughs": (text("laughs in arguments"), "suite.yaml"),
    "code": (text("code"), "suite.yaml"),
    "pipe": (lambda folder: pipe(folder / "suite.yaml"), "suite.yaml"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_hostile_files_are_refused_in_words(offered: Path, kind: str) -> None:
    damage, named = DAMAGES[kind]
    damage(offered)
    at = open_page("spectra", suite="mine")
    assert not at.exception
    (message,) = [error.value for error in at.error]
    assert named in message
    assert "Traceback" not in message
    assert "failed unexpectedly" not in message


@pytest.mark.parametrize("value", ["{}/suite.yaml", "../../secret"])
def test_no_link_opens_a_file_by_its_path(tmp_path: Path, value: str) -> None:
    """A link names what is on offer; anything else is as if it were not there."""
    path = write_evaluable(tmp_path / "secret").parent
    at = open_page("spectra", suite=value.format(path))
    assert not at.exception
    kinds = ("error", "markdown", "info", "code")
    shown = " ".join(str(element.value) for kind in kinds for element in at.get(kind))
    assert "secret" not in shown
    chosen = at.selectbox(key="suite")
    assert chosen.value in SUITES.list_offered()
    assert "secret" not in " ".join(chosen.options)


LOOPED = {
    "nobody": lambda _: "~nobody-of-that-name/cache",
    "circle": lambda folder: str(circle(folder)),
    "nul": lambda _: "a" * 5000,
    "file": lambda folder: str(touch(folder / "file")),
}


def circle(folder: Path) -> Path:
    (folder / "one").symlink_to("two")
    (folder / "two").symlink_to("one")
    return folder / "one" / "cache"


def touch(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize("kind", LOOPED)
@pytest.mark.parametrize("variable", ["MERGESCOPE_CACHE", "XDG_CACHE_HOME"])
@pytest.mark.parametrize("page", ["overview", "open_checkpoints", "patterns"])
def test_a_cache_folder_that_is_none_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, variable: str, page: str
) -> None:
    """Or it is done without; no page shows Streamlit's own box of an exception."""
    monkeypatch.delenv("MERGESCOPE_CACHE", raising=False)
    monkeypatch.setenv(variable, LOOPED[kind](tmp_path))
    session_files.janitor.cache_clear()
    at = open_page(page)
    assert not at.exception
    for error in at.error:
        assert "failed unexpectedly" not in error.value
    session_files.janitor.cache_clear()


def test_paths_of_the_server_are_short_on_pages(offered: Path) -> None:
    (offered / "experts" / "shapes.safetensors").unlink()
    at = open_page("spectra", suite="mine")
    (message,) = [error.value for error in at.error]
    assert "mine/experts/shapes.safetensors" in message
    assert str(offered.parent) not in message


def test_ten_thousand_recipes_in_a_link_are_not_all_shown(offered: Path) -> None:
    own = "\n".join(f"method=cart&rank={i}" for i in range(1, 15_001))
    at = open_page("compare", suite="mine", own=own)
    assert not at.exception
    assert len([b for b in at.button if b.label == "Remove"]) <= MOST_RECIPES + 1
    assert any("15,000 recipes are more" in warning.value for warning in at.warning)
