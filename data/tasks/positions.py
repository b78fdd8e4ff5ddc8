"""Relative position: on which side of a ring a disc lies."""

from __future__ import annotations

import numpy as np

from data.tasks.canvas import Ink, Labels, balanced_labels, column, ink_of_distance, pixel_grid
from data.tasks.pointers import DIRECTIONS


def draw_positions(count: int, rng: np.random.Generator, *, hard: bool) -> tuple[Ink, Labels]:
    """Draw ``count`` pairs of a large ring and a small disc outside it, classes balanced.

    The disc lies in the class's direction from the ring, at most 9 (hard: 14) degrees off; the
    ring lies near the middle. Returns ink (count x 32 x 32) and labels (count,), the
    positions in ``DIRECTIONS``.
    """
    labels = balanced_labels(count, len(DIRECTIONS), rng)
    off, small, large = (14.0, 4.0, 6.5) if hard else (9.0, 5.0, 6.0)
    angle = np.deg2rad(45 * labels + rng.uniform(-off, off, count))
    ring, disc = rng.uniform(small, large, count), rng.uniform(2.2, 3.2, count)
    apart = ring + disc + rng.uniform(3.2, 4.8, count)
    direction = np.stack([np.sin(angle), -np.cos(angle)])
    # The pair's box reaches from the ring's far side to the disc's; a third of what is left is for
    # moving.
    first = np.minimum(-ring, apart * direction - disc)
    last = np.maximum(ring, apart * direction + disc)
    room = np.maximum(30.0 - (last - first), 0)
    corner = rng.uniform(-1 / 6, 1 / 6, (2, count)) * room - (first + last) / 2
    x, y = pixel_grid()

    def distance(place: np.ndarray) -> np.ndarray:
        return np.hypot(x - column(place[0]), y - column(place[1]))

    circle = np.abs(distance(corner) - column(ring)) - 0.9
    spot = distance(corner + apart * direction) - column(disc)
    return ink_of_distance(np.minimum(circle, spot)), labels
