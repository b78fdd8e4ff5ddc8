"""The image tasks of the bundled pools: real digits, and three that are drawn.

Which images a task holds is determined by the seed; every split has a random stream of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from data.pool_images import SPLITS, ImageTask, Split, check_disjoint, pixel_constants
from data.tasks import TASKS, stream
from data.tasks.canvas import Images, Ink
from data.tasks.digits import BLOCKS
from data.tasks.glyphs import LETTERS, draw_glyphs
from data.tasks.shapes import SHAPES, draw_shapes
from data.tasks.styles import clean_style

DIGITS_SIZE, INK_SIZE, COLOUR_SIZE, NOISY_SIZE = 16, 20, 20, 24
NOISE = 0.45  # standard deviation, of the full scale
TEN_LETTERS = LETTERS[:10]
PAPERS = {task.name: task.paper for task in TASKS}


@dataclass(frozen=True)
class Sizes:
    """How many images the drawn tasks hold (the digits are always all of them)."""

    train: int = 1000
    val: int = 400
    noisy_train: int = 3000
    noisy_shipped: int = 400
    noisy_val: int = 500
    test: int = 500


def digits(sizes: Sizes, seed: int) -> ImageTask:
    """All 1797 real digits of scikit-learn, 8 x 8 enlarged to 16 x 16, one channel.

    The splits are the contiguous blocks of :mod:`data.tasks.digits`; `sizes` and `seed` have no
    part in them.
    """
    del sizes, seed
    source = load_digits()
    small = np.rint(source.images * (255 / 16)).astype(np.uint8)
    images = resize(small[..., None], DIGITS_SIZE)
    labels = source.target.astype(np.int64)
    splits = {name: (images[block], labels[block]) for name, block in BLOCKS.items()}
    names = tuple(str(digit) for digit in source.target_names)
    return _task("digits", "Handwritten digits", names, splits)


def noisy_letters(sizes: Sizes, seed: int) -> ImageTask:
    """All capitals in 15 faces on the ruled paper of the bundled suite, under strong noise.

    24 x 24, three channels; the noise is added after the change of size, which would average it.
    """

    def draw(count: int, rng: np.random.Generator) -> Split:
        ink, labels = draw_glyphs(LETTERS, count, rng, hard=False)
        clear = resize(clean_style(ink, PAPERS["letters"], rng), NOISY_SIZE)
        noise = NOISE * 255 * rng.standard_normal(clear.shape, dtype=np.float32)
        return np.clip(clear + noise, 0, 255).astype(np.uint8), labels

    counts = (sizes.noisy_train, sizes.noisy_val, sizes.test)
    splits = _draw_splits("noisy-letters", draw, counts, seed)
    return _task("noisy-letters", "Letters in noise", LETTERS, splits, sizes.noisy_shipped)


def letters(sizes: Sizes, seed: int) -> ImageTask:
    """The ink of ten capitals in 15 faces, small poses; 20 x 20, one channel."""

    def draw(count: int, rng: np.random.Generator) -> Split:
        ink, labels = draw_glyphs(TEN_LETTERS, count, rng, hard=False)
        return resize(_to_grey(ink), INK_SIZE), labels

    splits = _draw_splits("letters", draw, (sizes.train, sizes.val, sizes.test), seed)
    return _task("letters", "Printed letters", TEN_LETTERS, splits)


def shapes(sizes: Sizes, seed: int) -> ImageTask:
    """Ten shapes on the ruled paper of the bundled suite; 20 x 20, three channels."""

    def draw(count: int, rng: np.random.Generator) -> Split:
        ink, labels = draw_shapes(count, rng, hard=False)
        return resize(clean_style(ink, PAPERS["shapes"], rng), COLOUR_SIZE), labels

    splits = _draw_splits("shapes", draw, (sizes.train, sizes.val, sizes.test), seed)
    return _task("shapes", "Shapes", SHAPES, splits)


POOL_TASKS: dict[str, Callable[[Sizes, int], ImageTask]] = {
    "digits": digits,
    "noisy-letters": noisy_letters,
    "letters": letters,
    "shapes": shapes,
}


def resize(images: Images, size: int) -> Images:
    """N x H x W x C images at another size, bicubic: uint8 N x size x size x C."""
    resample = partial(Image.Image.resize, size=(size, size), resample=Image.Resampling.BICUBIC)
    pictures = (
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in images
    )
    stack = np.stack([np.asarray(resample(picture), dtype=np.uint8) for picture in pictures])
    return stack.reshape(len(images), size, size, images.shape[-1])


def _to_grey(ink: Ink) -> Images:
    return np.rint(ink * 255).astype(np.uint8)[..., None]


def _draw_splits(
    name: str,
    draw: Callable[[int, np.random.Generator], Split],
    counts: tuple[int, ...],
    seed: int,
) -> dict[str, Split]:
    return {
        split: draw(count, stream(seed, "pools", name, split))
        for split, count in zip(SPLITS, counts, strict=True)
    }


def _task(
    name: str,
    title: str,
    class_names: tuple[str, ...],
    splits: dict[str, Split],
    shipped: int | None = None,
) -> ImageTask:
    mean, std = pixel_constants(splits["train"][0])
    task = ImageTask(name, title, class_names, splits, mean, std, shipped)
    check_disjoint(task)
    return task
