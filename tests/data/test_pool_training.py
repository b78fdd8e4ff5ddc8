"""Training: its steps against a float64 reference, its schedules, and its refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from analysis.outputs.inputs import normalise_pixels
from data.pool_images import normaliser
from data.pool_presets import PAPER, PAPER_TINY
from data.pool_training import Training, shift_randomly, state_of, train
from merge_core.errors import Cancelled, PoolError
from merge_core.progress import Progress

CPU = torch.device("cpu")
MEAN, STD = (0.2, 0.5), (0.25, 0.5)


def toy(count: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """uint8 images, count x 2 x 3 x 3, and labels of 3 classes."""
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (count, 2, 3, 3), dtype=np.uint8))
    return images, torch.from_numpy(np.arange(count) % 3)


def affine(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(18, 3))


def run(network: nn.Module, plan: Training, seed: int = 0, **options: object) -> dict[int, dict]:
    images, labels = toy()
    normalise = normaliser(MEAN, STD, CPU)
    return train(network, images, labels, normalise, plan, seed, CPU, **options)  # type: ignore[arg-type]


def test_sgd_agrees_with_a_float64_reference_and_biases_do_not_decay() -> None:
    plan = Training(
        4,
        batch=12,
        rate=0.3,
        optimiser="sgd",
        weight_decay=0.2,
        schedule="steps",
        milestones=(0.5,),
    )
    network = affine()
    W = network[1].weight.detach().double().numpy()  # type: ignore[index]
    b = network[1].bias.detach().double().numpy()  # type: ignore[index]
    images, labels = toy()
    shift, scale = (np.array(c)[None, :, None, None] for c in (MEAN, STD))
    X = ((images.double().numpy() / 255 - shift) / scale).reshape(12, -1)
    Y = np.eye(3)[labels.numpy()]
    vW, vb = np.zeros_like(W), np.zeros_like(b)
    for rate in (0.3, 0.3, 0.03, 0.03):
        scores = np.exp(X @ W.T + b)
        error = (scores / scores.sum(1, keepdims=True) - Y) / 12
        vW = 0.9 * vW + error.T @ X + 0.2 * W
        vb = 0.9 * vb + error.sum(0)
        W, b = W - rate * vW, b - rate * vb
    run(network, plan)
    state = network.state_dict()
    np.testing.assert_allclose(state["1.weight"].numpy(), W, atol=2e-5)
    np.testing.assert_allclose(state["1.bias"].numpy(), b, atol=2e-5)


@pytest.mark.parametrize(
    ("plan", "epochs", "expected"),
    [
        (PAPER, range(0, 20), 1e-2),
        (PAPER, range(20, 40), 1e-3),
        (PAPER, range(40, 60), 1e-4),
        (PAPER, range(60, 80), 1e-5),
        (PAPER, range(80, 100), 1e-6),
        (PAPER_TINY, range(0, 5), 1e-2),
        (PAPER_TINY, range(5, 10), 1e-3),
    ],
)
def test_the_papers_steps_come_at_the_right_epochs(
    plan: Training, epochs: range, expected: float
) -> None:
    for epoch in epochs:
        for within in (0.0, 0.99):  # a step falls between epochs, never within one
            rate = plan.rate_at((epoch + within) / plan.epochs)
            assert rate == pytest.approx(expected, rel=1e-12), epoch


def test_cosine_rises_then_falls_to_zero() -> None:
    plan = Training(1, rate=0.5)
    rates = [plan.rate_at(step / 1000) for step in range(1000)]
    top = int(np.argmax(rates))
    assert top == 50
    assert rates[top] == pytest.approx(0.5)
    assert rates == sorted(rates[: top + 1]) + sorted(rates[top + 1 :], reverse=True)
    assert np.abs(np.diff(rates)).max() < 0.01  # without a jump
    assert 0 < rates[-1] < 1e-5
    assert plan.rate_at(0.525) == pytest.approx(0.25)  # half-way down


def test_the_seed_determines_everything() -> None:
    plan = Training(3, batch=5, shift=1, weight_decay=0.01)
    first, again, other = (run(affine(), plan, seed, snapshots=[3])[3] for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["1.weight"], other["1.weight"])


def test_snapshots_are_copies_along_training() -> None:
    plan = Training(4, batch=4, rate=0.05)
    start = state_of(affine())
    network = affine()
    kept = run(network, plan, snapshots=[0, 2, 4])
    assert list(kept) == [0, 2, 4]
    assert all(torch.equal(kept[0][name], start[name]) for name in start)
    assert not torch.equal(kept[2]["1.weight"], kept[4]["1.weight"])
    assert torch.equal(kept[4]["1.weight"], network.state_dict()["1.weight"])
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_training_mode_only_while_training() -> None:
    class Watch(nn.Linear):
        seen: list[bool]

        def forward(self, value: Tensor) -> Tensor:
            self.seen.append(self.training)
            return super().forward(value)

    layer = Watch(18, 3)
    layer.seen = []
    run(nn.Sequential(nn.Flatten(), layer).eval(), Training(1))
    assert layer.seen == [True]
    assert not layer.training


def test_a_lone_last_image_does_not_break_batch_normalisation() -> None:
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(18), nn.Linear(18, 3))
    run(network, Training(2, batch=11))
    assert int(network.state_dict()["1.num_batches_tracked"]) == 2


def test_clipping_bounds_a_step() -> None:
    network = affine()
    before = state_of(network)
    run(network, Training(1, 12, 1.0, "sgd", momentum=0.0, schedule="steps", clip=0.01))
    moved = [network.state_dict()[name] - value for name, value in before.items()]
    assert math.sqrt(sum(float(m.square().sum()) for m in moved)) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("most", [0, 1, 2])
def test_shifts_are_crops_of_the_image_with_its_edge_repeated(most: int) -> None:
    images = torch.randn(20, 2, 6, 5, generator=torch.Generator().manual_seed(0))
    moved = shift_randomly(images, most, torch.Generator().manual_seed(1)).numpy()
    moves = set()
    for image, result in zip(images.numpy(), moved, strict=True):
        padded = np.pad(image, ((0, 0), (most, most), (most, most)), mode="edge")
        crops = {
            (i, j): padded[:, i : i + 6, j : j + 5]
            for i in range(2 * most + 1)
            for j in range(2 * most + 1)
        }
        found = [at for at, crop in crops.items() if np.array_equal(crop, result)]
        assert found
        moves.add(found[0])
    assert len(moves) == 1 if most == 0 else len(moves) > 4


def test_normalisation_is_that_of_evaluation() -> None:
    images, _ = toy()
    other = normalise_pixels(images.permute(0, 2, 3, 1).numpy(), MEAN, STD)
    assert torch.equal(normaliser(MEAN, STD, CPU)(images), other)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(PoolError, match="learning rate"):
        run(affine(), Training(3, 4, 1e38, "sgd", schedule="steps"))


def test_progress_and_cancelling() -> None:
    seen: list[tuple[int, int, str]] = []
    run(affine(), Training(3), progress=Progress(lambda *step: seen.append(step)), label="x")
    assert seen == [(1, 3, "x"), (2, 3, "x"), (3, 3, "x")]

    progress = Progress()
    cancel: Callable[..., None] = lambda *_: progress.cancel.set()  # noqa: E731
    progress.listener = cancel
    with pytest.raises(Cancelled):
        run(affine(), Training(3), progress=progress)
