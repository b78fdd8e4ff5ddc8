"""The loop against torch's own modules and optimiser, and its batches."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from analysis.fine_tuning.examples import Examples, shuffled_batches
from analysis.fine_tuning.schedule import Schedule
from analysis.fine_tuning.train import PART, fine_tune, full_update, loss_and_gradient
from analysis.networks.stateless import ModuleCopies
from analysis.outputs.heads import Head
from merge_core.errors import SuiteError

WIDTH, CLASSES, COUNT = 6, 3, 50


def backbone() -> nn.Sequential:
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, WIDTH))
    return layers.double().eval().requires_grad_(False)


def head() -> Head:
    source = torch.Generator().manual_seed(2)
    weight = torch.randn(CLASSES, WIDTH, generator=source).double()
    return Head(weight, torch.randn(CLASSES, generator=source).double())


def examples() -> Examples:
    source = torch.Generator().manual_seed(3)
    inputs = torch.randn(COUNT, 4, generator=source).double()
    return Examples(lambda numbers: inputs[torch.from_numpy(numbers)], np.arange(COUNT) % CLASSES)


MATRICES = ("0.weight", "3.weight")


@pytest.mark.parametrize("rest", [0.0, 0.1, 1.0])
def test_steps_are_those_of_torch_on_the_whole_batch(rest: float) -> None:
    schedule = Schedule(
        steps=7, batch=2 * PART + 5, rate=1e-2, rest=rest, weight_decay=0.1, warmup=2, clip=0.5
    )
    module, frozen, data = backbone(), head(), examples()
    start = module.state_dict()
    update = full_update(start, list(start), set(MATRICES))
    fine_tune(ModuleCopies(module), update, frozen, data, schedule, np.random.default_rng(4), "it")
    found = update.weights(update.values)

    wanted = copy.deepcopy(module).requires_grad_(True)
    named = dict(wanted.named_parameters())
    groups = [
        {"params": [named[name] for name in MATRICES], "lr": 1e-2},
        {"params": [p for name, p in named.items() if name not in MATRICES], "lr": 1e-2 * rest},
    ]
    moving = [p for group in groups if group["lr"] for p in group["params"]]  # type: ignore[attr-defined]
    optimiser = torch.optim.AdamW([g for g in groups if g["lr"]], weight_decay=0.1)
    rates = [group["lr"] for group in optimiser.param_groups]
    batches = shuffled_batches(COUNT, schedule.batch, np.random.default_rng(4))
    for step in range(7):
        factor = (step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 5))
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        rows = next(batches)
        logits = wanted(data.take(rows)) @ frozen.weight.T + frozen.bias
        optimiser.zero_grad()
        nn.functional.cross_entropy(logits, torch.from_numpy(data.labels[rows])).backward()
        nn.utils.clip_grad_norm_(moving, 0.5)
        optimiser.step()
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
        moved = not torch.equal(value, start[name])
        assert moved == (name in MATRICES or rest > 0)


def test_gradients_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = backbone().float(), examples()
    single = Examples(lambda numbers: data.take(numbers).float(), data.labels)
    frozen = Head(head().weight.float(), head().bias.float())
    found = []
    for workers in (1, 3):
        monkeypatch.setattr("merge_core.executors.local.usual_workers", lambda w=workers: w)
        update = full_update(module.state_dict(), list(module.state_dict()), set(MATRICES))
        loss, slopes = loss_and_gradient(
            ModuleCopies(module), update, frozen, single, np.arange(COUNT), update.values
        )
        found.append((loss, slopes))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_loss_that_is_not_finite_is_refused() -> None:
    module, data = backbone(), examples()
    start = {name: value * math.inf for name, value in module.state_dict().items()}
    update = full_update(start, list(start), set(MATRICES))
    schedule = Schedule(steps=3, batch=8, rate=1e-3)
    with pytest.raises(SuiteError, match=r"'x': the loss is not finite at step 1 of 3\. Choose"):
        fine_tune(
            ModuleCopies(module), update, head(), data, schedule, np.random.default_rng(0), "'x'"
        )


def test_every_pass_has_each_example_once() -> None:
    batches = shuffled_batches(10, 4, np.random.default_rng(0))
    seen = np.concatenate([next(batches) for _ in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    larger = next(shuffled_batches(3, 8, np.random.default_rng(0)))
    assert np.bincount(larger).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_short_texts_come_first() -> None:
    texts = Examples(lambda numbers: torch.empty(0), np.zeros(4), np.array([5, 2, 9, 2]))
    assert texts.sort(np.array([2, 3, 0, 1])).tolist() == [3, 1, 0, 2]
