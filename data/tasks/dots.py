"""Counting: one to eight separate dots."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.tasks.canvas import SIZE, Ink, Labels, balanced_labels, ink_of_distance, pixel_grid

COUNTS = tuple(str(n) for n in range(1, 9))


def _place(
    number: int, radii: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Find ``number`` centres (number x 2) with at least two blank pixels between any two dots."""
    centres = np.empty((0, 2))
    tries = 0
    while len(centres) < number:
        reach = SIZE / 2 - radii[len(centres)] - 1
        candidate = rng.uniform(-reach, reach, 2)
        gap = np.hypot(*(centres - candidate).T) - radii[: len(centres)] - radii[len(centres)]
        if (gap > 2.2).all():
            centres = np.vstack([centres, candidate])
        tries += 1
        if tries > 300:  # a crowded start: begin again
            centres, tries = np.empty((0, 2)), 0
    return centres


def draw_dots(count: int, rng: np.random.Generator, *, hard: bool) -> tuple[Ink, Labels]:
    """Draw ``count`` canvases of 1 to 8 dots, classes balanced.

    Returns ink (count x 32 x 32) and labels (count,): label c means c + 1 dots.
    """
    labels = balanced_labels(count, len(COUNTS), rng)
    small, large = (1.4, 3.4) if hard else (2.2, 3.0)
    x, y = pixel_grid()
    ink = np.zeros((count, SIZE, SIZE), dtype=np.float32)
    for row, label in enumerate(labels):
        number = int(label) + 1
        radii = rng.uniform(small, large, number)
        centres = _place(number, radii, rng)
        dx = x - centres[:, 0, None, None].astype(np.float32)
        dy = y - centres[:, 1, None, None].astype(np.float32)
        distance = np.hypot(dx, dy) - radii[:, None, None].astype(np.float32)
        ink[row] = ink_of_distance(distance).max(axis=0)
    return ink, labels
