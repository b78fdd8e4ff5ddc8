"""What one forward pass of a model says about each image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from analysis.networks.stateless import Outputs
from analysis.outputs.prediction_store import CLASSES


class Kind(Protocol):
    """What is known of a number per input before it is measured.

    Attributes:
        by_expert: whether the outputs of the task's expert are used.
        dtype: in which it is kept.
    """

    @property
    def by_expert(self) -> bool:
        """See above."""

    @property
    def dtype(self) -> Literal["int16", "float32"]:
        """See above."""


@dataclass(frozen=True)
class Measure:
    """One number per image.

    Attributes:
        of: gives it (N) from the model's outputs and those of the task's expert on the same images.
        by_expert: whether the expert's are used.
        dtype: in which it is kept.
    """

    of: Callable[[Outputs, Outputs], Tensor]
    by_expert: bool
    dtype: Literal["int16", "float32"] = "float32"


def _entropy(model: Outputs, _: Outputs) -> Tensor:
    logs = model.logits.log_softmax(dim=1)
    return -(logs.exp() * logs).sum(dim=1)


def _l2(model: Outputs, expert: Outputs) -> Tensor:
    return (model.features - expert.features).norm(dim=1)


def _cosine(model: Outputs, expert: Outputs) -> Tensor:
    return 1 - torch.cosine_similarity(model.features, expert.features, dim=1)


def _overlap(model: Outputs, expert: Outputs) -> Tensor:
    return torch.minimum(model.logits.softmax(dim=1), expert.logits.softmax(dim=1)).sum(dim=1)


def _divergence(model: Outputs, expert: Outputs) -> Tensor:
    own, reference = model.logits.log_softmax(dim=1), expert.logits.log_softmax(dim=1)
    return (reference.exp() * (reference - own)).sum(dim=1)


MEASURES: dict[str, Measure] = {
    CLASSES: Measure(lambda model, _: model.logits.argmax(dim=1), False, "int16"),
    "entropy": Measure(_entropy, False),
    "l2": Measure(_l2, True),
    "cosine": Measure(_cosine, True),
    "overlap": Measure(_overlap, True),
    "divergence": Measure(_divergence, True),
}
"""Predicted class; entropy of the softmax p (nats); distance of the features to those of the task's
expert: ‖f − f_t‖₂ and 1 − cos(f, f_t); of p to the expert's softmax q: Σ_c min(p_c, q_c), which is
one minus their total variation, and KL(q ‖ p) (nats)."""
