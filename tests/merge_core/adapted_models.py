"""Tiny models with adapters that PEFT makes, saves and merges: the independent route."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.lora import AdaptedCheckpoint
from merge_core.suites.suite import Suite, load_suite
from merge_core.yaml_text import dump_yaml

State = dict[str, Tensor]


class Mixed(nn.Module):
    """A layer of each kind that LoRA knows, square ones included."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 3, 6))
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(3, 6, 3)
        self.point = nn.Conv2d(6, 4, 1, bias=False)
        self.square = nn.Linear(6, 6)
        self.wide = nn.Linear(6, 9)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def gpt2() -> nn.Module:
    """A tiny GPT-2 whose layers are stored transposed."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=8, n_layer=2, n_head=2, vocab_size=13, n_positions=6, tie_word_embeddings=False
    )
    torch.manual_seed(3)
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def state_of(model: nn.Module) -> State:
    """The model's tensors, each with memory of its own."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def shake(model: nn.Module, seed: int, size: float = 0.3) -> None:
    """Give all that an adapter trains random values, as training would (B starts at zero)."""
    source = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=source)


def adapter(model: nn.Module, folder: Path, seed: int = 0, **options: Any) -> State:
    """Adapt a copy of a model, save the adapter to `folder`, and give PEFT's merged weights."""
    torch.manual_seed(seed)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**options))
    shake(adapted, seed)
    adapted.save_pretrained(str(folder))
    return state_of(adapted.merge_and_unload())


def open_adapter(folder: Path, model: nn.Module, **options: Any) -> tuple[AdaptedCheckpoint, State]:
    """An adapter of a model read by us, and the model as PEFT merges it."""
    merged = adapter(model, folder / "lora", **options)
    save_file(state_of(model), folder / "base.safetensors")
    base = Checkpoint(folder / "base.safetensors")
    return AdaptedCheckpoint(folder / "lora", base), merged


def rewrite(folder: Path, change: Callable[[State], object]) -> None:
    """Change the stored tensors of an adapter in place."""
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    change(state)
    save_file({name: value.clone() for name, value in state.items()}, path)


def write_adapted_suite(folder: Path, base: State, experts: dict[str, str], **fields: Any) -> Path:
    """A suite.yaml beside its base and its adapters' folders."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in base.items()}, folder / "base.safetensors"
    )
    document = {
        "name": "adapters",
        "base": "base.safetensors",
        "experts": {task: {"weights": weights} for task, weights in experts.items()},
        **fields,
    }
    path = folder / "suite.yaml"
    path.write_text(dump_yaml(document), encoding="utf-8")
    return path


def two_adapters(folder: Path) -> Suite:
    """A suite of the tasks digits and letters: two adapters of rank 2 of one model."""
    torch.manual_seed(4)
    model = Mixed()
    for seed, task in enumerate(["digits", "letters"]):
        adapter(model, folder / task, seed, r=2, target_modules=["square", "wide", "conv"])
    names = {"digits": "digits", "letters": "letters/adapter_model.safetensors"}
    return load_suite(write_adapted_suite(folder, state_of(model), names))
