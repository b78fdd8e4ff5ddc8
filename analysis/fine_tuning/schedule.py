"""How long and how fast something is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """AdamW with a linear rise and a cosine fall of the learning rate to zero.

    Attributes:
        steps: of the optimiser.
        batch: examples in a step.
        rate: the learning rate of weight matrices at its highest.
        rest: its factor for all other parameters; those are not trained where it is 0.
        weight_decay: decoupled.
        warmup: steps of the rise.
        clip: most norm of a step's gradient.
    """

    steps: int
    batch: int
    rate: float
    rest: float = 1.0
    weight_decay: float = 0.0
    warmup: int = 10
    clip: float = math.inf

    def factor(self, step: int) -> float:
        """The share of `rate` used at a step.

        Example:
            >>> schedule = Schedule(steps=12, batch=1, rate=1.0, warmup=2)
            >>> [schedule.factor(step) for step in (0, 1, 7)]
            [0.5, 1.0, 0.5]
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return 0.5 * (1 + math.cos(math.pi * done))
