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
    assert chosen.value in chosen.options
    assert "secret" not in " ".join(chosen.options)
