"""Joint pre-training, fine-tuning under frozen heads, and accuracy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from data.tasks.canvas import Images, Labels

Progress = Callable[[int, float], None]

KEEP_EVERY = 100  # steps of pre-training


# By the ends of their names: attention and MLP of a transformer, kernels of a ResNet.
MATRICES = (
    *("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"),
    *("conv.weight", "conv1.weight", "conv2.weight"),
)


@dataclass(frozen=True)
class Schedule:
    """AdamW with a linear warm-up and a cosine decay to zero.

    The matrices that spectral methods decompose (:data:`MATRICES`) learn at ``rate``, all other
    parameters at ``rest`` times it.
    ``batch`` counts one task's images in a step.
    """

    steps: int
    batch: int
    rate: float
    weight_decay: float = 0.0
    warmup: int = 20
    rest: float = 1.0

    def factor(self, step: int) -> float:
        """The share of ``rate`` used at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return 0.5 * (1 + math.cos(math.pi * done))


def to_input(images: Images | NDArray[np.uint8], device: torch.device) -> Tensor:
    """uint8 N x 32 x 32 x 3 -> float32 N x 3 x 32 x 32 in [-1, 1] (mean and deviation 0.5)."""
    scaled = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float()
    return (scaled / 127.5 - 1).contiguous()


def _optimiser(
    modules: list[nn.Module], plan: Schedule
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    named = [pair for module in modules for pair in module.named_parameters()]
    groups = [
        {"params": [p for name, p in named if name.endswith(MATRICES)], "lr": plan.rate},
        {
            "params": [p for name, p in named if not name.endswith(MATRICES)],
            "lr": plan.rate * plan.rest,
        },
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=plan.weight_decay)
    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, plan.factor)


def train_jointly(
    backbone: nn.Module,
    heads: Mapping[str, nn.Linear],
    pools: Mapping[str, tuple[Images, Labels]],
    shares: Mapping[str, int],
    plan: Schedule,
    rng: np.random.Generator,
    progress: Progress | None = None,
    kept: Path | None = None,
    learn_heads: bool = True,
) -> None:
    """Train the backbone on all tasks together, in place, and their heads unless told otherwise.

    Each step takes ``shares[name]`` images of every pool and adds up the mean cross-entropies.
    Every :data:`KEEP_EVERY` steps all that the next step depends on is written to ``kept``; where
    that file exists, training goes on from it, with the same result.
    """
    device = next(backbone.parameters()).device
    modules = [backbone, *heads.values()] if learn_heads else [backbone]
    parameters = [p for module in modules for p in module.parameters()]
    optimiser, schedule = _optimiser(modules, plan)
    parts = [*modules, optimiser, schedule]
    begin = _take_up(kept, parts, rng) if kept is not None and kept.exists() else 0
    backbone.train()
    for step in range(begin, plan.steps):
        picks = {name: rng.integers(len(pools[name][1]), size=shares[name]) for name in heads}
        batch = np.concatenate([pools[name][0][rows] for name, rows in picks.items()])
        features = backbone(to_input(batch, device)).split([len(r) for r in picks.values()])
        losses = [
            functional.cross_entropy(
                heads[name](part), torch.from_numpy(pools[name][1][rows]).to(device)
            )
            for part, (name, rows) in zip(features, picks.items(), strict=True)
        ]
        loss = torch.stack(losses).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, loss.item())
        if kept is not None and ((step + 1) % KEEP_EVERY == 0 or step + 1 == plan.steps):
            _lay_down(kept, step + 1, parts, rng)
    backbone.eval()


def _lay_down(kept: Path, step: int, parts: Sequence[Any], rng: np.random.Generator) -> None:
    """Write the states of modules, optimiser, schedule and random stream, whole or not at all."""
    states = [part.state_dict() for part in parts]
    content = {"step": step, "states": states, "rng": json.dumps(rng.bit_generator.state)}
    partial = kept.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(kept)


def _take_up(kept: Path, parts: Sequence[Any], rng: np.random.Generator) -> int:
    """Load what :func:`_lay_down` wrote; returns the number of steps done."""
    content = torch.load(kept, weights_only=True)
    for part, state in zip(parts, content["states"], strict=True):
        part.load_state_dict(state)
    rng.bit_generator.state = json.loads(content["rng"])
    return int(content["step"])


def fine_tune(
    backbone: nn.Module,
    head: nn.Linear,
    images: Images,
    labels: Labels,
    plan: Schedule,
    rng: np.random.Generator,
) -> float:
    """Train the backbone on one task, in place, its head frozen; returns the last steps' loss."""
    device = next(backbone.parameters()).device
    optimiser, schedule = _optimiser([backbone], plan)
    weight, bias = head.weight.detach(), head.bias.detach()
    backbone.train()
    recent = math.nan
    for _ in range(plan.steps):
        rows = rng.integers(len(labels), size=plan.batch)
        logits = functional.linear(backbone(to_input(images[rows], device)), weight, bias)
        loss = functional.cross_entropy(logits, torch.from_numpy(labels[rows]).to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        value = loss.item()
        recent = value if math.isnan(recent) else 0.9 * recent + 0.1 * value
    backbone.eval()
    return recent


@torch.inference_mode()
def is_correct(
    backbone: nn.Module, head: nn.Linear, images: Images, labels: Labels
) -> NDArray[np.bool_]:
    """Whether each image (N x 32 x 32 x 3) is classified rightly: bool (N,)."""
    device = next(backbone.parameters()).device
    backbone.eval()
    logits = head(backbone(to_input(images, device)))
    return (logits.argmax(dim=1).cpu().numpy() == labels).astype(np.bool_)
