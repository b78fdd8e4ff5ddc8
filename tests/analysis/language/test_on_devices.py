"""Language models say the same on an accelerator, whatever its memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis.evaluation.evaluator import Evaluator
from analysis.language import network
from analysis.outputs.prediction_store import PredictionStore
from merge_core import devices
from merge_core.devices import Device
from merge_core.suites.suite import Suite
from tests.analysis.language.test_outputs import CLOSE, make_suite
from tests.fake_accelerator import There, fake, only

REAL = [device for device in devices.find_devices() if device.accelerates]
MEASURES = ("cross_entropy", "divergence", "entropy")


@pytest.fixture(autouse=True)
def positions_are_made_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(There, "lenient", True)


def measure(suite: Suite, path: Path) -> Any:
    evaluator = Evaluator(suite, PredictionStore(path))
    images = evaluator.outputs.images(suite.tasks, "val")
    return evaluator.measure_member(suite.expert("sums"), images, "val", MEASURES)


def short_of_memory(texts: int, tensors: int) -> Callable[[Tensor], None]:
    """Room for so many texts at once, and for so many tensors of two dimensions or more."""
    held = 0

    def room(tensor: Tensor) -> None:
        nonlocal held
        if not tensor.is_floating_point():
            if tensor.ndim == 2 and tensor.shape[1] > 1 and len(tensor) > texts:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        elif tensor.ndim > 1:
            held += 1
            if held > tensors:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    return room


@pytest.mark.parametrize("stored", [False, True], ids=["float32", "as stored"])
@pytest.mark.parametrize(
    "make",
    [
        fake,
        lambda: fake(room=short_of_memory(2, 10**6)),
        lambda: fake(room=short_of_memory(0, 10**6)),
        lambda: fake(room=short_of_memory(10, 3)),
        *(lambda device=device: device for device in REAL),
    ],
    ids=["fits", "two texts", "no text", "no weights", *(device.name for device in REAL)],
)
def test_measures_are_those_of_the_cpu(
    make: Callable[[], Device], stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, _ = make_suite(tmp_path, "llama", {"val_share": 0.5})
    if stored:
        monkeypatch.setattr(network, "FLOAT32_ELEMENTS", 0)
    here = measure(suite, tmp_path / "here.sqlite")
    with only(make()):
        there = measure(suite, tmp_path / "there.sqlite")
    for task in suite.tasks:
        for name in MEASURES:
            np.testing.assert_allclose(there[task][name], here[task][name], atol=CLOSE)
