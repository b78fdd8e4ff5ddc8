"""Drawing on stacks of small canvases: coordinates, strokes and affine warps, all vectorised.

An *ink* array is float32 N x 32 x 32 in [0, 1]: how much ink lies on each pixel, before any colour.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIZE = 32

Ink = NDArray[np.floating]
Labels = NDArray[np.int64]
Images = NDArray[np.uint8]


def balanced_labels(count: int, classes: int, rng: np.random.Generator) -> Labels:
    """Return int64 (count,) labels whose class counts differ by at most one, in random order."""
    return rng.permutation(np.arange(count, dtype=np.int64) % classes)


def pixel_grid() -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Return x and y (each 1 x 32 x 32) of the pixel centres, in pixels from the middle."""
    axis = np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return x[None], y[None]


def ink_of_distance(distance: NDArray[np.floating], width: float = 1.0) -> Ink:
    """Ink of a region from its signed distance in pixels (negative inside), one pixel soft."""
    return np.clip(0.5 - distance / width, 0, 1).astype(np.float32)


def column(values: NDArray[np.floating] | NDArray[np.bool_]) -> NDArray[np.floating]:
    """Shape (N,) -> (N, 1, 1), to broadcast one value per canvas over its pixels."""
    return np.asarray(values, dtype=np.float32)[:, None, None]


def distance_to_segment(
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    start: tuple[float | NDArray[np.floating], float | NDArray[np.floating]],
    end: tuple[float | NDArray[np.floating], float | NDArray[np.floating]],
) -> NDArray[np.floating]:
    """Distance of every point (x, y) to a segment that is not a point; its ends broadcast."""
    ex, ey = end[0] - start[0], end[1] - start[1]
    px, py = x - start[0], y - start[1]
    along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
    return np.hypot(px - along * ex, py - along * ey)


def rotated_grid(
    angle: NDArray[np.floating], dx: NDArray[np.floating], dy: NDArray[np.floating]
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Coordinates (N x 32 x 32 each) in a frame moved by (dx, dy) and turned by ``angle``."""
    x, y = pixel_grid()
    x, y = x - column(dx), y - column(dy)
    c, s = column(np.cos(angle)), column(np.sin(angle))
    return x * c + y * s, y * c - x * s


def warp(masters: NDArray[np.floating], index: Labels, pose: Pose) -> Ink:
    """Place masters on canvases by an affine map with bilinear sampling.

    ``masters`` is M x H x H (ink outside is 0), ``index`` (N,) says which one each canvas shows,
    ``pose`` holds one placement per canvas. Returns N x 32 x 32. One master spans the whole canvas
    at scale 1.
    """
    height = masters.shape[-1]
    padded = np.pad(masters, ((0, 0), (1, 1), (1, 1)))
    u, v = rotated_grid(pose.angle, pose.dx, pose.dy)
    u = u + column(pose.shear) * v
    ratio = height / (SIZE * column(pose.scale))
    u = np.clip(u * ratio + (height + 1) / 2, 0, height + 0.999)
    v = np.clip(v * ratio + (height + 1) / 2, 0, height + 0.999)
    i, j = v.astype(np.int64), u.astype(np.int64)
    a, b = (v - i).astype(np.float32), (u - j).astype(np.float32)
    n = index[:, None, None]
    top = padded[n, i, j] * (1 - b) + padded[n, i, j + 1] * b
    bottom = padded[n, i + 1, j] * (1 - b) + padded[n, i + 1, j + 1] * b
    return np.clip(top * (1 - a) + bottom * a, 0, 1).astype(np.float32)


class Pose:
    """One random placement per canvas: angle (rad), scale, shear, shift (pixels)."""

    def __init__(self, count: int, rng: np.random.Generator, *, hard: bool) -> None:
        turn, small, large, shear, shift = (
            (0.38, 0.62, 1.15, 0.25, 3.5) if hard else (0.10, 0.88, 1.06, 0.06, 1.5)
        )
        self.angle = rng.uniform(-turn, turn, count)
        self.scale = rng.uniform(small, large, count)
        self.shear = rng.uniform(-shear, shear, count)
        self.dx = rng.uniform(-shift, shift, count)
        self.dy = rng.uniform(-shift, shift, count)
