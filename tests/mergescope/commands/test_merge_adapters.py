"""Adapters on the command line: inspected, merged, and written again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.lora import AdaptedCheckpoint
from merge_core.errors import RecipeError
from mergescope.cli import app
from tests.merge_core.adapted_models import Mixed, adapter, state_of, write_adapted_suite


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    torch.manual_seed(8)
    model = Mixed()
    for seed, task in enumerate(["a", "b"]):
        adapter(model, tmp_path / task, seed, r=1, target_modules=["square", "wide"])
    write_adapted_suite(tmp_path, state_of(model), {"a": "a", "b": "b"})
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {"suite": "suite.yaml", "method": "task_arithmetic", "parameters": {"scale": 0.5}}
        )
    )
    return path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_inspect_shows_ranks_of_adapters(recipe: Path) -> None:
    shown = run("inspect", recipe.parent / "suite.yaml", "--spectra")
    assert shown.exit_code == 0
    assert "LoRA adapter of rank 1, alpha 8, on 2 matrices" in " ".join(shown.output.split())
    assert "Task vectors" in shown.output


def test_a_merge_as_an_adapter_is_the_merge(recipe: Path, tmp_path: Path) -> None:
    assert run("merge", recipe, "-o", tmp_path / "whole").exit_code == 0
    done = run("merge", recipe, "-o", tmp_path / "thin", "--as-adapter", "energy:1")
    assert done.exit_code == 0
    assert "2 matrices with rank 2, which keep 100.0000%" in " ".join(done.output.split())
    whole = Checkpoint(tmp_path / "whole")
    thin = AdaptedCheckpoint(tmp_path / "thin", Checkpoint(tmp_path / "base.safetensors"))
    for name in whole:
        torch.testing.assert_close(thin.tensor(name), whole.tensor(name), rtol=1e-5, atol=2e-6)


def test_a_rank_that_is_none(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="An adapter's rank is"):
        run("merge", recipe, "-o", tmp_path / "x", "--as-adapter", "many")
    assert not (tmp_path / "x").exists()
