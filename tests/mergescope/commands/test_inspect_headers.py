"""``mergescope inspect --headers-only`` reads headers with no help of torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import write_suite

ROOT = Path(__file__).resolve().parents[3]
LAYER = "blocks.0.mlp.fc1"
INSPECT = """
import sys
sys.argv = ["mergescope", "inspect", sys.argv[1], "--headers-only"]
from mergescope.cli import main
try:
    main()
except SystemExit as end:
    assert end.code == 0, end.code
heavy = {"torch", "pandas", "scipy", "timm", "transformers", "streamlit"} & set(sys.modules)
assert not heavy, heavy
"""


def expert_of(kind: str, suite: Path) -> str:
    """An expert that is stored in another way; returns its path in the suite's folder."""
    state = {f"{LAYER}.weight": torch.randn(12, 8), f"{LAYER}.bias": torch.randn(12)}
    folder = suite / "other"
    folder.mkdir()
    if kind == "half precision, in shards":
        parts = {f"model-{i}.safetensors": name for i, name in enumerate(state)}
        for file, name in parts.items():
            save_file({name: state[name].bfloat16()}, folder / file)
        index = {"weight_map": {name: file for file, name in parts.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "pickle":
        torch.save(state, folder / "model.pt")
    else:
        config = {"peft_type": "LORA", "r": 2, "target_modules": [LAYER]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        key = f"base_model.model.{LAYER}.lora_"
        factors = {f"{key}A.weight": torch.randn(2, 8), f"{key}B.weight": torch.randn(12, 2)}
        save_file(factors, folder / "adapter_model.safetensors")
    return folder.name


@pytest.mark.parametrize("kind", ["safetensors", "half precision, in shards", "pickle", "adapter"])
def test_no_torch_is_imported(tmp_path: Path, kind: str) -> None:
    state = {f"{LAYER}.weight": torch.randn(12, 8), f"{LAYER}.bias": torch.randn(12)}
    suite = write_suite(tmp_path, {"a": state, "b": state}, state)
    if kind != "safetensors":
        suite.write_text(suite.read_text().replace("b.safetensors", expert_of(kind, tmp_path)))
    done = subprocess.run(
        [sys.executable, "-c", INSPECT, str(suite)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "parameters: 2 (1 decomposed, 1 averaged)" in done.stdout
    assert ("bfloat16" in done.stdout) == kind.startswith("half")
