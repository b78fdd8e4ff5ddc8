"""The eight tasks, their classes and the paper that each is drawn on."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from data.tasks.canvas import Images, Ink, Labels
from data.tasks.digits import draw_digits
from data.tasks.dots import COUNTS, draw_dots
from data.tasks.glyphs import AUXILIARY, GREEK, LETTERS, SYMBOLS, draw_glyphs
from data.tasks.lines import ORIENTATIONS, draw_lines
from data.tasks.shapes import SHAPES, draw_shapes
from data.tasks.styles import Paper, clean_style, wild_style
from data.tasks.textures import TEXTURES, draw_textures

SPLITS = ("train", "val", "test")


class Draw(Protocol):
    """Draws ``count`` labelled canvases in easy or hard poses."""

    def __call__(
        self, count: int, rng: np.random.Generator, *, hard: bool
    ) -> tuple[Ink, Labels]: ...


@dataclass(frozen=True)
class Task:
    """A task: how it is called, what its classes are, how it is drawn."""

    name: str
    title: str
    classes: tuple[str, ...]
    draw: Draw | None
    paper: Paper

    def _ink(
        self, count: int, rng: np.random.Generator, split: str, *, hard: bool
    ) -> tuple[Ink, Labels]:
        if self.draw is None:
            return draw_digits(count, rng, hard=hard, split=split)
        return self.draw(count, rng, hard=hard)

    def draw_clean(self, split: str, count: int, seed: int) -> tuple[Images, Labels]:
        """Return uint8 count x 32 x 32 x 3 images and int64 labels of the task's clean domain."""
        rng = stream(seed, self.name, "clean", split)
        ink, labels = self._ink(count, rng, split, hard=False)
        return clean_style(ink, self.paper, rng), labels

    def draw_wild(self, count: int, seed: int) -> tuple[Images, Labels]:
        """Return training images of the harder, noisier pre-training domain, and labels."""
        rng = stream(seed, self.name, "wild", "train")
        ink, labels = self._ink(count, rng, "train", hard=True)
        return wild_style(ink, rng), labels


def stream(seed: int, *names: str) -> np.random.Generator:
    """An independent random stream for every (seed, names)."""
    return np.random.default_rng([seed, *(zlib.crc32(name.encode()) for name in names)])


def _glyphs(characters: tuple[str, ...]) -> Draw:
    return partial(draw_glyphs, characters)


TASKS: tuple[Task, ...] = (
    Task(
        "digits",
        "Handwritten digits",
        tuple("0123456789"),
        None,
        Paper((0.98, 0.93, 0.55), (0.12, 0.22, 0.70), "lined", 7.0, 1.2, 0.33),
    ),
    Task(
        "letters",
        "Printed letters",
        LETTERS,
        _glyphs(LETTERS),
        Paper((0.70, 0.92, 0.70), (0.75, 0.15, 0.15), "columns", 6.0, 1.2, 0.33),
    ),
    Task(
        "greek",
        "Greek letters",
        GREEK,
        _glyphs(GREEK),
        Paper((0.98, 0.62, 0.75), (0.05, 0.55, 0.25), "squared", 8.0, 1.0, 0.40),
    ),
    Task(
        "symbols",
        "Mathematical symbols",
        SYMBOLS,
        _glyphs(SYMBOLS),
        Paper((0.50, 0.35, 0.75), (0.95, 0.85, 0.20), "rising", 7.0, 1.2, 0.20),
    ),
    Task(
        "shapes",
        "Shapes",
        SHAPES,
        partial(draw_shapes),
        Paper((0.60, 0.88, 0.92), (0.85, 0.20, 0.25), "columns", 8.0, 1.2, 0.50),
    ),
    Task(
        "lines",
        "Line orientation",
        ORIENTATIONS,
        partial(draw_lines),
        Paper((0.35, 0.50, 0.80), (0.98, 0.75, 0.15), "dotted", 6.0, 1.2, 0.15),
    ),
    Task(
        "dots",
        "Counting dots",
        COUNTS,
        partial(draw_dots),
        Paper((0.62, 0.85, 0.50), (0.45, 0.18, 0.62), "diamonds", 9.0, 1.0, 0.15),
    ),
    Task(
        "textures",
        "Textures",
        TEXTURES,
        partial(draw_textures),
        Paper((0.98, 0.70, 0.62), (0.30, 0.62, 0.80)),
    ),
)


def draw_auxiliary(count: int, seed: int) -> tuple[Images, Labels]:
    """Wild images and labels of the auxiliary glyph set, used in pre-training only."""
    rng = stream(seed, "auxiliary", "wild", "train")
    ink, labels = draw_glyphs(AUXILIARY, count, rng, hard=True)
    return wild_style(ink, rng), labels


__all__ = ["SPLITS", "TASKS", "Task", "draw_auxiliary", "stream"]
