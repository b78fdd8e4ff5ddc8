"""Ten procedural textures that fill the canvas."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from data.tasks.canvas import SIZE, Ink, Labels, balanced_labels, column, rotated_grid

TEXTURES = (
    "stripes",
    "checks",
    "polka dots",
    "bricks",
    "waves",
    "zigzag",
    "rings",
    "grid",
    "clouds",
    "scales",
)


def _pattern(
    name: str, u: NDArray[np.floating], v: NDArray[np.floating], rng: np.random.Generator
) -> NDArray[np.floating]:
    """Value in about [-1, 1] of a pattern; ``u`` and ``v`` count periods."""
    turn = 2 * np.pi
    match name:
        case "stripes":
            return np.sin(turn * u)
        case "checks":
            return 3 * np.sin(np.pi * u) * np.sin(np.pi * v)
        case "polka dots":
            return 4 * (0.3 - np.hypot(u - np.round(u), v - np.round(v)))
        case "bricks":
            shifted = u / 1.6 + 0.5 * np.mod(np.floor(v), 2)
            joint = np.minimum(np.abs(shifted - np.round(shifted)) * 1.6, np.abs(v - np.round(v)))
            return 6 * (joint - 0.14)
        case "waves":
            return np.sin(turn * (v + 0.35 * np.sin(turn * u * 0.6)))
        case "zigzag":
            return np.sin(turn * (v + np.abs(np.mod(u * 0.8, 1) * 2 - 1)))
        case "rings":
            return np.sin(turn * np.hypot(u, v))
        case "grid":
            return 5 * (0.16 - np.minimum(np.abs(u - np.round(u)), np.abs(v - np.round(v))))
        case "clouds":
            field = gaussian_filter(rng.standard_normal(u.shape), (0, 2.2, 2.2))
            return 1.5 * field / field.std(axis=(1, 2), keepdims=True)
        case "scales":
            row = np.floor(v)
            across = u + 0.5 * np.mod(row, 2)
            arc = np.hypot(across - np.round(across), v - row)
            return 8 * (0.12 - np.abs(arc - 0.55))
    raise ValueError(f"unknown texture {name!r}")


def draw_textures(count: int, rng: np.random.Generator, *, hard: bool) -> tuple[Ink, Labels]:
    """Draw ``count`` textures, classes balanced, in random period, phase and orientation.

    Returns ink (count x 32 x 32) and labels (count,), the positions in ``TEXTURES``.
    """
    labels = balanced_labels(count, len(TEXTURES), rng)
    turn, small, large = (0.5, 4.5, 12.0) if hard else (0.15, 6.5, 9.0)
    period = column(rng.uniform(small, large, count))
    u, v = rotated_grid(
        rng.uniform(-turn, turn, count), rng.uniform(-9, 9, count), rng.uniform(-9, 9, count)
    )
    ink = np.empty((count, SIZE, SIZE), dtype=np.float32)
    for position, name in enumerate(TEXTURES):
        rows = labels == position
        ink[rows] = _pattern(name, u[rows] / period[rows], v[rows] / period[rows], rng)
    return np.clip(0.5 + 0.5 * ink, 0, 1), labels
