"""Things that point: the hour on a clock's face, and arrows in eight directions."""

from __future__ import annotations

import numpy as np

from data.tasks.canvas import (
    Ink,
    Labels,
    balanced_labels,
    column,
    distance_to_segment,
    ink_of_distance,
    rotated_grid,
)

HOURS = tuple(f"{hour} o'clock" for hour in (12, *range(1, 12)))
DIRECTIONS = (
    *("north", "north-east", "east", "south-east"),
    *("south", "south-west", "west", "north-west"),
)


def draw_clocks(count: int, rng: np.random.Generator, *, hard: bool) -> tuple[Ink, Labels]:
    """Draw ``count`` clocks on the full hour, classes balanced, at most 5 degrees off.

    The long hand points up, the short one at the hour; the rim is a ring of varying strength.
    Returns ink (count x 32 x 32) and labels (count,), the positions in ``HOURS``.
    """
    labels = balanced_labels(count, len(HOURS), rng)
    turn, small, large, shift = (0.14, 9.5, 15.0, 2.5) if hard else (0.05, 12.5, 14.5, 1.0)
    radius = column(rng.uniform(small, large, count))
    x, y = rotated_grid(
        rng.uniform(-turn, turn, count),
        rng.uniform(-shift, shift, count),
        rng.uniform(-shift, shift, count),
    )
    rim = np.abs(np.hypot(x, y) - radius) - column(rng.uniform(0.4, 0.9, count))
    ink = ink_of_distance(rim) * column(rng.uniform(0.4, 1.0, count))
    hour = np.deg2rad(30 * labels + rng.uniform(-5, 5, count))
    for angle, length, width in ((0 * hour, 0.85, 0.6), (hour, 0.55, 1.3)):
        u, v = np.sin(column(angle)) * radius * length, -np.cos(column(angle)) * radius * length
        hand = distance_to_segment(x, y, (0, 0), (u, v)) - width
        ink = np.maximum(ink, ink_of_distance(hand))
    return ink, labels


def draw_arrows(count: int, rng: np.random.Generator, *, hard: bool) -> tuple[Ink, Labels]:
    """Draw ``count`` arrows, classes balanced, at most 8 (hard: 12) degrees off their direction.

    Returns ink (count x 32 x 32) and labels (count,), the positions in ``DIRECTIONS``.
    """
    labels = balanced_labels(count, len(DIRECTIONS), rng)
    off, short, long, shift = (12.0, 6.0, 12.0, 4.0) if hard else (8.0, 9.0, 12.0, 2.0)
    x, y = rotated_grid(
        np.deg2rad(45 * labels + rng.uniform(-off, off, count)),
        rng.uniform(-shift, shift, count),
        rng.uniform(-shift, shift, count),
    )
    half = column(rng.uniform(short, long, count))
    head = half * column(rng.uniform(0.5, 0.8, count))
    width = column(rng.uniform(0.7, 1.4, count))
    away = distance_to_segment(x, y, (0, half), (0, -half))
    for side in (-1, 1):
        barb = distance_to_segment(x, y, (0, -half), (side * head * 0.7, head - half))
        away = np.minimum(away, barb)
    return ink_of_distance(away - width), labels
