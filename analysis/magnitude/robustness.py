"""Accuracy under noise on the weights and under corruption of the images, soup beside members.

The norm-restored soup is the control: it has the members' norms, so what it gains over them is
not the smaller norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.averaging.soups import (
    Statistics,
    mean_norms,
    predict_classes,
    reestimate_batchnorm,
    restore_norms,
    uniform_soup,
)
from analysis.networks.stateless import State
from analysis.outputs.inputs import normalise_pixels
from analysis.outputs.pool_outputs import PoolEvaluator, PoolSplit
from merge_core.errors import PoolError
from merge_core.executors.base import one_thread
from merge_core.executors.local import Threads
from merge_core.progress import Progress

Corruption = Literal["noise", "blur", "contrast", "brightness", "occlusion", "rotation"]
CORRUPTIONS: dict[Corruption, str] = {
    "noise": "Gaussian noise (standard deviation, share of the range)",
    "blur": "Gaussian blur (standard deviation, pixels)",
    "contrast": "lower contrast (factor about each image's mean)",
    "brightness": "brightness (shift, share of the range)",
    "occlusion": "a grey square (side, share of the image's)",
    "rotation": "rotation (degrees, either way)",
}
# Strength at severities 0 (clean) to 5, in the units above.
LEVELS: dict[Corruption, tuple[float, ...]] = {
    "noise": (0, 0.05, 0.1, 0.15, 0.22, 0.3),
    "blur": (0, 0.5, 0.75, 1.0, 1.4, 2.0),
    "contrast": (1, 0.75, 0.5, 0.35, 0.2, 0.1),
    "brightness": (0, 0.1, 0.2, 0.3, 0.4, 0.5),
    "occlusion": (0, 0.2, 0.3, 0.4, 0.5, 0.6),
    "rotation": (0, 8, 15, 25, 35, 50),
}
GREY = 128


def soup_states(
    evaluator: PoolEvaluator, members: Sequence[int], statistics: Statistics = "average"
) -> dict[str, State]:
    """The uniform soup ("uniform_soup") and the same at the members' mean norms ("norm_restored").

    Raises:
        MergeScopeError: unreadable or unfit members, or statistics that cannot be re-estimated.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-mlp-shared"))
        >>> soup, restored = soup_states(evaluator, [0, 1]).values()
        >>> bool(soup["head.weight"].norm() < restored["head.weight"].norm())
        True
    """
    soup = uniform_soup(evaluator, members)
    states = {
        "uniform_soup": soup,
        "norm_restored": restore_norms(soup, mean_norms(evaluator, members)),
    }
    if statistics == "reestimate":
        return {name: reestimate_batchnorm(evaluator, state) for name, state in states.items()}
    return dict(states)


def noise_like(weights: State, names: Sequence[str], seed: int) -> dict[str, Tensor]:
    """Standard normal noise for each named tensor, float32, the same for every model.

    Example:
        >>> noise = noise_like({"weight": torch.zeros(2, 3)}, ["weight"], seed=0)
        >>> noise["weight"].shape
        torch.Size([2, 3])
    """
    source = torch.Generator().manual_seed(seed)
    return {name: torch.randn(weights[name].shape, generator=source) for name in names}


@one_thread()
def weight_noise_sweep(
    evaluator: PoolEvaluator,
    members: Sequence[int],
    sigmas: Sequence[float],
    seeds: Sequence[int] = (0, 1, 2),
    split: PoolSplit = "test",
    relative: bool = True,
    statistics: Statistics = "average",
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Accuracy of θ + σ·r·ε, ε standard normal for every parameter, r a scale per tensor.

    Args:
        evaluator: of the pool.
        members: member numbers.
        sigmas: strengths, at least 0.
        seeds: of ε; models, strengths and both kinds of scale share it.
        split: which images.
        relative: r is the root mean square of the model's own tensor. False: that of the
            members' tensors together, so that soup and members receive the same noise.
        statistics: of the soups' BatchNorm, before noise.
        progress: told after each model.

    Returns:
        One row per strength and subject ("individuals": mean over members, "uniform_soup",
        "norm_restored"): sigma, subject, accuracy (mean over seeds), low, high (least and most
        over seeds), deviation (standard deviation over seeds), non_finite (share of images with
        logits that are not finite, counted as wrong).

    Raises:
        PoolError: strengths below 0, no seeds, unknown members.
        MergeScopeError: unreadable or unfit weights or data.
        Cancelled: by `progress`.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-linear"))
        >>> frame = weight_noise_sweep(evaluator, [0, 1], sigmas=[0.0, 5.0], seeds=[0])
        >>> soup = frame[frame["subject"] == "uniform_soup"]["accuracy"].tolist()
        >>> soup[0] > soup[1]
        True
    """
    if not seeds or any(sigma < 0 for sigma in sigmas):
        raise PoolError("Noise needs strengths of at least 0 and at least one seed. Correct them.")
    chosen = evaluator.pool.select(members)
    soups = soup_states(evaluator, chosen, statistics)
    names = [name for name, _ in evaluator.network.module.named_parameters()]
    noises = [noise_like(soups["uniform_soup"], names, seed) for seed in seeds]
    together = {name: np.sqrt(_mean_square(evaluator, chosen, name)) for name in names}
    rows: list[tuple[float, str, int, float, float]] = []
    total = len(sigmas) * len(seeds) * (len(chosen) + len(soups))
    units = (
        (float(sigma), subject, seed, weights, noise)
        for sigma in sigmas
        for seed, noise in zip(seeds, noises, strict=True)
        for subject, weights in _models(evaluator, chosen, soups)
    )

    def measure(
        unit: tuple[float, str, int, State, State],
    ) -> tuple[float, str, int, float, float]:
        sigma, subject, seed, weights, noise = unit
        scale = {name: _rms(weights[name]) for name in names} if relative else together
        noisy = {n: weights[n] + sigma * scale[n] * noise[n] for n in names}
        logits = evaluator.run({**weights, **noisy}, split).logits
        return sigma, subject, seed, *_score(logits, evaluator.labels(split))

    for row in Threads().map(measure, units):
        rows.append(row)
        if progress is not None:
            progress.step(len(rows), total, f"σ = {row[0]:.3g}, {row[1]}")
    frame = pd.DataFrame(rows, columns=["sigma", "subject", "seed", "accuracy", "non_finite"])
    by_seed = frame.groupby(["sigma", "subject", "seed"], sort=False).mean().reset_index()
    return by_seed.groupby(["sigma", "subject"], sort=False, as_index=False).agg(
        accuracy=("accuracy", "mean"),
        low=("accuracy", "min"),
        high=("accuracy", "max"),
        deviation=("accuracy", lambda values: float(np.std(values))),
        non_finite=("non_finite", "mean"),
    )


def _rms(value: Tensor) -> float:
    return float(value.double().square().mean().sqrt())


def _mean_square(evaluator: PoolEvaluator, members: Sequence[int], name: str) -> float:
    return float(np.mean([_rms(evaluator.pool.member(i).tensor(name)) ** 2 for i in members]))


def _models(
    evaluator: PoolEvaluator, members: Sequence[int], soups: Mapping[str, State]
) -> Iterator[tuple[str, State]]:
    """Subject and weights, members read one at a time."""
    for number in members:
        yield "individuals", evaluator.weights(number)
    yield from soups.items()


def _score(logits: Tensor, labels: np.ndarray) -> tuple[float, float]:
    """Accuracy, and the share of images with logits that are not finite (wrong)."""
    lost = ~logits.isfinite().all(dim=1)
    return float(np.mean(predict_classes(logits) == labels)), float(lost.double().mean())


def corrupt(images: np.ndarray, corruption: Corruption, severity: int, seed: int = 0) -> np.ndarray:
    """Images as a bad camera would give them.

    Args:
        images: uint8, N x H x W x channels.
        corruption: see :data:`CORRUPTIONS`.
        severity: 0 (the clean images) to 5; strengths in :data:`LEVELS`.
        seed: of noise, positions and directions.

    Returns:
        uint8, of the same shape.

    Raises:
        PoolError: unknown corruption or severity.

    Source: in the manner of Hendrycks and Dietterich, arXiv:1903.12261; the strengths are ours,
    for images of some 20 pixels.

    Example:
        >>> corrupt(np.full((1, 2, 2, 1), 100, np.uint8), "brightness", 1).ravel().tolist()
        [126, 126, 126, 126]
    """
    if corruption not in LEVELS or not 0 <= severity < len(LEVELS[corruption]):
        raise PoolError(
            f"There is no corruption {corruption!r} of severity {severity}. Choose one of "
            f"{', '.join(LEVELS)}, from 0 to 5."
        )
    if severity == 0:
        return images
    level = LEVELS[corruption][severity]
    changed = _CHANGES[corruption](images.astype(float), level, np.random.default_rng(seed))
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)


def _noise(images: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    return images + 255 * level * rng.standard_normal(images.shape)


def _blur(images: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:  # noqa: ARG001
    from scipy import ndimage  # late, as in `_rotation`: it takes a while

    return ndimage.gaussian_filter(images, level, axes=(1, 2), mode="nearest")


def _contrast(images: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:  # noqa: ARG001
    mean = images.mean(axis=(1, 2, 3), keepdims=True)
    return mean + level * (images - mean)


def _brightness(images: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:  # noqa: ARG001
    return images + 255 * level


def _occlusion(images: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    N, H, W, _ = images.shape
    height, width = max(1, round(level * H)), max(1, round(level * W))
    top = rng.integers(0, H - height + 1, N)[:, None, None]
    left = rng.integers(0, W - width + 1, N)[:, None, None]
    y, x = np.arange(H)[:, None], np.arange(W)
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    return np.where(inside[..., None], GREY, images)


def _rotation(images: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    from scipy import ndimage

    either = rng.random(len(images)) < 0.5
    turned = images.copy()
    for angle, some in ((level, either), (-level, ~either)):
        turned[some] = ndimage.rotate(
            images[some], angle, axes=(2, 1), reshape=False, order=1, mode="nearest"
        )
    return turned


_CHANGES: dict[Corruption, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "occlusion": _occlusion,
    "rotation": _rotation,
}


@one_thread()
def corruption_sweep(
    evaluator: PoolEvaluator,
    members: Sequence[int],
    corruption: Corruption,
    severities: Sequence[int] = (0, 1, 2, 3, 4, 5),
    split: PoolSplit = "test",
    statistics: Statistics = "average",
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Accuracy on corrupted images: members, soups and the logit ensemble.

    Args:
        evaluator: of the pool.
        members: member numbers.
        corruption: see :data:`CORRUPTIONS`; applied to the images as stored.
        severities: 0 (the clean images) to 5.
        split: which images.
        statistics: of the soups' BatchNorm (re-estimated on clean training images).
        seed: of the corruption; all models see the same images.
        progress: told after each model.

    Returns:
        One row per severity and subject ("individuals", "uniform_soup", "norm_restored",
        "logit_ensemble"): severity, level (strength in the unit of :data:`CORRUPTIONS`),
        subject, accuracy (individuals: mean), low, high (individuals: least and most; others:
        the accuracy), non_finite (share of images with logits that are not finite, counted as
        wrong).

    Raises:
        PoolError: unknown corruption, severity or members.
        MergeScopeError: unreadable or unfit weights or data.
        Cancelled: by `progress`.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-linear"))
        >>> frame = corruption_sweep(evaluator, [0, 1], "noise", severities=[0, 5])
        >>> frame[frame["subject"] == "logit_ensemble"]["level"].tolist()
        [0.0, 0.3]
    """
    chosen = evaluator.pool.select(members)
    soups = soup_states(evaluator, chosen, statistics)
    labels, data = evaluator.labels(split), evaluator.pool.spec.data
    total = len(severities) * (len(chosen) + len(soups))
    rows = []
    done = 0
    for severity in severities:
        raw = corrupt(evaluator.inputs(split).images, corruption, severity, seed)
        images = normalise_pixels(raw, data.mean, data.std)
        ensemble = torch.zeros((), dtype=torch.float64)
        scores: dict[str, list[tuple[float, float]]] = {}

        def measure(model: tuple[str, State], images: Tensor = images) -> tuple[str, Tensor]:
            return model[0], evaluator.network.outputs(model[1], images).logits

        for subject, logits in Threads().map(measure, _models(evaluator, chosen, soups)):
            evaluator.forward_images += len(images)
            scores.setdefault(subject, []).append(_score(logits, labels))
            if subject == "individuals":
                ensemble = ensemble + logits.double() / len(chosen)
            done += 1
            if progress is not None:
                progress.step(done, total, f"severity {severity}, {subject}")
        scores["logit_ensemble"] = [_score(ensemble, labels)]
        for subject, pairs in scores.items():
            accuracy, lost = np.array(pairs).T
            rows.append(
                {
                    "severity": severity,
                    "level": LEVELS[corruption][severity],
                    "subject": subject,
                    "accuracy": float(accuracy.mean()),
                    "low": float(accuracy.min()),
                    "high": float(accuracy.max()),
                    "non_finite": float(lost.mean()),
                }
            )
    return pd.DataFrame(rows)
