"""Signs made of a few places that are on or off: seven-segment digits and letters of Braille."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.tasks.canvas import (
    Ink,
    Labels,
    balanced_labels,
    column,
    distance_to_segment,
    ink_of_distance,
    rotated_grid,
)

DIGITS = tuple("0123456789AbCdEF")
# Segments a to g of the usual naming: top, right above, right below, bottom, left below, left
# above, middle.
LIT = (
    *("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg"),
    *("abcefg", "fgcde", "afed", "bcdeg", "afged", "afge"),
)
ENDS = {
    "a": (-1, -2, 1, -2),
    "b": (1, -2, 1, 0),
    "c": (1, 0, 1, 2),
    "d": (-1, 2, 1, 2),
    "e": (-1, 0, -1, 2),
    "f": (-1, -2, -1, 0),
    "g": (-1, 0, 1, 0),
}

BRAILLE = tuple("abcdefghijklmnopqrstuvwxyz")
# Dots 1 to 3 go down on the left, 4 to 6 on the right.
RAISED = (
    *("1", "12", "14", "145", "15", "124", "1245", "125", "24", "245"),
    *("13", "123", "134", "1345", "135", "1234", "12345", "1235", "234", "2345"),
    *("136", "1236", "2456", "1346", "13456", "1356"),
)


def _pose(
    count: int, rng: np.random.Generator, *, hard: bool
) -> tuple[NDArray[np.floating], NDArray[np.floating], NDArray[np.floating]]:
    """x and y in a moved and turned frame, in units of half a sign's width, and that width."""
    turn, small, large, shift = (0.3, 3.6, 6.4, 3.5) if hard else (0.08, 5.0, 6.2, 1.5)
    unit = column(rng.uniform(small, large, count))
    x, y = rotated_grid(
        rng.uniform(-turn, turn, count),
        rng.uniform(-shift, shift, count),
        rng.uniform(-shift, shift, count),
    )
    return x / unit, y / unit, unit


def draw_segments(count: int, rng: np.random.Generator, *, hard: bool) -> tuple[Ink, Labels]:
    """Draw ``count`` seven-segment signs, 0 to F, classes balanced, a few of them leaning.

    Returns ink (count x 32 x 32) and labels (count,), the positions in ``DIGITS``.
    """
    labels = balanced_labels(count, len(DIGITS), rng)
    x, y, unit = _pose(count, rng, hard=hard)
    x = x + column(rng.uniform(0, 0.15, count)) * y
    thick = column(rng.uniform(0.7, 1.5, count))
    ink = np.zeros(x.shape, dtype=np.float32)
    for name, (x0, y0, x1, y1) in ENDS.items():
        rows = np.array([name in LIT[label] for label in labels])
        away = distance_to_segment(x[rows], y[rows], (x0, y0), (x1, y1))
        ink[rows] = np.maximum(ink[rows], ink_of_distance(away * unit[rows] - thick[rows]))
    return ink, labels


def draw_braille(count: int, rng: np.random.Generator, *, hard: bool) -> tuple[Ink, Labels]:
    """Draw ``count`` letters of Braille, classes balanced; places that are not raised are rings.

    Returns ink (count x 32 x 32) and labels (count,), the positions in ``BRAILLE``.
    """
    labels = balanced_labels(count, len(BRAILLE), rng)
    x, y, unit = _pose(count, rng, hard=hard)
    radius = column(rng.uniform(0.5, 0.65, count))
    ink = np.zeros(x.shape, dtype=np.float32)
    x, y = x * 1.12, y * 1.12  # the dots reach further than segments do
    for place in range(6):
        raised = np.array([str(place + 1) in RAISED[label] for label in labels])
        away = np.hypot(x - (2 * (place // 3) - 1) * 0.9, y - 1.7 * (place % 3 - 1))
        disc = (away - radius) * unit
        hint = np.abs(disc + 0.5) - 0.5
        ink = np.maximum(ink, ink_of_distance(np.where(column(raised) > 0, disc, hint)))
    return ink, labels
