"""Orientation of a bar, in twelve steps of 15 degrees."""

from __future__ import annotations

import numpy as np

from data.tasks.canvas import Ink, Labels, balanced_labels, column, ink_of_distance, rotated_grid

STEP_DEGREES = 15
ORIENTATIONS = tuple(f"{angle}°" for angle in range(0, 180, STEP_DEGREES))


def draw_lines(count: int, rng: np.random.Generator, *, hard: bool) -> tuple[Ink, Labels]:
    """Draw ``count`` bars, classes balanced, at most 4 (hard: 5) degrees off their class's angle.

    Angles are counted anticlockwise from the horizontal. Returns ink (count x 32 x 32) and labels
    (count,), the positions in ``ORIENTATIONS``.
    """
    labels = balanced_labels(count, len(ORIENTATIONS), rng)
    off, short, long, shift = (5.0, 5.0, 13.0, 5.0) if hard else (4.0, 9.0, 13.0, 2.5)
    degrees = labels * STEP_DEGREES + rng.uniform(-off, off, count)
    x, y = rotated_grid(
        -np.deg2rad(degrees),
        rng.uniform(-shift, shift, count),
        rng.uniform(-shift, shift, count),
    )
    half_length = column(rng.uniform(short, long, count))
    half_width = column(rng.uniform(0.8, 2.0, count))
    along = np.maximum(np.abs(x) - half_length, 0)
    return ink_of_distance(np.hypot(along, y) - half_width), labels
