"""The suites on offer: named once each, the bundled one first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from merge_core.errors import SuiteError
from merge_core.suite import BUNDLED, BUNDLED_PATH
from ui.suites import VARIABLE, environment_for, offered


def test_only_the_bundled_one_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert offered() == {BUNDLED: BUNDLED_PATH}
    monkeypatch.setenv(VARIABLE, "")
    assert offered() == {BUNDLED: BUNDLED_PATH}


def test_round_trip_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMETHING", "else")
    paths = [
        Path("/a/clip/suite.yaml"),
        Path("/b/clip/suite.yaml"),  # the same folder name
        Path("/c/other.yaml"),
        Path("/d/with space, ü and 50%/suite.yaml"),
        Path("/e/demo/suite.yaml"),  # the bundled one's name
        Path("/f/clip.yaml"),
    ]
    environment = environment_for(paths)
    assert environment["SOMETHING"] == "else"
    assert environment["PATH"] == os.environ["PATH"]
    monkeypatch.setenv(VARIABLE, environment[VARIABLE])
    names = offered()
    assert list(names.values()) == [BUNDLED_PATH, *paths]
    assert list(names) == [
        "demo",
        "clip",
        "clip-2",
        "other",
        "with space, ü and 50%",
        "demo-2",
        "clip-3",
    ]


def test_a_path_that_cannot_be_carried_is_refused() -> None:
    with pytest.raises(SuiteError, match=rf"a{os.pathsep}b/suite.yaml: .*Rename or move"):
        environment_for([Path(f"/a{os.pathsep}b/suite.yaml")])
