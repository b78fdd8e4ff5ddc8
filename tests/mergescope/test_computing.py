"""Every command that computes takes the one option, and computes where it says."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from merge_core import devices
from merge_core.devices import CPU, VARIABLE, Device, current_device
from mergescope import cli
from mergescope.computing import computing
from tests.evaluable import copy_evaluable
from tests.fake_accelerator import Fake, fake

COMPUTING = [
    ["app"], ["inspect"], ["merge"], ["evaluate"], ["select-rank"], ["compare"], ["decompose"],
    ["card"], ["prepare"], ["record"], ["pool", "build"], ["suite", "build"],
]  # fmt: skip


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mergescope", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("command", COMPUTING, ids=" ".join)
def test_every_command_that_computes_takes_a_device(command: list[str]) -> None:
    told = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": "200"})
    assert "--device" in told.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect"], ["evaluate"], ["select-rank"], ["compare"], ["decompose"], ["prepare"],
        ["merge", "-o", "out"], ["record", "-o", "out.mergescope"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_a_device_that_is_not_there_is_refused_before_anything_is_done(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(devices, "find_devices", lambda: (CPU,))
    monkeypatch.chdir(tmp_path)
    command, *rest = arguments
    for name, words in (("cuda", "no CUDA device here"), ("cdua", "is no device")):
        assert call(monkeypatch, command, "nowhere", *rest, "--device", name) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line
        monkeypatch.setenv(VARIABLE, name)
        assert call(monkeypatch, command, "nowhere", *rest) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"${VARIABLE}" in line or words in line
        monkeypatch.delenv(VARIABLE)
    assert list(tmp_path.iterdir()) == []


def test_the_option_counts_more_than_the_environment_and_ends_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "find_devices", lambda: (Device("cuda:0", "First"), CPU))
    seen: list[tuple[str, str | None, Any]] = []

    def look(name: str, device: str | None = None) -> None:
        """A command that is told the device."""
        seen.append((current_device().name, os.environ.get(VARIABLE), device))

    app = typer.Typer()
    app.command()(computing(look))
    monkeypatch.setenv(VARIABLE, "cpu")
    for given in ([], ["--device", "auto"], ["--device", "cuda"]):
        assert CliRunner().invoke(app, ["x", *given]).exit_code == 0
    assert seen == [
        ("cpu", "cpu", None),
        ("cuda:0", "cuda:0", "auto"),
        ("cuda:0", "cuda:0", "cuda"),
    ]
    assert os.environ[VARIABLE] == "cpu"


def test_evaluate_runs_on_the_device_and_says_what_bfloat16_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    copy_evaluable(tmp_path / "suite")
    there: Fake = fake()
    monkeypatch.setattr(devices, "find_devices", lambda: (there, CPU))
    tables = []
    for name in ("cpu", "auto"):
        monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / name))
        assert call(monkeypatch, "evaluate", tmp_path / "suite", "--device", name) == 0
        tables.append(capsys.readouterr().out)
        assert bool(there.sent) == (name == "auto")
    assert tables[0] == tables[1]
    assert "bfloat16" not in tables[0]
    options = ["--device", "cpu", "--precision", "bfloat16"]
    assert call(monkeypatch, "evaluate", tmp_path / "suite", *options) == 0
    assert "bfloat16 changes " in capsys.readouterr().out
    assert call(monkeypatch, "evaluate", tmp_path / "suite", "--precision", "half") == 2
    assert "--precision must be float32 or bfloat16" in capsys.readouterr().err
