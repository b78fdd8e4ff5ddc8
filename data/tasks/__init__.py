"""The twenty tasks, their classes and the paper that each is drawn on."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from data.tasks.canvas import Images, Ink, Labels
from data.tasks.curves import LOOPS, draw_loops
from data.tasks.digits import draw_digits
from data.tasks.dots import COUNTS, draw_dots
from data.tasks.glyphs import (
    ARABIC,
    AUXILIARY,
    CYRILLIC,
    GEORGIAN,
    GREEK,
    HEBREW,
    LETTERS,
    PIECES,
    SYMBOLS,
    draw_glyphs,
)
from data.tasks.lines import ORIENTATIONS, draw_lines
from data.tasks.moons import PHASES, draw_moons
from data.tasks.pointers import DIRECTIONS, HOURS, draw_arrows, draw_clocks
from data.tasks.positions import draw_positions
from data.tasks.shapes import SHAPES, draw_shapes
from data.tasks.signs import DIGITS, NUMERALS, draw_matrix, draw_segments
from data.tasks.styles import Domain, Paper, clean_style, wild_style
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

    def draw_clean(
        self, split: str, count: int, seed: int, domain: Domain | None = None
    ) -> tuple[Images, Labels]:
        """Return uint8 count x 32 x 32 x 3 images and int64 labels of the task's clean domain.

        It is the task's own paper, or what a domain that is common to all tasks makes of it.
        """
        rng = stream(seed, self.name, "clean", split)
        ink, labels = self._ink(count, rng, split, hard=False)
        return clean_style(ink, self.paper, rng, domain, self.name), labels

    def draw_wild(
        self, count: int, seed: int, domain: Domain | None = None
    ) -> tuple[Images, Labels]:
        """Return training images in harder poses, and labels.

        They are in the noisy colours of pre-training, or in the look of a domain, without the
        task's own mark and paper.
        """
        rng = stream(seed, self.name, "wild" if domain is None else "look", "train")
        ink, labels = self._ink(count, rng, "train", hard=True)
        return _wild_or_common(ink, domain, rng), labels


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
        draw_shapes,
        Paper((0.60, 0.88, 0.92), (0.85, 0.20, 0.25), "columns", 8.0, 1.2, 0.50),
    ),
    Task(
        "lines",
        "Line orientation",
        ORIENTATIONS,
        draw_lines,
        Paper((0.35, 0.50, 0.80), (0.98, 0.75, 0.15), "dotted", 6.0, 1.2, 0.15),
    ),
    Task(
        "dots",
        "Counting dots",
        COUNTS,
        draw_dots,
        Paper((0.62, 0.85, 0.50), (0.45, 0.18, 0.62), "diamonds", 9.0, 1.0, 0.15),
    ),
    Task(
        "textures",
        "Textures",
        TEXTURES,
        draw_textures,
        Paper((0.98, 0.70, 0.62), (0.30, 0.62, 0.80)),
    ),
    Task(
        "cyrillic",
        "Cyrillic letters",
        CYRILLIC,
        _glyphs(CYRILLIC),
        Paper((0.85, 0.75, 0.95), (0.40, 0.35, 0.05), "falling", 7.0, 1.2, 0.25),
    ),
    Task(
        "hebrew",
        "Hebrew letters",
        HEBREW,
        _glyphs(HEBREW),
        Paper((0.55, 0.80, 0.98), (0.55, 0.10, 0.40), "lined", 6.0, 1.2, 0.30),
    ),
    Task(
        "arabic",
        "Arabic letters",
        ARABIC,
        _glyphs(ARABIC),
        Paper((0.95, 0.80, 0.45), (0.05, 0.35, 0.55), "columns", 9.0, 1.2, 0.30),
    ),
    Task(
        "georgian",
        "Georgian letters",
        GEORGIAN,
        _glyphs(GEORGIAN),
        Paper((0.75, 0.95, 0.85), (0.60, 0.10, 0.55), "squared", 7.0, 1.0, 0.30),
    ),
    Task(
        "pieces",
        "Chess and cards",
        PIECES,
        _glyphs(PIECES),
        Paper((0.95, 0.55, 0.45), (0.10, 0.30, 0.60), "dotted", 7.0, 1.2, 0.30),
    ),
    Task(
        "segments",
        "Seven-segment digits",
        DIGITS,
        draw_segments,
        Paper((0.20, 0.35, 0.65), (0.95, 0.45, 0.30), "falling", 6.0, 1.2, 0.20),
    ),
    Task(
        "matrix",
        "Dot-matrix digits",
        NUMERALS,
        draw_matrix,
        Paper((0.90, 0.88, 0.40), (0.45, 0.20, 0.75), "rising", 9.0, 1.0, 0.20),
    ),
    Task(
        "clocks",
        "Clocks",
        HOURS,
        draw_clocks,
        Paper((0.50, 0.90, 0.60), (0.80, 0.20, 0.60), "diamonds", 8.0, 1.0, 0.20),
    ),
    Task(
        "arrows",
        "Arrows",
        DIRECTIONS,
        draw_arrows,
        Paper((0.80, 0.55, 0.95), (0.20, 0.70, 0.10), "lined", 8.0, 1.2, 0.20),
    ),
    Task(
        "loops",
        "Loops",
        LOOPS,
        draw_loops,
        Paper((0.25, 0.60, 0.60), (0.98, 0.70, 0.70), "dotted", 8.0, 1.2, 0.20),
    ),
    Task(
        "moons",
        "Phases of the moon",
        PHASES,
        draw_moons,
        Paper((0.30, 0.20, 0.60), (0.85, 0.95, 0.40), "squared", 9.0, 1.0, 0.20),
    ),
    Task(
        "positions",
        "Relative position",
        DIRECTIONS,
        draw_positions,
        Paper((0.98, 0.85, 0.75), (0.10, 0.50, 0.70), "falling", 9.0, 1.2, 0.20),
    ),
)
# The tasks of the first suite and of the convolutional one.
EIGHT = TASKS[:8]


def draw_auxiliary(count: int, seed: int, domain: Domain | None = None) -> tuple[Images, Labels]:
    """Training images and labels of the auxiliary glyph set, as :meth:`Task.draw_wild` has them."""
    rng = stream(seed, "auxiliary", "wild" if domain is None else "look", "train")
    ink, labels = draw_glyphs(AUXILIARY, count, rng, hard=True)
    return _wild_or_common(ink, domain, rng), labels


def _wild_or_common(ink: Ink, domain: Domain | None, rng: np.random.Generator) -> Images:
    """The colours of pre-training, or what a domain's tasks have in common."""
    if domain is None:
        return wild_style(ink, rng)
    return clean_style(ink, Paper(domain.paper, domain.ink), rng, domain)


__all__ = ["EIGHT", "SPLITS", "TASKS", "Draw", "Task", "draw_auxiliary", "stream"]
