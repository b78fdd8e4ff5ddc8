"""LoRA: an update s·B·A beside each weight matrix, trained and written as PEFT does.

Source: Hu et al., LoRA, arXiv:2106.09685; start and layout are PEFT's
(https://github.com/huggingface/peft).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.fine_tuning.base import write_weights
from analysis.fine_tuning.plan import BASE, FineTuningSpec
from analysis.fine_tuning.train import Update
from analysis.networks.stateless import State
from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.lora import PREFIX
from merge_core.checkpoints.lora_config import CONFIG_FILE, WEIGHT_FILES
from merge_core.errors import SuiteError
from merge_core.files import write_atomically
from merge_core.output.base_class import base_class
from merge_core.suites.suite import Suite


def adapted_matrices(suite: Suite) -> tuple[list[str], bool]:
    """The weight matrices that LoRA adapts, and whether they are stored in x out.

    Raises:
        SuiteError: there is none, or only some are stored in x out.
    """
    first = suite.expert(suite.tasks[0])
    names = [
        name
        for name in suite.matrices
        if len(first.info(name).shape) == 2 and name.endswith(".weight")
    ]
    transposed = {suite.is_stored_transposed(name) for name in names}
    if len(transposed) != 1:
        reason = "none" if not names else "some that are stored in x out and some that are not"
        raise SuiteError(
            f"LoRA adapts weight matrices of inner linear layers, and of those the base has "
            f"{reason}. Use 'method: full'."
        )
    return names, transposed.pop()


def low_rank_update(
    start: State,
    names: Sequence[str],
    stored_transposed: bool,
    spec: FineTuningSpec,
    source: torch.Generator,
) -> Update:
    """A product of two thin matrices beside each weight: A random as in PEFT, B zero.

    Args:
        start: all weights that the network takes, float32.
        names: of the weight matrices.
        stored_transposed: whether these are stored in x out.
        spec: says rank and alpha.
        source: of A.

    Raises:
        SuiteError: a rank above that of a matrix.
    """
    scale, device = scale_of(spec), start[names[0]].device
    values: list[Tensor] = []
    for name in names:
        rows, columns = start[name].shape[:: -1 if stored_transposed else 1]
        if spec.rank > min(rows, columns):
            raise SuiteError(
                f"LoRA's rank {spec.rank} is more than {name!r} of shape "
                f"{tuple(start[name].shape)} can have. Choose a lower rank."
            )
        bound = 1 / math.sqrt(columns)  # Kaiming's with a = √5
        A = (2 * torch.rand(spec.rank, columns, generator=source) - 1) * bound
        values += [A.to(device), torch.zeros(rows, spec.rank, device=device)]
    values = [value.requires_grad_() for value in values]

    def weights(given: list[Tensor]) -> dict[str, Tensor]:
        found = dict(start)
        for name, A, B in zip(names, given[::2], given[1::2], strict=True):
            change = scale * (B @ A)
            found[name] = start[name] + (change.T if stored_transposed else change)
        return found

    return Update(values, [], weights)


def scale_of(spec: FineTuningSpec) -> float:
    """The factor of the product B·A."""
    return (2 * spec.rank if spec.alpha is None else spec.alpha) / spec.rank


def write_adapter(
    values: Sequence[Tensor],
    names: Sequence[str],
    stored_transposed: bool,
    spec: FineTuningSpec,
    base: Checkpoint,
    folder: Path,
) -> None:
    """Write what was trained as an adapter that PEFT opens; always float32, as PEFT trains it.

    Args:
        values: A and B of each weight matrix.
        names: of the weight matrices, as in the base.
        stored_transposed: whether these are stored in x out.
        spec: says rank and alpha.
        base: what it was trained on.
        folder: of the adapter.

    Raises:
        OutputError: it cannot be written.
    """
    known = base_class(base)
    layers = [(known.names or {}).get(name, name).removesuffix(".weight") for name in names]
    state = {
        f"{PREFIX}{layer}.lora_{part}.weight": value.detach().cpu()
        for layer, *pair in zip(layers, values[::2], values[1::2], strict=True)
        for part, value in zip("AB", pair, strict=True)
    }
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": known.task,
        "auto_mapping": known.auto_mapping,
        "base_model_name_or_path": BASE,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": scale_of(spec) * spec.rank,
        "target_modules": layers,
        "bias": "none",
        "fan_in_fan_out": stored_transposed,
        "lora_dropout": 0.0,
    }
    write_weights(state, folder / WEIGHT_FILES[0])
    write_atomically(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
