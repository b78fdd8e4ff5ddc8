"""Tiny models with adapters that PEFT makes, saves and merges: the independent route."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

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


def state_of(model: nn.Module) -> State:
    """The model's tensors, each with memory of its own."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def shaken(model: nn.Module, seed: int, size: float = 0.3) -> None:
    """Give all that an adapter trains random values, as training would (B starts at zero)."""
    source = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=source)


def adapter(model: nn.Module, folder: Path, seed: int = 0, **options: Any) -> State:
    """Adapt a copy of a model, save the adapter to `folder`, and give PEFT's merged weights."""
    torch.manual_seed(seed)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**options))
    shaken(adapted, seed)
    adapted.save_pretrained(str(folder))
    return state_of(adapted.merge_and_unload())


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
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path
