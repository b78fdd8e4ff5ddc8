"""Signs made of a few places that are on or off: seven-segment and dot-matrix digits."""

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

NUMERALS = tuple("0123456789")
# Five columns and seven rows of dots a numeral, row after row.
MATRIX = (
    *("01110 10001 10011 10101 11001 10001 01110", "00100 01100 00100 00100 00100 00100 01110"),
    *("01110 10001 00001 00110 01000 10000 11111", "01110 10001 00001 00110 00001 10001 01110"),
    *("00010 00110 01010 10010 11111 00010 00010", "11111 10000 11110 00001 00001 10001 01110"),
    *("00110 01000 10000 11110 10001 10001 01110", "11111 00001 00010 00100 01000 01000 01000"),
    *("01110 10001 10001 01110 10001 10001 01110", "01110 10001 10001 01111 00001 00010 01100"),
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


def draw_matrix(count: int, rng: np.random.Generator, *, hard: bool) -> tuple[Ink, Labels]:
    """Draw ``count`` numerals of five by seven dots, classes balanced.

    Returns ink (count x 32 x 32) and labels (count,), the positions in ``NUMERALS``.
    """
    labels = balanced_labels(count, len(NUMERALS), rng)
    x, y, unit = _pose(count, rng, hard=hard)
    radius = column(rng.uniform(0.17, 0.24, count))
    lit = np.array([list(rows.replace(" ", "")) for rows in MATRIX]) == "1"
    ink = np.zeros(x.shape, dtype=np.float32)
    for place in range(35):
        rows = lit[labels, place]
        away = np.hypot(x[rows] - (place % 5 - 2) / 2, y[rows] - (place // 5 - 3) * 0.55)
        dot = ink_of_distance((away - radius[rows]) * unit[rows])
        ink[rows] = np.maximum(ink[rows], dot)
    return ink, labels
