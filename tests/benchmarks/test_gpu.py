"""The script for accelerators runs from beginning to end, and says where there is none."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from merge_core import devices
from merge_core.devices import CPU


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", *map(str, arguments)])
    gpu.main()


def test_it_runs_in_small_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "figures.json"
    run(monkeypatch, "--device", "cpu", "--quick", "--output", output)
    rows = json.loads(output.read_text())
    assert [row["what"].split(",")[0] for row in rows] == [
        "ViT-B/32", "ViT-B/32", "MiniLM", "MiniLM",
        "CART of 8 x ViT-B/32", "CART of 4096 x 11008 by 4 experts",
    ]  # fmt: skip
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in rows)
    for row in rows:
        better = row["ours"] / row["theirs"] if "inputs" in row["unit"] else None
        assert row["ratio"] == pytest.approx(better or row["theirs"] / row["ours"])
    assert "search: left out" in capsys.readouterr().out


def test_without_an_accelerator_it_says_so_and_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("benchmarks.gpu.find_devices", lambda: (CPU,))
    run(monkeypatch)
    assert capsys.readouterr().out.startswith("There is no GPU here")


def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(devices, "find_devices", lambda: (CPU,))
    with pytest.raises(SystemExit):
        run(monkeypatch, "--quick", "--device", "cuda")
    assert "no CUDA device here" in capsys.readouterr().err
