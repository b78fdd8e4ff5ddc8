"""Tiny pools made to measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from analysis.networks.build import build_network
from merge_core.errors import PoolError
from merge_core.suites.pool import Pool, load_pool
from merge_core.yaml_text import dump_yaml

SIZE, CLASSES = 12, 4
IMAGES = {"train": 40, "val": 30, "test": 50}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear", "args": {"img_size": SIZE}},
    "mlp": {"name": "mlp", "args": {"img_size": SIZE, "widths": [12, 8], "bias": False}},
    "vgg": {"name": "vgg", "args": {"channels": [4, 6], "hidden": 8}},
    "resnet": {
        "name": "resnet18",
        "args": {"layers": [1, 1, 1, 1], "channels": [4, 4, 6, 8], "stem_width": 4},
    },
    "vit": {
        "name": "vit_tiny_patch16_224",
        "args": {"img_size": SIZE, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2},
    },
}


def write_pool(
    folder: Path,
    architecture: str | Mapping[str, Any] = "mlp",
    members: int = 3,
    channels: int = 1,
    seed: int = 0,
    spread: float | None = None,
    change: Callable[[int, dict[str, Tensor]], dict[str, Tensor]] | None = None,
    fields: Sequence[Mapping[str, Any]] = (),
) -> Pool:
    """Write a pool of random members and images, and load it.

    Args:
        folder: to be made.
        architecture: a key of :data:`ARCHITECTURES`, or a name and args (in_chans and
            num_classes are filled in).
        members: how many.
        channels: colour channels.
        seed: of everything.
        spread: standard deviation of the members about a common start, relative to each tensor;
            None for independent starts.
        change: applied to each member's state before it is written, as ``change(number, state)``.
        fields: further fields of the members (seed, weight_decay, ...).
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = ARCHITECTURES[architecture] if isinstance(architecture, str) else architecture
    args = {"in_chans": channels, "num_classes": CLASSES, **chosen["args"]}
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {"class_names": np.array([f"class{i}" for i in range(CLASSES)])}
    for split, count in IMAGES.items():
        shape = (count, SIZE, SIZE, channels)
        arrays[f"{split}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % CLASSES
    np.savez(folder / "inputs.npz", **arrays)  # type: ignore[arg-type]  # numpy's stubs
    document = {
        "name": "tiny",
        "task": "noise",
        "family": str(chosen["name"]),
        "regime": "independent" if spread is None else "shared",
        "architecture": {"name": chosen["name"], "args": args},
        "data": {"file": "inputs.npz", "mean": [0.5] * channels, "std": [0.25] * channels},
        "members": [
            {"weights": f"{i}.safetensors", "seed": i, **(fields[i] if fields else {})}
            for i in range(members)
        ],
    }
    (folder / "pool.yaml").write_text(dump_yaml(document), encoding="utf-8")
    pool = load_pool(folder)
    start = fresh_state(pool, seed)
    for i in range(members):
        if spread is None:
            state = fresh_state(pool, seed + 1 + i)
        else:
            state = {name: perturb(value, spread) for name, value in start.items()}
        save_file(change(i, state) if change else state, folder / f"{i}.safetensors")
    return pool


def fresh_state(pool: Pool, seed: int) -> dict[str, Tensor]:
    """Random weights of the pool's architecture, with biases, norms and statistics not trivial."""
    torch.manual_seed(seed)
    state = {}
    network = build_network(pool.spec.architecture, pool.path, PoolError)
    for name, value in network.state_dict().items():
        if not value.is_floating_point():
            state[name] = value.clone()
        elif name.endswith("running_var"):
            state[name] = 0.5 + torch.rand(value.shape)
        elif value.ndim < 2:
            state[name] = value + 0.2 * torch.randn(value.shape)
        else:
            state[name] = value + 0.5 * torch.randn(value.shape) / value[0].numel() ** 0.5
    return state


def perturb(value: Tensor, spread: float) -> Tensor:
    """A tensor with relative noise; counters and variances keep their meaning."""
    if not value.is_floating_point():
        return value.clone()
    scale = spread * value.square().mean().sqrt()
    noisy = value + scale * torch.randn(value.shape)
    return noisy.abs() if bool((value > 0).all()) else noisy
