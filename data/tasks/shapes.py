"""Ten shapes from signed distances and polar outlines, filled or drawn as a contour."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.tasks.canvas import Ink, Labels, balanced_labels, column, ink_of_distance, rotated_grid

SHAPES = (
    "circle",
    "triangle",
    "square",
    "pentagon",
    "hexagon",
    "star",
    "cross",
    "heart",
    "crescent",
    "flower",
)


def _polygon(x: NDArray[np.floating], y: NDArray[np.floating], sides: int) -> NDArray[np.floating]:
    """Signed distance to a regular polygon of circumradius 1 with a corner on top."""
    step = 2 * np.pi / sides
    angle = np.mod(np.arctan2(x, -y) + step / 2, step) - step / 2
    return np.hypot(x, y) * np.cos(step / 2 - np.abs(angle)) - np.cos(step / 2)


def _distance(shape: str, x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.floating]:
    """Approximate signed distance of a shape of radius about 1 (negative inside)."""
    radius, angle = np.hypot(x, y), np.arctan2(x, -y)
    match shape:
        case "circle":
            return radius - 0.9
        case "triangle":
            return _polygon(x, y - 0.2, 3)
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - 0.78
        case "pentagon":
            return _polygon(x, y, 5)
        case "hexagon":
            return _polygon(x, y, 6)
        case "star":
            fold = np.abs(np.mod(angle + np.pi / 5, 2 * np.pi / 5) - np.pi / 5)
            px, py = radius * np.sin(fold), radius * np.cos(fold)
            # The edge runs from the tip (0, 1) to the notch at radius 0.45, angle pi / 5.
            nx, ny = 0.45 * np.sin(np.pi / 5), 0.45 * np.cos(np.pi / 5)
            return ((py - 1) * nx + px * (1 - ny)) / np.hypot(nx, 1 - ny)
        case "cross":
            a, b = np.abs(x), np.abs(y)
            return np.minimum(np.maximum(a - 0.32, b - 0.95), np.maximum(b - 0.32, a - 0.95))
        case "heart":
            a, b = np.abs(x), -(y - 0.1)
            lobes = np.hypot(a - 0.42, b - 0.32) - 0.5
            point = np.maximum((a - 0.95 * b - 0.95) * 0.72, b - 0.35)
            return np.minimum(lobes, point)
        case "crescent":
            return np.maximum(radius - 0.95, 0.75 - np.hypot(x - 0.45, y))
        case "flower":
            return (radius - (0.68 + 0.27 * np.cos(6 * angle))) * 0.6
    raise ValueError(f"unknown shape {shape!r}")


def draw_shapes(count: int, rng: np.random.Generator, *, hard: bool) -> tuple[Ink, Labels]:
    """Draw ``count`` shapes, classes balanced; about half of them as contours.

    Returns ink (count x 32 x 32) and labels (count,), the positions in ``SHAPES``.
    """
    labels = balanced_labels(count, len(SHAPES), rng)
    turn, small, large, shift = (0.45, 6.0, 13.0, 4.5) if hard else (0.15, 10.0, 12.5, 2.0)
    radius = rng.uniform(small, large, count)
    x, y = rotated_grid(
        rng.uniform(-turn, turn, count),
        rng.uniform(-shift, shift, count),
        rng.uniform(-shift, shift, count),
    )
    x, y = x / column(radius), y / column(radius)
    ink = np.empty(x.shape, dtype=np.float32)
    for position, shape in enumerate(SHAPES):
        rows = labels == position
        ink[rows] = _distance(shape, x[rows], y[rows])
    distance = ink * column(radius)
    outline = rng.random(count) < 0.5
    stroke = column(rng.uniform(1.4, 2.4, count))
    contour = np.abs(distance + stroke / 2) - stroke / 2
    return ink_of_distance(np.where(column(outline) > 0, contour, distance)), labels
