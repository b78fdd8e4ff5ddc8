"""Real handwritten digits: scikit-learn's copy of UCI *Optical Recognition of Handwritten Digits*.

The 1797 images (8 x 8, 17 grey levels; 13 writers) carry no writer's name. The splits are
contiguous blocks in file order: if a writer's digits follow one another there, as we assume, only
the writers at the two seams are shared.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from data.tasks.canvas import Ink, Labels, Pose, warp

BLOCKS = {"train": slice(0, 1047), "val": slice(1047, 1297), "test": slice(1297, 1797)}


@cache
def _masters() -> tuple[NDArray[np.floating], Labels]:
    """Enlarge the 8 x 8 images to 64 x 64 (middle 48 pixels): stack 1797 x 64 x 64, labels."""
    digits = load_digits()
    stack = np.zeros((len(digits.images), 64, 64), dtype=np.float32)
    for row, small in enumerate(digits.images):
        image = Image.fromarray(np.asarray(small * (255 / 16), dtype=np.uint8))
        large = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC), dtype=np.float32)
        stack[row, 8:56, 8:56] = np.clip((large / 255 - 0.25) * 2, 0, 1)
    return stack, digits.target.astype(np.int64)


def draw_digits(
    count: int, rng: np.random.Generator, *, hard: bool, split: str
) -> tuple[Ink, Labels]:
    """Draw ``count`` digits of one split's block in random poses.

    Evaluation splits show each image of their block at most once; the training split repeats its
    images in new poses. Returns ink (count x 32 x 32) and labels (count,).
    """
    masters, targets = _masters()
    block = np.arange(len(targets), dtype=np.int64)[BLOCKS[split]]
    if split == "train":
        index = rng.choice(block, count)
    elif count > len(block):
        raise ValueError(f"split {split!r} holds {len(block)} digits, {count} were asked for")
    else:
        index = block[:count]
    return warp(masters, index, Pose(count, rng, hard=hard)), targets[index]
