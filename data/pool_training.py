"""One way of training for all models of a pool: seeded, on one device, with snapshots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from merge_core.errors import PoolError
from merge_core.progress import Progress

State = dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """How one model is trained.

    Attributes:
        epochs: passes over the training images.
        batch: images in a step.
        rate: the learning rate (with a cosine schedule: at its highest).
        optimiser: ``sgd`` has PyTorch's L2 decay, ``adamw`` the decoupled one.
        momentum: of SGD.
        weight_decay: on weights; biases and norms never decay.
        schedule: ``cosine`` rises over the first twentieth and falls to zero; ``steps``
            multiplies by 0.1 at each milestone.
        milestones: shares of the epochs.
        shift: training images are moved by up to this many pixels in each direction.
        clip: most norm of a step's gradient; none when infinite.
    """

    epochs: int
    batch: int = 64
    rate: float = 1e-3
    optimiser: Literal["sgd", "adamw"] = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["cosine", "steps"] = "cosine"
    milestones: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    shift: int = 0
    clip: float = math.inf

    def rate_at(self, done: float) -> float:
        """The learning rate after a share `done`, in [0, 1), of the training."""
        if self.schedule == "steps":
            passed = sum(done >= milestone - 1e-9 for milestone in self.milestones)
            return self.rate * 0.1**passed
        rise = 0.05
        if done < rise:
            return self.rate * (done + 0.1 * rise) / (1.1 * rise)
        return self.rate * 0.5 * (1 + math.cos(math.pi * (done - rise) / (1 - rise)))


def train(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    normalise: Callable[[Tensor], Tensor],
    plan: Training,
    seed: int,
    device: torch.device,
    snapshots: Sequence[int] = (),
    progress: Progress | None = None,
    label: str = "",
) -> dict[int, State]:
    """Train a network in place; afterwards it is in evaluation mode.

    Args:
        network: from N x C x H x W to N x classes.
        images: uint8 N x C x H x W (normalised batch by batch: a quarter of the memory).
        labels: int64 N.
        normalise: from a batch of uint8 images to what the network takes.
        plan: how.
        seed: of the order of the images and of their shifts.
        device: where it is computed.
        snapshots: epochs (0: before the first step) whose weights are returned.
        progress: told after each epoch.
        label: what progress calls this.

    Returns:
        Epoch to state (on the CPU), in the order of epochs.

    Raises:
        PoolError: the loss is no longer finite.
        Cancelled: through `progress`.
    """
    source = torch.Generator().manual_seed(seed)
    network.to(device).requires_grad_(True)
    network.train()
    images, labels = images.to(device), labels.to(device)
    optimiser = _optimiser(network, plan)
    kept = {0: state_of(network)} if 0 in snapshots else {}
    steps = math.ceil(len(labels) / plan.batch)
    for epoch in range(plan.epochs):
        losses = torch.zeros((), device=device)
        order = torch.randperm(len(labels), generator=source).to(device)
        parts = order.split(plan.batch)
        if len(parts) > 1 and len(parts[-1]) == 1:
            parts = parts[:-1]  # one image has no variance, which batch normalisation needs
        for step, rows in enumerate(parts):
            for group in optimiser.param_groups:
                group["lr"] = plan.rate_at((epoch + step / steps) / plan.epochs)
            batch = images[rows]
            if plan.shift:
                batch = shift_randomly(batch, plan.shift, source)
            loss = functional.cross_entropy(network(normalise(batch)), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            if plan.clip < math.inf:
                nn.utils.clip_grad_norm_(network.parameters(), plan.clip)
            optimiser.step()
            losses += loss.detach()
        if not bool(losses.isfinite()):
            raise PoolError(
                f"{label or 'Training'}: the loss is not finite after epoch {epoch + 1}. "
                "Choose a lower learning rate."
            )
        if epoch + 1 in snapshots:
            kept[epoch + 1] = state_of(network)
        if progress is not None:
            progress.step(epoch + 1, plan.epochs, label)
    network.eval().requires_grad_(False)
    return kept


def state_of(network: nn.Module) -> State:
    """A copy of a network's parameters and buffers, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


def shift_randomly(images: Tensor, most: int, source: torch.Generator) -> Tensor:
    """N x C x H x W moved by up to `most` pixels each; pixels at the edge are repeated."""
    size, height, width = len(images), *images.shape[2:]
    moves = torch.randint(-most, most + 1, (2, size, 1), generator=source).to(images.device)
    rows = (torch.arange(height, device=images.device) + moves[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) + moves[1]).clamp(0, width - 1)
    number = torch.arange(size, device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None]].permute(
        0, 3, 1, 2
    )


def _optimiser(network: nn.Module, plan: Training) -> torch.optim.Optimizer:
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if plan.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=plan.rate, momentum=plan.momentum)
    return torch.optim.AdamW(groups, lr=plan.rate)
