"""Phases of the moon, as they are seen from the northern half of the earth."""

from __future__ import annotations

import numpy as np

from data.tasks.canvas import Ink, Labels, balanced_labels, column, ink_of_distance, rotated_grid

PHASES = (
    *("new", "waxing crescent", "first quarter", "waxing gibbous"),
    *("full", "waning gibbous", "last quarter", "waning crescent"),
)


def draw_moons(count: int, rng: np.random.Generator, *, hard: bool) -> tuple[Ink, Labels]:
    """Draw ``count`` moons, classes balanced, at most 10 degrees off their phase; the rim is drawn.

    Returns ink (count x 32 x 32) and labels (count,), the positions in ``PHASES``.
    """
    labels = balanced_labels(count, len(PHASES), rng)
    turn, small, large, shift = (0.45, 6.5, 13.5, 4.0) if hard else (0.2, 10.0, 13.0, 1.8)
    radius = column(rng.uniform(small, large, count))
    x, y = rotated_grid(
        rng.uniform(-turn, turn, count),
        rng.uniform(-shift, shift, count),
        rng.uniform(-shift, shift, count),
    )
    phase = np.deg2rad(45 * labels + rng.uniform(-10, 10, count))
    disc = np.hypot(x, y) - radius
    # The terminator is half an ellipse; the lit side is the right one up to the full moon.
    border = column(np.cos(phase)) * np.sqrt(np.maximum(radius**2 - y**2, 0))
    side = column(np.where(np.mod(phase, 2 * np.pi) < np.pi, 1.0, -1.0))
    lit = np.maximum(disc, border - side * x)
    rim = np.abs(disc + 0.6) - 0.6
    return ink_of_distance(np.minimum(lit, rim)), labels
