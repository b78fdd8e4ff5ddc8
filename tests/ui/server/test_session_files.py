"""Folders of sessions: private, removed with the session, and after a server that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ui.server import session_files
from ui.server.session_files import Janitor

PATIENCE = 120 + session_files.SPARE_SECONDS


@pytest.fixture
def active(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The sessions that are under way."""
    sessions: set[str] = set()
    monkeypatch.setattr(session_files, "is_active", sessions.__contains__)
    return sessions


def test_a_folder_lives_as_long_as_its_session(tmp_path: Path, active: set[str]) -> None:
    janitor = Janitor(tmp_path)
    active |= {"one", "two"}
    one, two = janitor.folder_for("one"), janitor.folder_for("two")
    assert one != two
    assert one.stat().st_mode & 0o777 == 0o700
    (one / "uploads").mkdir()
    (one / "uploads" / "w").touch()
    now = 1e9
    janitor.sweep(now)
    active.remove("one")
    janitor.sweep(now + PATIENCE - 1)  # the tab may come back
    assert (one / "uploads" / "w").exists()
    active.add("one")
    janitor.sweep(now + PATIENCE + 1)
    active.remove("one")
    janitor.sweep(now + 2 * PATIENCE - 1)
    assert one.exists()
    janitor.sweep(now + 2 * PATIENCE + 2)
    assert not one.exists()
    assert two.exists()
    janitor.close()
    assert list(tmp_path.glob("server-*")) == []


def test_what_a_killed_server_leaves_is_removed_and_nothing_of_a_living_one(
    tmp_path: Path,
) -> None:
    program = (
        "import sys, time; from pathlib import Path; from ui.server.session_files import Janitor\n"
        "janitor = Janitor(Path(sys.argv[1])); folder = janitor.folder_for('x')\n"
        "(folder / 'w').touch(); print(folder, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout is not None
        folder = Path(other.stdout.readline().strip())
        first = Janitor(tmp_path)
        assert (folder / "w").exists()
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (folder / "w").exists()
    second = Janitor(tmp_path)
    assert not folder.parent.exists()
    assert first.home.exists()
    first.close()
    second.close()
