"""Loops: Lissajous figures, told apart by how often they swing across and down."""

from __future__ import annotations

import numpy as np

from data.tasks.canvas import SIZE, Ink, Labels, balanced_labels, column, rotated_grid

RATIOS = ((1, 1), (1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2), (3, 4))
LOOPS = tuple(f"{across}:{down}" for across, down in RATIOS)
POINTS = 200


def draw_loops(count: int, rng: np.random.Generator, *, hard: bool) -> tuple[Ink, Labels]:
    """Draw ``count`` closed curves x = sin(a s + p), y = sin(b s), classes balanced.

    Phases keep a quarter of a turn's distance from those at which a curve folds onto itself.
    Returns ink (count x 32 x 32) and labels (count,), the positions in ``LOOPS``.
    """
    labels = balanced_labels(count, len(RATIOS), rng)
    turn, small, large, shift = (0.2, 8.0, 14.0, 2.5) if hard else (0.08, 11.0, 13.5, 1.2)
    across, down = np.array(RATIOS)[labels].T
    # sin(a s + p) over sin(b s) retraces itself where b p is a multiple of pi / 2 or of pi.
    phase = np.where((across + down) % 2, 0.0, np.pi / 2) / down
    phase = phase + rng.uniform(-0.35, 0.35, count) / down
    s = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)[:, None]
    half, stretch = rng.uniform(small, large, count), rng.uniform(0.85, 1.0, count)
    px, py = half * np.sin(across * s + phase), half * stretch * np.sin(down * s)
    x, y = rotated_grid(
        rng.uniform(-turn, turn, count),
        rng.uniform(-shift, shift, count),
        rng.uniform(-shift, shift, count),
    )
    away = np.full((count, SIZE, SIZE), np.inf, dtype=np.float32)
    for ax, ay in zip(px, py, strict=True):
        np.minimum(away, (x - column(ax)) ** 2 + (y - column(ay)) ** 2, out=away)
    width = column(rng.uniform(0.5, 0.9, count))
    # Points lie up to two pixels apart: half a pixel more closes the gaps.
    return np.clip(1.0 + width - np.sqrt(away), 0, 1).astype(np.float32), labels
