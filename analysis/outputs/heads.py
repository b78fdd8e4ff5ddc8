"""The frozen classifiers of tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from analysis.outputs.own_heads import dense_activation, read_own_head
from analysis.outputs.zero_shot import zero_shot_weight
from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.devices import CPU, Device
from merge_core.errors import CheckpointError, SuiteError
from merge_core.suites.data_files import head_path
from merge_core.suites.data_spec import head_spec
from merge_core.suites.suite import Suite


@dataclass(frozen=True)
class Head:
    """A frozen linear classifier: logits = features @ weight.T + bias.

    Attributes:
        weight: classes x width, float32.
        bias: classes, float32.
        normalizes: whether features are divided by their norm first.
        before: what stands between features and it: layers of a classification head.
        takes: width of the features, where layers stand before it.
    """

    weight: Tensor
    bias: Tensor
    normalizes: bool = False
    before: tuple[Callable[[Tensor], Tensor], ...] = ()
    takes: int | None = None

    @property
    def width(self) -> int:
        """Of the features that it takes."""
        return self.takes or self.weight.shape[1]

    def logits(self, features: Tensor, device: Device = CPU) -> Tensor:
        """N x classes, on the CPU, from N x width on a device.

        Layers before it are run on the CPU.
        """
        if self.before:
            features, device = device.fetch(features), CPU
        if self.normalizes:
            features = features / features.norm(dim=-1, keepdim=True)
        for layer in self.before:
            features = layer(features)
        weight, bias = device.send(self.weight), device.send(self.bias)
        return device.fetch(features @ weight.T + bias)


def load_head(suite: Suite, task: str) -> Head:
    """A task's head: the expert's own where suite.yaml names none.

    Else a file with ``weight`` and ``bias`` (a prefix such as ``head.`` is allowed), or one made of
    class names (:mod:`analysis.outputs.zero_shot`).

    Raises:
        SuiteError: no head, a missing file, or one without weight and bias.
        MergeScopeError: a text tower that cannot be fetched or run.

    Example:
        >>> load_head(load_suite("vision"), "digits").logits(torch.zeros(2, 256)).shape
        torch.Size([2, 10])
    """
    given = suite.spec.experts[task].head
    if given is None and suite.has_own_head(task):
        own = read_own_head(suite, task)
        return Head(own.weight, own.bias, before=own.before, takes=own.width)
    if given is None:
        raise SuiteError(f"Task {task!r} has no head; add 'head:' to it in {suite.path}.")
    spec = head_spec(given)
    if spec.zero_shot is not None:
        made = zero_shot_weight(suite, task, spec.zero_shot)
        return Head(made, torch.zeros(len(made)), normalizes=True)
    assert spec.file is not None
    path = head_path(spec.file, suite.file)
    before: dict[str, Any] = {}
    try:
        checkpoint = Checkpoint(path)
        start = "" if spec.layers is None else f"{spec.layers}."
        names = [
            n
            for n in checkpoint
            if n.startswith(start) and n.rpartition(".")[2] in ("weight", "bias")
        ]
        first = [f"{start}dense.{kind}" for kind in ("weight", "bias")]
        if set(first) < set(names):  # dense, activation, out_proj: RoBERTa's and ELECTRA's heads
            wide, shift = (checkpoint.tensor(name).float() for name in first)
            dense = partial(functional.linear, weight=wide, bias=shift)
            before = {"before": (dense, dense_activation(suite)), "takes": wide.shape[1]}
            names = [name for name in names if name not in first]
        found = {name.rpartition(".")[2]: checkpoint.tensor(name).float() for name in names}
    except CheckpointError as error:
        raise SuiteError(f"Head of task {task!r}: {error}") from error
    if len(found) < len(names):
        raise SuiteError(
            f"{path} (head of task {task!r}) holds several layers "
            f"({', '.join(names[:4])}, ...). Give a file with one 'weight' and one 'bias', or "
            "name the head's by 'layers'."
        )
    weight = found.get("weight")
    if weight is None or weight.ndim != 2:
        raise SuiteError(
            f"{path} (head of task {task!r}) must hold a 'weight' of shape "
            "classes x width, and may hold a 'bias'."
        )
    bias = found.get("bias", torch.zeros(len(weight)))
    if bias.shape != (len(weight),):
        raise SuiteError(f"{path}: bias and weight disagree about the classes.")
    return Head(weight, bias, spec.normalizes, **before)
