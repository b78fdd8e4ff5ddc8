"""``mergescope record``: one file, or none; ``app`` and other commands know what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.frames.record import load_record
from tests.evaluable import copy_evaluable
from tests.mergescope.test_cli import call


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    copy_evaluable(tmp_path / "suite")
    return tmp_path / "suite"


def test_a_record_of_weights_alone_is_written_and_opens(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "mine.mergescope"
    assert call(monkeypatch, "record", suite, "-o", path, "--weights-only") == 0
    assert "open it with: mergescope app" in capsys.readouterr().out
    record = load_record(path)
    assert record.suite.why_not_evaluated == "no accuracy was recorded"
    assert len(record.weights.summary("base"))
    assert call(monkeypatch, "inspect", path) == 2
    assert "is a record, which holds no weights" in capsys.readouterr().err


def test_a_name_that_no_record_has_is_refused_before_any_work(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert call(monkeypatch, "record", suite, "-o", tmp_path / "mine.zip") == 2
    assert "ends in .mergescope" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.frames"))
    assert call(monkeypatch, "record", suite, "-o", tmp_path / "no" / "such" / "x.txt") == 2


def test_app_refuses_a_damaged_record_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "mine.mergescope"
    path.write_bytes(b"no record")
    assert call(monkeypatch, "app", path) == 2
    assert "is not a record that can be opened" in capsys.readouterr().err
