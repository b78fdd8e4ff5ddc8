"""Fine-tuning of a network's weights under a frozen head, by the network that evaluates them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from analysis.fine_tuning.examples import Examples, shuffled_batches
from analysis.fine_tuning.schedule import Schedule
from analysis.networks.stateless import ModuleCopies, State
from analysis.outputs.heads import Head
from merge_core.errors import SuiteError
from merge_core.executors.base import one_thread
from merge_core.executors.local import Threads
from merge_core.progress import Progress

# Examples that pass the network together. Gradients are summed over such parts in their order,
# whatever number of threads there is, so that results are the same on every machine.
PART = 16


@dataclass(frozen=True)
class Update:
    """What is trained, and the weights that it gives.

    Attributes:
        matrices: trained at the schedule's rate.
        rest: trained at its rate times `rest`.
        weights: from the values of both, in that order, to what the network takes;
            differentiable in them.
    """

    matrices: list[Tensor]
    rest: list[Tensor]
    weights: Callable[[list[Tensor]], dict[str, Tensor]]

    @property
    def values(self) -> list[Tensor]:
        """All that is trained."""
        return [*self.matrices, *self.rest]


def full_update(start: State, trained: Collection[str], matrices: Collection[str]) -> Update:
    """Every parameter by itself.

    Args:
        start: all weights that the network takes, float32.
        trained: names of the parameters; others stay as they are.
        matrices: names of those that are weight matrices.
    """
    names = [name for name in trained if name in matrices]
    others = [name for name in trained if name not in matrices]
    values = {name: start[name].detach().clone().requires_grad_() for name in (*names, *others)}

    def weights(given: list[Tensor]) -> dict[str, Tensor]:
        return {**start, **dict(zip((*names, *others), given, strict=True))}

    return Update([values[n] for n in names], [values[n] for n in others], weights)


@one_thread()
def fine_tune(
    copies: ModuleCopies,
    update: Update,
    head: Head,
    examples: Examples,
    schedule: Schedule,
    rng: np.random.Generator,
    what: str,
    progress: Progress | None = None,
) -> float:
    """Train an update in place on the cross-entropy of a task.

    The network is in evaluation mode: no dropout, and stored statistics.

    Args:
        copies: the network, from inputs to features.
        update: what is trained.
        head: frozen, on the CPU.
        examples: of the task.
        schedule: how long and how fast.
        rng: of the order of the examples.
        what: is trained, for messages and progress.
        progress: told the loss after each step.

    Returns:
        The mean loss of the last tenth of the steps (nats).

    Raises:
        SuiteError: the loss is not finite.
        Cancelled: between two steps.
    """
    groups: list[dict[str, Any]] = [
        {"params": values, "lr": schedule.rate * factor}
        for values, factor in ((update.matrices, 1.0), (update.rest, schedule.rest))
        if values and factor > 0
    ]
    moving = [value for group in groups for value in group["params"]]
    optimiser = torch.optim.AdamW(groups, weight_decay=schedule.weight_decay, fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule.factor)
    batches = shuffled_batches(len(examples), schedule.batch, rng)
    losses = []
    for step in range(schedule.steps):
        loss, slopes = loss_and_gradient(copies, update, head, examples, next(batches), moving)
        if not np.isfinite(loss):
            raise SuiteError(
                f"{what}: the loss is not finite at step {step + 1} of {schedule.steps}. Choose a "
                "lower rate, or a base whose weights are in order."
            )
        for value, slope in zip(moving, slopes, strict=True):
            value.grad = slope
        nn.utils.clip_grad_norm_(moving, schedule.clip)
        optimiser.step()
        rates.step()
        losses.append(loss)
        if progress is not None:
            progress.step(step + 1, schedule.steps, f"{what}: loss {loss:.3f}")
    return float(np.mean(losses[-max(1, schedule.steps // 10) :]))


def loss_and_gradient(
    copies: ModuleCopies,
    update: Update,
    head: Head,
    examples: Examples,
    batch: np.ndarray,
    moving: list[Tensor],
) -> tuple[float, list[Tensor]]:
    """Mean cross-entropy (nats) of a batch, and its derivatives.

    Args:
        copies: the network, from inputs to features.
        update: gives its weights.
        head: frozen, on the CPU.
        examples: of the task.
        batch: numbers of examples.
        moving: what the loss is differentiated in.
    """
    device = moving[0].device

    def of_part(numbers: np.ndarray) -> tuple[float, tuple[Tensor | None, ...]]:
        with torch.enable_grad():
            weights = update.weights(update.values)
            features = copies.call(weights, examples.take(numbers).to(device))
            labels = torch.from_numpy(examples.labels[numbers])
            loss = functional.cross_entropy(head.logits(features.cpu()), labels, reduction="sum")
            loss = loss / len(batch)
            return loss.item(), torch.autograd.grad(loss, moving, allow_unused=True)

    order = examples.sort(batch)
    parts = [order[i : i + PART] for i in range(0, len(order), PART)]
    total, sums = 0.0, list[Tensor | None]([None] * len(moving))
    for loss, slopes in Threads().map(of_part, parts):
        total += loss
        for place, slope in enumerate(slopes):
            known = sums[place]
            sums[place] = slope if known is None else known if slope is None else known + slope
    return total, [
        torch.zeros_like(value) if known is None else known
        for value, known in zip(moving, sums, strict=True)
    ]
