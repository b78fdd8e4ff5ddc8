"""Linear classifiers as pictures: templates, class means, the stationary solution, roughness.

A template is one class's row of weights. It is compared in the space of the images as the
network sees them, that is normalised. The bias is no part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.networks.stateless import State
from analysis.outputs.pool_outputs import PoolEvaluator, PoolSplit, tensors_of
from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import PoolError
from merge_core.progress import Progress

# What templates are compared with: key, and what it says.
COMPARISONS = {
    "means": "class means μ_c",
    "centred_means": "class means minus overall mean, μ_c − μ",
    "stationary": "stationary prediction from the model's own errors",
}


def templates(weights: State, channels: int, size: int) -> np.ndarray:
    """Rows of a linear classifier as images.

    Args:
        weights: holds ``head.weight``, classes x (channels · size · size), channel by channel.
        channels: colour channels of the images.
        size: pixels along a side.

    Returns:
        float64, classes x size x size x channels, in units of weights.

    Raises:
        PoolError: no such weight, or one of another width.

    Source: arXiv:2411.09263, section 3.

    Example:
        >>> templates({"head.weight": torch.zeros(10, 3 * 16)}, channels=3, size=4).shape
        (10, 4, 4, 3)
    """
    weight = weights.get("head.weight")
    if weight is None or weight.ndim != 2 or weight.shape[1] != channels * size**2:
        raise PoolError(
            f"These weights hold no linear classifier of {size} x {size} images with {channels} "
            "channels ('head.weight'). Choose a pool of linear classifiers."
        )
    return _pictures(weight.double(), channels, size)


def _pictures(rows: Tensor, channels: int, size: int) -> np.ndarray:
    return rows.reshape(-1, channels, size, size).permute(0, 2, 3, 1).numpy()


def image_shape(evaluator: PoolEvaluator) -> tuple[int, int]:
    """Channels, and pixels along a side, of the images of a pool of linear classifiers.

    Raises:
        PoolError: another architecture, or missing data.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> image_shape(PoolEvaluator(load_pool("digits-linear")))
        (1, 16)
    """
    pool = evaluator.pool
    if pool.spec.architecture.name != "linear":
        raise PoolError(
            f"The models of the pool {pool.name!r} ({pool.spec.family}) have no templates. "
            "Choose a pool of linear classifiers."
        )
    _, channels, height, _ = evaluator.images("train").shape
    return channels, height


def pool_templates(evaluator: PoolEvaluator, weights: State) -> np.ndarray:
    """:func:`templates` of weights of a pool: float64, classes x H x W x C.

    Raises:
        PoolError: another architecture, missing data, or weights that do not fit.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-linear"))
        >>> pool_templates(evaluator, evaluator.weights(0)).shape
        (10, 16, 16, 1)
    """
    channels, size = image_shape(evaluator)
    return templates(weights, channels, size)


class ClassMeans(NamedTuple):
    """Means of the training images as the network sees them (normalised).

    Attributes:
        means: μ_c, float64, classes x H x W x C.
        overall: μ, the mean of all images, H x W x C.
        shares: each class's share of the images, classes.
    """

    means: np.ndarray
    overall: np.ndarray
    shares: np.ndarray

    @property
    def centred(self) -> np.ndarray:
        """μ_c − μ."""
        return self.means - self.overall


def class_means(evaluator: PoolEvaluator) -> ClassMeans:
    """Mean training image of each class, and of all.

    Raises:
        PoolError: another architecture, missing data, or a class without training images.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> found = class_means(PoolEvaluator(load_pool("digits-linear")))
        >>> found.means.shape, round(float(found.shares.sum()), 6)
        ((10, 16, 16, 1), 1.0)
    """
    channels, size = image_shape(evaluator)
    hits, pixels = _hits(evaluator), evaluator.images("train").flatten(1).double()
    counts = hits.sum(dim=0)
    if bool((counts == 0).any()):
        raise PoolError(
            f"{evaluator.pool.path}: the training images lack the class "
            f"{evaluator.class_names[int(counts.argmin())]!r}. Give data with every class."
        )
    means = hits.T @ pixels / counts[:, None]
    return ClassMeans(
        _pictures(means, channels, size),
        _pictures(pixels.mean(dim=0), channels, size)[0],
        (counts / len(pixels)).numpy(),
    )


def _hits(evaluator: PoolEvaluator) -> Tensor:
    """1[y_i = c] of the training images, float64, N x classes."""
    labels = torch.from_numpy(evaluator.labels("train"))
    classes = len(evaluator.class_names)
    if int(labels.max()) >= classes:
        raise PoolError(
            f"{evaluator.pool.path}: the training labels go up to {int(labels.max())}, but the "
            f"test data name {classes} classes. Give data with the same classes in all splits."
        )
    return torch.nn.functional.one_hot(labels, classes).double()


def stationary_templates(
    evaluator: PoolEvaluator, weights: State, weight_decay: float
) -> np.ndarray:
    """What the templates would be if training had reached a point without gradient.

    W_c = (1/(d·n)) Σ_i (1[y_i = c] − p_ic) x_i over the n training images, with the
    probabilities p of these very weights. At such a point it gives the templates back; for large
    d, with the biases at their optimum, p_ic is nearly the class share π_c and so
    W_c ≈ (π_c/d) (μ_c − μ).

    Args:
        evaluator: of a pool of linear classifiers.
        weights: of one of them.
        weight_decay: d > 0, added to the gradient as d·W (stochastic gradient descent's form).

    Returns:
        float64, classes x H x W x C.

    Raises:
        PoolError: no weight decay, another architecture, missing data, unfit weights.

    Source: [derived] ∂/∂W_c of mean cross-entropy + (d/2)‖W‖² set to zero.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-linear"))
        >>> stationary_templates(evaluator, evaluator.weights(0), weight_decay=0.1).shape
        (10, 16, 16, 1)
    """
    if not weight_decay > 0:
        raise PoolError(
            "Without weight decay training has no stationary template; choose a model with decay."
        )
    channels, size = image_shape(evaluator)
    errors = _hits(evaluator)
    p = evaluator.run(weights, "train", torch.float64).logits.softmax(dim=1)
    pixels = evaluator.images("train").flatten(1).double()
    rows = (errors - p).T @ pixels / (weight_decay * len(pixels))
    return _pictures(rows, channels, size)


def centre_templates(images: np.ndarray) -> np.ndarray:
    """Templates minus their mean over classes, W_c − W̄.

    [derived] One vector added to all rows adds x·v to every logit of an image, which changes
    neither prediction nor probability: only W_c − W̄ is determined by what the model predicts.

    Args:
        images: classes x H x W x C.

    Example:
        >>> centre_templates(np.array([1.0, 3.0]).reshape(2, 1, 1, 1)).ravel().tolist()
        [-1.0, 1.0]
    """
    return images - images.mean(axis=0)


def cosine_frame(A: np.ndarray, B: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    """Cosine of each image of one set with each of another.

    Args:
        A: classes x H x W x C, such as templates.
        B: same shape, such as class means.
        names: one per class.

    Returns:
        One row per ordered pair: first (class of A), second (class of B), cosine in [−1, 1],
        0 where an image is zero.

    Example:
        >>> images = np.eye(2).reshape(2, 1, 2, 1)
        >>> cosine_frame(images, -images, ["cat", "dog"])["cosine"].abs().tolist()
        [1.0, 0.0, 0.0, 1.0]
    """
    cosine = _cosines(A, B)
    return pd.DataFrame(
        {
            "first": np.repeat(np.asarray(list(names), dtype=object), len(B)),
            "second": np.tile(np.asarray(list(names), dtype=object), len(A)),
            "cosine": cosine.ravel(),
        }
    )


def _cosines(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    rows, columns = A.reshape(len(A), -1), B.reshape(len(B), -1)
    norms = np.outer(np.linalg.norm(rows, axis=1), np.linalg.norm(columns, axis=1))
    products = rows @ columns.T
    cosine = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
    return np.clip(cosine, -1, 1)


class Dominance(NamedTuple):
    """How far a square matrix of cosines is a diagonal one.

    Attributes:
        diagonal: mean of the diagonal.
        off_diagonal: mean of all other entries (0 for one class).
        largest: share of rows whose largest entry is the one on the diagonal.
    """

    diagonal: float
    off_diagonal: float
    largest: float


def diagonal_dominance(frame: pd.DataFrame) -> Dominance:
    """Summary of :func:`cosine_frame`, for names that differ.

    Example:
        >>> images = np.eye(2).reshape(2, 1, 2, 1)
        >>> diagonal_dominance(cosine_frame(images, images, ["cat", "dog"]))
        Dominance(diagonal=1.0, off_diagonal=0.0, largest=1.0)
    """
    classes = round(len(frame) ** 0.5)
    return _dominance(frame["cosine"].to_numpy().reshape(classes, classes))


def _dominance(cosine: np.ndarray) -> Dominance:
    diagonal = np.diagonal(cosine)
    others = cosine.size - len(cosine)
    rest = float((cosine.sum() - diagonal.sum()) / others) if others else 0.0
    largest = float((diagonal >= cosine.max(axis=1)).mean())
    return Dominance(float(diagonal.mean()), rest, largest)


def roughness(images: np.ndarray) -> float:
    """Geary's C of neighbouring pixels, mean over images and channels.

    C = mean of (w_p − w_q)² over horizontal and vertical neighbours, divided by twice the sample
    variance of the pixels. It is 1 on average when pixels are shuffled, near 0 for smooth
    images, above 1 where neighbours tend to have opposite signs; it does not change with scale.

    Args:
        images: count x H x W x C, at least two pixels.

    Returns:
        The mean over channels that are not constant; NaN where all are.

    Source: Geary, The Incorporated Statistician 5 (1954), 115.

    Example:
        >>> board = np.indices((8, 8)).sum(axis=0) % 2
        >>> slope = np.tile(np.arange(8.0), (8, 1))
        >>> roughness(board[None, :, :, None]) > 1 > roughness(slope[None, :, :, None])
        True
    """
    images = np.asarray(images, dtype=np.float64)
    across, down = np.diff(images, axis=2), np.diff(images, axis=1)
    pairs = across[0, :, :, 0].size + down[0, :, :, 0].size
    square = (across**2).sum(axis=(1, 2)) + (down**2).sum(axis=(1, 2))
    variance = images.var(axis=(1, 2), ddof=1)
    varied = variance > 0
    if not varied.any():
        return float("nan")
    return float((square[varied] / pairs / (2 * variance[varied])).mean())


def decay_frame(evaluator: PoolEvaluator, progress: Progress | None = None) -> pd.DataFrame:
    """What weight decay does to templates: one measurement for each member.

    Args:
        evaluator: of a pool of linear classifiers.
        progress: told after each member.

    Returns:
        One row per member and comparison: member, seed, weight_decay, epoch, comparison (key of
        :data:`COMPARISONS`; "stationary" only where there is decay), diagonal, off_diagonal and
        largest (see :class:`Dominance`; cosines of the templates with that), norm (mean over
        classes of a template's norm), roughness (of :func:`roughness`), val_accuracy,
        test_accuracy.

    Raises:
        MergeScopeError: another architecture, unfit or unreadable weights or data.
        Cancelled: by `progress`.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> frame = decay_frame(PoolEvaluator(load_pool("digits-linear")))
        >>> norms = frame.groupby("weight_decay")["norm"].mean()
        >>> bool(norms.iloc[0] > norms.iloc[-1])  # decay makes templates small
        True
    """
    pool = evaluator.pool
    moments = [(i, m.epochs, pool.member(i)) for i, m in enumerate(pool.spec.members)]
    return _measure(evaluator, moments, progress)


def training_frame(evaluator: PoolEvaluator, progress: Progress | None = None) -> pd.DataFrame:
    """The measurements of :func:`decay_frame` along training: one for each snapshot.

    Raises:
        MergeScopeError: as there, or no member has snapshots.
        Cancelled: by `progress`.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> frame = training_frame(PoolEvaluator(load_pool("digits-linear")))
        >>> sorted(frame["epoch"].unique().tolist())
        [0.0, 1.0, 5.0, 20.0, 80.0, 400.0]
    """
    pool = evaluator.pool
    moments = [
        (i, snapshot.epoch, pool.snapshot(i, index))
        for i, member in enumerate(pool.spec.members)
        for index, snapshot in enumerate(member.trajectory)
    ]
    if not moments:
        raise PoolError(f"The pool {pool.name!r} has no snapshots along training.")
    return _measure(evaluator, moments, progress)


def _measure(
    evaluator: PoolEvaluator,
    moments: Sequence[tuple[int, float | None, Checkpoint]],
    progress: Progress | None,
) -> pd.DataFrame:
    means = class_means(evaluator)
    rows = []
    for done, (number, epoch, checkpoint) in enumerate(moments, start=1):
        member = evaluator.pool.spec.members[number]
        weights = tensors_of(checkpoint)
        images = pool_templates(evaluator, weights)
        common = {
            "member": number,
            "seed": member.seed,
            "weight_decay": member.weight_decay,
            "epoch": epoch,
        }
        measured = {
            "norm": float(np.linalg.norm(images.reshape(len(images), -1), axis=1).mean()),
            "roughness": roughness(images),
            "val_accuracy": _accuracy(evaluator, weights, "val"),
            "test_accuracy": _accuracy(evaluator, weights, "test"),
        }
        for comparison, others in _compare(evaluator, weights, member.weight_decay, means):
            dominance = _dominance(_cosines(images, others))
            rows.append({**common, "comparison": comparison, **dominance._asdict(), **measured})
        if progress is not None:
            progress.step(done, len(moments), f"member {number}")
    return pd.DataFrame(rows)


def _compare(
    evaluator: PoolEvaluator, weights: State, decay: float | None, means: ClassMeans
) -> Iterator[tuple[str, np.ndarray]]:
    yield "means", means.means
    yield "centred_means", means.centred
    if decay:
        yield "stationary", stationary_templates(evaluator, weights, decay)


def _accuracy(evaluator: PoolEvaluator, weights: State, split: PoolSplit) -> float:
    # Not kept on disk: what would be kept of a linear model are the pixels themselves.
    predicted = evaluator.run(weights, split).logits.argmax(dim=1).numpy()
    return float((predicted == evaluator.labels(split)).mean())
