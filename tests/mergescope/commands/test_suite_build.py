"""``mergescope suite build``: what it writes and says, and its one-line refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from analysis.fine_tuning.plan import SHIPPED, load_plan
from merge_core.suites.suite import load_suite
from mergescope import cli, terminal
from tests.analysis.fine_tuning.tiny_plans import IMAGE_TASKS, write_image_plan


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    """``call(*arguments)`` gives the exit code of ``mergescope suite build``."""
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["mergescope", "suite", "build", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert isinstance(caught.value.code, int)
        return caught.value.code

    return run


def test_a_plan_becomes_a_suite(call: Any, tmp_path: Path, capsys: Any) -> None:
    plan = write_image_plan(tmp_path / "plan", device="cuda")
    (tmp_path / "plan/images").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "data")
    text = plan.read_text().replace("images/{task}", "{task}")
    plan.write_text(text)
    options = ["--output", tmp_path / "suite", "--data", tmp_path / "data", "--device", "cpu"]
    assert call(plan, *options) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "suite/suite.yaml")
    lines = [line for line in said.err.splitlines() if "validation accuracy" in line]
    assert [line.partition(":")[0] for line in lines] == list(IMAGE_TASKS)
    suite = load_suite(tmp_path / "suite")
    assert suite.why_not_evaluated is None
    assert str(tmp_path) not in (tmp_path / "suite/build.json").read_text()
    assert call(plan, *options) == 0  # nothing is left to do


def test_mistakes_are_told_in_a_line(call: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "plan.yaml").write_text("name: x\nbase: y\ntasks: [a]\n")
    for arguments in (
        (tmp_path / "plan.yaml", "-o", tmp_path / "out"),
        ("no-such-plan", "-o", tmp_path / "out"),
        (write_image_plan(tmp_path / "plan"), "-o", tmp_path / "out", "--device", "tpu"),
    ):
        assert call(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("mergescope: ")
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_plans_that_come_along_can_be_read(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / path.stem).mkdir()  # what was built has the plan's name
    plan = load_plan(path.stem, data=Path("/data"))
    assert plan.name == path.stem
    assert all((task.data.path or "").startswith("/data/") for task in plan.tasks.values())
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) <= 12


def test_progress_is_told_now_and_then_without_a_terminal(capsys: Any, monkeypatch: Any) -> None:
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    progress = terminal.progress_lines(30)
    for second in range(0, 100, 10):
        now[0] = float(second)
        progress.step(second, 100, "news")
    assert capsys.readouterr().err.splitlines() == [f"{s}%  news" for s in (30, 60, 90)]
