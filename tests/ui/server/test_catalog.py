"""What is on offer: named once each, the bundled ones first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from merge_core.errors import MergeScopeError
from merge_core.suites.bundled import bundled_records, bundled_suites
from merge_core.suites.pool import bundled_pools
from ui.server.catalog import POOLS, SUITES


def test_only_the_bundled_ones_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        for catalog in (SUITES, POOLS):
            if value is None:
                monkeypatch.delenv(catalog.variable, raising=False)
            else:
                monkeypatch.setenv(catalog.variable, value)
        assert SUITES.list_offered() == bundled_suites() | bundled_records()
        assert POOLS.list_offered() == bundled_pools()


def test_round_trip_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [
        Path("/a/clip/suite.yaml"),
        Path("/b/clip/suite.yaml"),  # the same folder name
        Path("/c/other.yaml"),
        Path("/d/with space, ü and 50%/suite.yaml"),
        Path("/e/demo/suite.yaml"),  # the bundled one's name
        Path("/f/clip.yaml"),
    ]
    environment = SUITES.environment(paths)
    assert list(environment) == [SUITES.variable]
    monkeypatch.setenv(SUITES.variable, environment[SUITES.variable])
    names = SUITES.list_offered()
    bundled = bundled_suites() | bundled_records()
    assert list(names.values()) == [*bundled.values(), *paths]
    assert list(names) == [
        *bundled,
        "clip",
        "clip-2",
        "other",
        "with space, ü and 50%",
        "demo-2",
        "clip-3",
    ]


def test_suites_and_pools_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in POOLS.environment([Path("/p/mine/pool.yaml")]).items():
        monkeypatch.setenv(name, value)
    assert POOLS.list_offered()["mine"] == Path("/p/mine/pool.yaml")
    assert "mine" not in SUITES.list_offered()


def test_a_path_that_cannot_be_carried_is_refused() -> None:
    with pytest.raises(MergeScopeError, match=rf"a{os.pathsep}b/suite.yaml: .*Rename or move"):
        SUITES.environment([Path(f"/a{os.pathsep}b/suite.yaml")])
