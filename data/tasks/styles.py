"""From ink to colour: the wild domain of pre-training and the eight papers of the tasks."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from data.tasks.canvas import SIZE, Images, Ink, column, ink_of_distance, pixel_grid, rotated_grid

# The clean papers oppose colour channels; here ink is brighter, or darker, in all three.
BRIGHT_SHARE = 0.75
SQUARES = 16  # of an image, as the patches of the suite's transformer

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Paper:
    """The look of one task's clean domain: colours in [0, 1], a ruling, lengths in pixels.

    ``strength`` is how far the ruling's colour lies on the way from the paper's to the ink's.
    """

    paper: Colour
    ink: Colour
    ruling: str = "plain"
    period: float = 8.0
    width: float = 1.2
    strength: float = 0.3


@dataclass(frozen=True)
class Domain:
    """What the clean images of all tasks of a suite have in common, and how much is their own.

    The common part is one pair of colours and one shade, a smooth pattern of colours at a fixed
    place, as a lamp and a lens leave it; the own part is a mark, such a pattern on squares of
    its own for each task, and so much of the task's paper. Strengths are standard deviations over
    the whole image in shares of full scale.

    Attributes:
        paper, ink: colours that all tasks share.
        shade: strength of the common pattern.
        mark: strength of the task's own.
        squares: how many of the 16 squares of 8 x 8 pixels a mark covers.
        own: how far colours lie on the way to those of the task's own paper.
        ruling: how far a ruling's colour lies on the way from the paper's to the ink's, in shares
            of what the task's own paper says.
        smoothness: standard deviation of the patterns' filter, in pixels.
    """

    paper: Colour = (0.3, 0.3, 0.3)
    ink: Colour = (0.85, 0.85, 0.85)
    shade: float = 0.25
    mark: float = 0.2
    squares: int = 4
    own: float = 0.0
    ruling: float = 0.0
    smoothness: float = 2.0

    def apply(self, paper: Paper) -> Paper:
        """A task's paper as it is in this domain."""

        def between(common: Colour, own: Colour) -> Colour:
            r, g, b = ((1 - self.own) * c + self.own * o for c, o in zip(common, own, strict=True))
            return r, g, b

        return replace(
            paper,
            paper=between(self.paper, paper.paper),
            ink=between(self.ink, paper.ink),
            strength=self.ruling * paper.strength,
        )

    def pattern(self, task: str) -> NDArray[np.floating]:
        """What is added to every image of a task: 32 x 32 x 3."""
        shade = self.shade * _smooth_pattern("shade", self.smoothness)
        if not task:
            return shade
        mark = _smooth_pattern(f"mark of {task}", self.smoothness) * _squares(task, self.squares)
        return shade + self.mark * mark / np.sqrt(self.squares / SQUARES)


def _smooth_pattern(name: str, smoothness: float) -> NDArray[np.floating]:
    """A smooth random pattern of deviation 1 (32 x 32 x 3), the same for ever by its name."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal((SIZE, SIZE, 3))
    pattern = gaussian_filter(noise, (smoothness, smoothness, 0), mode="wrap")
    return (pattern / pattern.std()).astype(np.float32)


def _squares(task: str, count: int) -> NDArray[np.floating]:
    """1 on a task's own squares and 0 elsewhere (32 x 32 x 1), the same for ever by its name."""
    side = int(np.sqrt(SQUARES))
    chosen = np.random.default_rng(zlib.crc32(f"squares of {task}".encode())).permutation(SQUARES)
    mask = (np.argsort(chosen) < count).astype(np.float32).reshape(side, side)
    return np.kron(mask, np.ones((SIZE // side, SIZE // side), np.float32))[..., None]


def _to_images(values: NDArray[np.floating]) -> Images:
    return (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)


def _ruling(paper: Paper, count: int, rng: np.random.Generator) -> Ink:
    """Ink of a ruling in random phase and a little turned, count x 32 x 32."""
    phase = rng.uniform(0, paper.period, (2, count))
    u, v = rotated_grid(rng.uniform(-0.06, 0.06, count), phase[0], phase[1])
    period = paper.period

    def lines(w: NDArray[np.floating]) -> NDArray[np.floating]:
        return np.abs(w - period * np.round(w / period)) - paper.width / 2

    match paper.ruling:
        case "lined":
            return ink_of_distance(lines(v))
        case "columns":
            return ink_of_distance(lines(u))
        case "squared":
            return ink_of_distance(np.minimum(lines(u), lines(v)))
        case "rising":
            return ink_of_distance(lines((u + v) * np.float32(np.sqrt(0.5))))
        case "falling":
            return ink_of_distance(lines((u - v) * np.float32(np.sqrt(0.5))))
        case "dotted":
            du, dv = u - period * np.round(u / period), v - period * np.round(v / period)
            return ink_of_distance(np.hypot(du, dv) - paper.width)
        case "diamonds":
            a, b = (u + v) * np.float32(np.sqrt(0.5)), (u - v) * np.float32(np.sqrt(0.5))
            return ink_of_distance(np.minimum(lines(a), lines(b)))
        case "plain":
            return np.zeros_like(u)
    raise ValueError(f"unknown ruling {paper.ruling!r}")


def clean_style(
    ink: Ink,
    paper: Paper,
    rng: np.random.Generator,
    domain: Domain | None = None,
    task: str = "",
) -> Images:
    """Draw ink (N x 32 x 32) on a task's own ruled paper, in a common domain where one is given.

    Returns uint8 N x 32 x 32 x 3. Without a task's name its own mark is left out.
    """
    count = len(ink)
    paper = paper if domain is None else domain.apply(paper)
    # Equal grounds make the images of a domain small files: a pattern is stored once.
    spread = 0.03 if domain is None else 0.0

    def tint(colour: NDArray[np.floating]) -> NDArray[np.floating]:
        jitter = rng.uniform(-spread, spread, (count, 3)).astype(np.float32)
        return (colour + jitter)[:, None, None, :]

    ground = np.asarray(paper.paper, dtype=np.float32)
    colour = np.asarray(paper.ink, dtype=np.float32)
    rule = _ruling(paper, count, rng)[..., None]
    sheet = tint(ground)
    sheet = sheet + rule * (tint(ground + paper.strength * (colour - ground)) - sheet)
    images = sheet + ink[..., None] * (tint(colour) - sheet)
    return _to_images(images if domain is None else images + domain.pattern(task))


def wild_style(ink: Ink, rng: np.random.Generator) -> Images:
    """Draw ink (N x 32 x 32) in random colours on an uneven ground under strong noise.

    Most canvases (``BRIGHT_SHARE``) have ink brighter than the ground, the others darker.
    Returns uint8 N x 32 x 32 x 3.
    """
    count = len(ink)
    dark = rng.uniform(0.0, 0.55, (count, 3)).astype(np.float32)
    light = rng.uniform(0.45, 1.0, (count, 3)).astype(np.float32)
    bright = rng.random(count)[:, None] < BRIGHT_SHARE
    ground, colour = np.where(bright, dark, light), np.where(bright, light, dark)
    x, y = pixel_grid()
    angle = rng.uniform(0, 2 * np.pi, count)
    ramp = (column(np.cos(angle)) * x + column(np.sin(angle)) * y) / 16
    sheet = ground[:, None, None] + (ramp * column(rng.uniform(0, 0.15, count)))[..., None]
    images = sheet + ink[..., None] * (colour - ground)[:, None, None]
    noise = rng.standard_normal(images.shape, dtype=np.float32)
    noise *= column(rng.uniform(0.03, 0.16, count))[..., None]
    return _to_images(images + noise)
