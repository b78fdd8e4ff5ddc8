"""``mergescope suite init``: what it finds, says and writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merge_core.suites.suite import load_suite
from tests.conftest import random_states
from tests.hub_client import files_of, hub, weights
from tests.hub_server import Hub
from tests.mergescope.test_cli import call

__all__ = ["hub"]
TASKS = ("cars", "dtd")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command runs: two experts, a base, and a head."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "models"
    place.mkdir()
    monkeypatch.chdir(place)
    experts, base = random_states(TASKS)
    for name, state in {"pretrained": base, **experts}.items():
        save_file(dict(state), place / f"{name}.safetensors")
    torch.save({"weight": torch.zeros(3, 6), "bias": torch.zeros(3)}, place / "head_cars.pt")
    return place


def cells(out: str, name: str) -> list[str]:
    """The row of a table that begins with a name."""
    row = next(line for line in out.splitlines() if line.startswith("│ " + name))
    return [cell.strip() for cell in row.strip("│").split("│")]


def test_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert call(monkeypatch, "suite", "init", folder) == 0
    out = capsys.readouterr().out
    assert cells(out, "cars")[:3] == ["cars", "expert", "cars.safetensors"]
    assert "head_cars.pt" in out
    fits = out.partition("What fits")[2]
    assert [cells(fits, name)[1] for name in (*TASKS, "base")] == ["yes"] * 3
    assert "a merge takes about" in out
    assert "time on this machine: under 1 s to average, under 1 s by CART" in out
    path = folder / "suite.yaml"
    assert f"next: mergescope inspect {path}" in out
    assert f"next: mergescope app {path}" in out
    suite = load_suite(path)
    assert suite.tasks == TASKS
    assert suite.spec.base == "pretrained.safetensors"
    assert suite.spec.experts["cars"].head == "head_cars.pt"
    # What it says can be done next can be.
    assert call(monkeypatch, "inspect", path, "--headers-only") == 0


def test_a_file_is_not_replaced_unasked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (folder / "suite.yaml").write_text("precious")
    assert call(monkeypatch, "suite", "init") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "suite.yaml").read_text() == "precious"
    assert call(monkeypatch, "suite", "init", "--output", "other.yaml") == 0
    assert call(monkeypatch, "suite", "init", "--overwrite") == 0
    assert load_suite(folder / "suite.yaml").tasks == load_suite(folder / "other.yaml").tasks


def test_names_base_and_files_that_people_give(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, _ = random_states(("far",), seed=3)
    far = folder.parent / "far.safetensors"
    save_file(dict(experts["far"]), far)
    arguments = ["--task", f"mine={far}", "--task", "autos=cars.safetensors", "--output", "s.yaml"]
    assert call(monkeypatch, "suite", "init", ".", "--base", "dtd.safetensors", *arguments) == 0
    spec = load_suite(folder / "s.yaml").spec
    assert spec.base == "dtd.safetensors"
    assert {task: e.weights for task, e in spec.experts.items()} == {
        "autos": "cars.safetensors",
        "mine": str(far),
    }
    options = ["--base", "none", "--task", "a=cars.safetensors", "--task", "b=dtd.safetensors"]
    assert call(monkeypatch, "suite", "init", *options, "--output", "t.yaml") == 0
    spec = load_suite(folder / "t.yaml").spec
    assert spec.base is None
    assert {task: e.weights for task, e in spec.experts.items()} == {
        "a": "cars.safetensors",
        "b": "dtd.safetensors",
    }


def test_what_does_not_fit_is_said_before_anything_is_merged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    state = dict(random_states(TASKS)[1])
    state["conv.weight"] = torch.zeros(5, 3, 2, 2)
    save_file(state, folder / "zoo.safetensors")
    (folder / "broken.pt").write_bytes(b"no")
    assert call(monkeypatch, "suite", "init") == 0
    captured = capsys.readouterr()
    assert cells(captured.out.partition("What fits")[2], "zoo")[1:] == ["no", "1 shape"]
    assert "left out" in next(line for line in captured.out.splitlines() if "broken.pt" in line)
    assert "note: not all of these can be merged" in captured.err


def test_models_of_the_hub(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for seed, name in enumerate(("net", "net-cars", "net-dtd")):
        hub.repository(f"org/{name}", files_of(weights(seed, side=300)))
    ids = ["hf://org/net", "hf://org/net-cars", "hf://org/net-dtd"]
    assert call(monkeypatch, "suite", "init", *ids, "-o", "hub.yaml") == 0
    out = capsys.readouterr().out
    assert cells(out, "cars")[:3] == ["cars", "expert", "org/net-cars"]
    assert [cells(out.partition("What fits")[2], n)[1] for n in (*TASKS, "base")] == ["yes"] * 3
    assert "next: mergescope download hub.yaml" in out
    assert sum(hub.sent.values()) < 3 * 300 * 300 * 4  # headers, not the weights
    spec = load_suite(folder / "hub.yaml").spec
    assert spec.base == ids[0]
    assert [e.weights for e in spec.experts.values()] == ids[1:]


def test_a_preset_is_written_though_the_hub_cannot_be_reached(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from merge_core.opening.presets import preset_spec

    hub.status = 503
    assert call(monkeypatch, "suite", "init", "--preset", "clip-vit-b-32-8", "-o", "p.yaml") == 0
    assert "what fits is not known yet" in capsys.readouterr().out
    assert load_suite(folder / "p.yaml").spec == preset_spec("clip-vit-b-32-8")
    options = ["--preset", "clip-vit-b-32-8", "--base", "none", "-o", "q.yaml"]
    assert call(monkeypatch, "suite", "init", *options) == 0
    assert load_suite(folder / "q.yaml").spec.base is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["--preset", "nothing"], "nothing"),
        ([".", "--preset", "clip-vit-b-32-8"], "--preset"),
        (["--task", "no equals"], "--task takes name=path"),
        (["--task", "a b=cars.safetensors"], "--task takes name=path"),
        (["--task", "a=cars.safetensors", "--task", "a=dtd.safetensors"], "each name once"),
        ([".", "--task", "dtd=cars.safetensors"], "'dtd'"),
        (["hf://org/a/b/c"], "hf://org/a/b/c"),
        (["--output", "cars.safetensors/suite.yaml"], "cars.safetensors"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], named: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert call(monkeypatch, "suite", "init", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mergescope: ")
    assert captured.err.count("\n") == 1
    assert named in captured.err
    assert not (folder / "suite.yaml").exists()


def test_an_adapter_without_its_base_is_explained(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    adapter = folder / "lora"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["fc2"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {"base_model.model.x.lora_A.weight": torch.ones(1, 4)},
        adapter / "adapter_model.safetensors",
    )
    assert call(monkeypatch, "suite", "init", "lora", "--base", "none") == 0
    assert "what fits is not known yet" in capsys.readouterr().out


def test_the_dashboard_looks_below_the_named_folders_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def execve(_program: str, _command: list[str], environment: dict[str, str]) -> None:
        seen["env"] = environment

    monkeypatch.setattr("os.execve", execve)
    monkeypatch.setattr("os.chdir", lambda _: None)
    monkeypatch.delenv("MERGESCOPE_ROOTS", raising=False)
    assert call(monkeypatch, "app") == 0
    assert seen["env"]["MERGESCOPE_ROOTS"] == str(folder)  # where the command was given
    assert call(monkeypatch, "app", "--root", "..", "--root", folder) == 0
    assert seen["env"]["MERGESCOPE_ROOTS"] == f"{folder.parent}{os.pathsep}{folder}"
    monkeypatch.setenv("MERGESCOPE_ROOTS", "/data")
    assert call(monkeypatch, "app") == 0
    assert seen["env"]["MERGESCOPE_ROOTS"] == "/data"
    assert call(monkeypatch, "app", "--root", "nowhere") == 2
