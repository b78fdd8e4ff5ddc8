"""A tiny suite with weights that are known exactly."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from merge_core.suites.suite import Suite, load_suite
from merge_core.task_vectors import Origin
from merge_core.yaml_text import dump_yaml

TASKS = ("digits", "shapes", "lines", "dots")
QKV = "blocks.0.attn.qkv.weight"
FC = "blocks.0.mlp.fc1.weight"
CONV = "stem.conv.weight"
BIAS = "blocks.0.mlp.fc1.bias"
MATRICES = (QKV, FC, CONV)
SHAPES = {QKV: (12, 8), FC: (9, 14), CONV: (6, 3, 2, 2), BIAS: (9,)}


def write_suite(
    folder: Path, base: dict | None, experts: dict[str, dict[str, torch.Tensor]]
) -> Suite:
    folder.mkdir(parents=True, exist_ok=True)
    document = {"name": "tiny", "experts": {t: {"weights": f"{t}.safetensors"} for t in experts}}
    if base is not None:
        save_file(base, folder / "base.safetensors")
        document["base"] = "base.safetensors"
    for task, state in experts.items():
        save_file(state, folder / f"{task}.safetensors")
    (folder / "suite.yaml").write_text(dump_yaml(document))
    return load_suite(folder)


def random_states() -> tuple[dict, dict[str, dict[str, torch.Tensor]]]:
    g = torch.Generator().manual_seed(3)
    base = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    base["steps"] = torch.tensor(5)
    experts = {}
    for task in TASKS:
        experts[task] = {
            name: base[name] + 0.3 * torch.randn(shape, generator=g)
            for name, shape in SHAPES.items()
        }
        experts[task]["steps"] = torch.tensor(len(task))
    return base, experts


def task_vectors(suite: Suite, name: str, origin: Origin) -> list[torch.Tensor]:
    """Task vectors straight from the files, in float64."""
    experts = torch.stack([suite.expert(t).tensor(name).double() for t in suite.tasks])
    assert suite.base is not None
    about = suite.base.tensor(name).double() if origin == "base" else experts.mean(0)
    return list(experts - about)
