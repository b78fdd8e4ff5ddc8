"""Noise and corruption against loops over single images and models."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from analysis.averaging.soups import mean_norms, reestimate_batchnorm, restore_norms, uniform_soup
from analysis.magnitude.robustness import (
    CORRUPTIONS,
    LEVELS,
    corrupt,
    corruption_sweep,
    noise_like,
    soup_states,
    weight_noise_sweep,
)
from analysis.outputs.inputs import normalise_pixels
from analysis.outputs.pool_outputs import PoolEvaluator
from merge_core.errors import Cancelled, PoolError
from merge_core.progress import Progress
from tests.pools import write_pool

MEMBERS = (0, 1, 2)


@pytest.fixture(scope="module")
def vgg(tmp_path_factory) -> PoolEvaluator:
    return PoolEvaluator(write_pool(tmp_path_factory.mktemp("pools") / "vgg", "vgg"))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> PoolEvaluator:
    return PoolEvaluator(write_pool(tmp_path_factory.mktemp("pools") / "r", "resnet"))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(60, 200, (12, 14, 10, 3), dtype=np.uint8)


def share(evaluator: PoolEvaluator, state, images=None) -> float:
    images = evaluator.images("test") if images is None else images
    logits = evaluator.network.outputs(state, images).logits
    return float(np.mean(logits.argmax(dim=1).numpy() == evaluator.labels("test")))


@pytest.mark.parametrize("relative", [True, False])
def test_noise_is_what_it_says(vgg, relative: bool) -> None:
    frame = weight_noise_sweep(vgg, MEMBERS, [0.0, 0.3], (4, 5), relative=relative)
    soup = uniform_soup(vgg, MEMBERS)
    names = [name for name, _ in vgg.network.module.named_parameters()]
    states = {
        "individuals": [vgg.weights(i) for i in MEMBERS],
        "uniform_soup": [soup],
        "norm_restored": [restore_norms(soup, mean_norms(vgg, MEMBERS))],
    }
    assert list(dict.fromkeys(frame["subject"])) == list(states)
    for subject, models in states.items():
        clean, noisy = (
            frame[(frame["subject"] == subject) & (frame["sigma"] == sigma)].iloc[0]
            for sigma in (0.0, 0.3)
        )
        assert clean["accuracy"] == pytest.approx(np.mean([share(vgg, s) for s in models]))
        assert clean["deviation"] == 0
        by_seed = []
        for seed in (4, 5):
            accuracies = []
            for state in models:
                epsilon = noise_like(state, names, seed)
                other = {}
                for name, value in state.items():
                    own = [value] if relative else [s[name] for s in states["individuals"]]
                    r = np.sqrt(np.mean(np.square([w.numpy() for w in own])))
                    other[name] = value + 0.3 * float(r) * epsilon[name]
                accuracies.append(share(vgg, other))
            by_seed.append(np.mean(accuracies))
        assert noisy["accuracy"] == pytest.approx(np.mean(by_seed))
        assert noisy["low"] == pytest.approx(min(by_seed))
        assert noisy["high"] == pytest.approx(max(by_seed))
        assert noisy["deviation"] == pytest.approx(np.std(by_seed))
        assert noisy["low"] <= noisy["accuracy"] <= noisy["high"]


def test_noise_moves_predictions_and_spares_statistics(resnet) -> None:
    frame = weight_noise_sweep(resnet, MEMBERS, [0.0, 1e20], (0,))
    assert frame[frame["sigma"] == 0]["non_finite"].max() == 0
    assert frame[frame["sigma"] > 0]["non_finite"].min() > 0.9
    assert frame[frame["sigma"] > 0]["accuracy"].max() < 0.1
    again = weight_noise_sweep(resnet, MEMBERS, [0.5], (1, 2))
    assert again.equals(weight_noise_sweep(resnet, MEMBERS, [0.5], (1, 2)))
    epsilon = noise_like(resnet.weights(0), ["conv1.weight"], 3)["conv1.weight"]
    assert epsilon.std() == pytest.approx(1, abs=0.2)
    assert torch.equal(epsilon, noise_like(resnet.weights(1), ["conv1.weight"], 3)["conv1.weight"])


def test_statistics_of_soups_are_a_choice(resnet) -> None:
    soup = uniform_soup(resnet, MEMBERS)
    states = soup_states(resnet, MEMBERS, "reestimate")
    assert torch.equal(states["uniform_soup"]["fc.weight"], soup["fc.weight"])
    expected = reestimate_batchnorm(resnet, soup)["bn1.running_var"]
    assert torch.equal(states["uniform_soup"]["bn1.running_var"], expected)
    assert not torch.equal(expected, soup["bn1.running_var"])
    norms = {n: float(v.norm()) for n, v in states["norm_restored"].items() if v.ndim > 1}
    wanted = mean_norms(resnet, MEMBERS)
    assert norms == pytest.approx({n: wanted[n] for n in norms}, rel=1e-5)


@pytest.mark.parametrize("corruption", list(CORRUPTIONS))
def test_corruption_grows_from_the_clean_images(images, corruption) -> None:
    assert corrupt(images, corruption, 0) is images
    distances = []
    for severity in range(1, 6):
        changed = corrupt(images, corruption, severity, seed=7)
        assert changed.dtype == np.uint8
        assert changed.shape == images.shape
        assert np.array_equal(changed, corrupt(images, corruption, severity, seed=7))
        distances.append(np.abs(changed.astype(float) - images).mean())
    # Noise of pixels: turning further cannot make them more different than unrelated.
    assert distances[0] > 0.5
    if corruption != "rotation":
        assert (np.diff(distances) > 0).all()


def test_corruptions_are_their_definitions(images) -> None:
    pixels = images.astype(float)
    brighter = corrupt(images, "brightness", 2)
    assert np.array_equal(brighter, np.minimum(pixels + 51, 255).astype(np.uint8))
    for i, flat in enumerate(corrupt(images, "contrast", 3)):
        mean = pixels[i].mean()
        expected = mean + LEVELS["contrast"][3] * (pixels[i] - mean)
        assert np.abs(flat - expected).max() <= 0.5 + 1e-9
    noise = corrupt(np.full((50, 20, 20, 1), 128, np.uint8), "noise", 2, seed=1) - 128.0
    assert noise.std() == pytest.approx(255 * LEVELS["noise"][2], rel=0.02)
    blurred = corrupt(images, "blur", 3)
    assert blurred.astype(float).var() < 0.3 * pixels.var()
    assert blurred.mean() == pytest.approx(images.mean(), abs=1.5)
    # Neighbouring images and channels do not mix.
    lone = np.zeros((3, 9, 9, 3), np.uint8)
    lone[1, 4, 4, 1] = 255
    seen = np.argwhere(corrupt(lone, "blur", 5))
    assert set(seen[:, 0]) == {1}
    assert set(seen[:, 3]) == {1}


def test_occlusion_is_one_square_in_each_image(images) -> None:
    white = np.full((30, 20, 20, 3), 255, np.uint8)
    places = set()
    for image in corrupt(white, "occlusion", 3, seed=2):
        rows, columns, _ = np.nonzero(image != 255)
        assert np.ptp(rows) + 1 == np.ptp(columns) + 1 == 8
        assert (image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] == 128).all()
        assert (image != 255).sum() == 8 * 8 * 3
        places.add((rows.min(), columns.min()))
    assert len(places) > 10


def test_rotation_is_pillows_either_way() -> None:
    gradient = np.linspace(20, 230, 24)[None, :, None] + np.zeros((24, 24, 1))
    batch = np.repeat(gradient[None].astype(np.uint8), 20, axis=0)
    turned = corrupt(batch, "rotation", 3, seed=0).astype(float)
    middle = slice(7, 17)
    picture = Image.fromarray(batch[0, :, :, 0])
    ways = [
        np.asarray(picture.rotate(angle, resample=Image.Resampling.BILINEAR), dtype=float)
        for angle in (25, -25)
    ]
    which = []
    for image in turned:
        gaps = [np.abs(image[middle, middle, 0] - way[middle, middle]).max() for way in ways]
        assert min(gaps) < 4
        which.append(int(np.argmin(gaps)))
    assert set(which) == {0, 1}


def test_corruption_sweep_scores_each_model(tmp_path: Path) -> None:
    # An MLP, whose members disagree more than the convolutional networks of these tests.
    evaluator = PoolEvaluator(write_pool(tmp_path / "mlp", "mlp"))
    frame = corruption_sweep(evaluator, MEMBERS, "noise", (0, 4), seed=3)
    raw = evaluator.inputs("test").images
    data = evaluator.pool.spec.data
    soup = uniform_soup(evaluator, MEMBERS)
    for severity in (0, 4):
        images = normalise_pixels(corrupt(raw, "noise", severity, 3), data.mean, data.std)
        members = [share(evaluator, evaluator.weights(i), images) for i in MEMBERS]
        part = frame[frame["severity"] == severity].set_index("subject")
        individuals = part.loc["individuals"]
        assert individuals["accuracy"] == pytest.approx(np.mean(members))
        assert (individuals["low"], individuals["high"]) == (min(members), max(members))
        assert part.loc["uniform_soup", "accuracy"] == share(evaluator, soup, images)
        restored = restore_norms(soup, mean_norms(evaluator, MEMBERS))
        assert part.loc["norm_restored", "accuracy"] == share(evaluator, restored, images)
        logits = [evaluator.network.outputs(evaluator.weights(i), images).logits for i in MEMBERS]
        mean = torch.stack(logits).mean(dim=0).argmax(dim=1).numpy()
        ensemble = part.loc["logit_ensemble", "accuracy"]
        assert ensemble == np.mean(mean == evaluator.labels("test"))
        assert set(part["level"]) == {LEVELS["noise"][severity]}
    assert frame["non_finite"].max() == 0


def test_wrong_choices_and_cancelling(vgg, images) -> None:
    for corruption, severity in (("fog", 1), ("noise", 6), ("noise", -1)):
        with pytest.raises(PoolError, match="Choose one of noise, blur"):
            corrupt(images, corruption, severity)
    for sigmas, seeds in (([-0.1], (0,)), ([0.1], ())):
        with pytest.raises(PoolError, match="at least one seed"):
            weight_noise_sweep(vgg, MEMBERS, sigmas, seeds)
    seen: list[tuple[int, int]] = []
    progress = Progress(lambda done, total, label: seen.append((done, total)))
    weight_noise_sweep(vgg, (0, 1), [0.1], (0, 1), progress=progress)
    assert seen == [(done, 8) for done in range(1, 9)]
    seen.clear()
    corruption_sweep(vgg, (0, 1), "blur", (0, 1), progress=progress)
    assert seen == [(done, 8) for done in range(1, 9)]
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        weight_noise_sweep(vgg, MEMBERS, [0.1], progress=Progress(cancel=cancel))
    with pytest.raises(Cancelled):
        corruption_sweep(vgg, MEMBERS, "blur", progress=Progress(cancel=cancel))
