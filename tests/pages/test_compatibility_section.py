"""Open checkpoints says what does not belong together, by files and by weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from streamlit.testing.v1 import AppTest

from tests.conftest import random_states

TASKS = ("cars", "dtd")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A suite whose members have a folder each, with a config.json."""
    experts, base = random_states(TASKS)
    for name, state in {"base": base, **experts}.items():
        (tmp_path / name).mkdir()
        save_file(dict(state), tmp_path / name / "model.safetensors")
        config = {"hidden_act": "gelu", "eos_token_id": 2}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    members = "".join(f"  {name}: {{weights: {name}}}\n" for name in TASKS)
    (tmp_path / "suite.yaml").write_text(f"name: s\nbase: base\nexperts:\n{members}")
    return tmp_path


def shown(folder: Path) -> str:
    """All that the section says of a suite."""

    def script(place: str) -> None:
        from merge_core.suites.suite import load_suite
        from ui.sections.compatibility import compatibility_section

        compatibility_section(load_suite(place), True)

    at = AppTest.from_function(script, args=(str(folder),), default_timeout=60)
    at.run()
    assert not at.exception
    kinds = ("error", "warning", "caption")
    said = [element.value for kind in kinds for element in getattr(at, kind)]
    return "\n".join([*said, *(frame.value.to_string() for frame in at.dataframe)])


def test_what_belongs_together_is_shown_with_its_figures(folder: Path) -> None:
    text = shown(folder)
    assert "not one network" not in text
    assert "update_cosine" in text
    assert "different random starts" in text


def test_a_refusal_and_a_stranger_are_shown_once_the_files_change(folder: Path) -> None:
    assert "not one network" not in shown(folder)
    (folder / "dtd" / "config.json").write_text(json.dumps({"hidden_act": "<b>relu</b>"}))
    text = shown(folder)
    assert "not one network" in text
    assert "<b>relu</b> in dtd" in text  # in a table, which shows text as it is
    states, _ = random_states(TASKS)
    strange = {
        name: torch.randn(value.shape, generator=torch.Generator().manual_seed(9))
        if value.is_floating_point()
        else value
        for name, value in states["dtd"].items()
    }
    save_file(strange, folder / "dtd" / "model.safetensors")
    assert "Dtd is no fine-tune of the base" in shown(folder)
