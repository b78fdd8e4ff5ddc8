"""Letters of six scripts, symbols, pieces and a large auxiliary set, in the fonts of matplotlib.

Only the builder needs them: DejaVu (Bitstream Vera licence), STIX (its font licence) and Computer
Modern (BaKoMa).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from data.tasks.canvas import Ink, Labels, Pose, balanced_labels, warp

MASTER = 64
FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
)
LATIN_FACES = (*FACES, "cmr10", "cmss10", "cmtt10", "cmb10")

LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
GREEK = tuple("αβγδεζηθικλμνξοπρστυφχψω")
SYMBOLS = tuple("+×÷±=≠≈≤≥∞∑∏√∫∂∇∈∀∃∪∩→←↑")
CYRILLIC = tuple("БГДЖЗИЛПФЦЧШЩЫЭЮЯ")
HEBREW = tuple("אבגדהזחטילמנסעפצקרשת")
# Isolated forms; of letters that differ in their dots alone, one or two.
ARABIC = tuple("ابتجدرسصطعفقكلمنهوي")
GEORGIAN = tuple("აბგდევზთიკლმნოპრსტფქღშჩწხჯჰ")
PIECES = tuple("♔♕♖♗♘♙♚♛♜♝♞♟♠♣♥♦")
AUXILIARY = tuple(
    "abcdefghijklmnopqrstuvwxyz0123456789&%$#@?!§"
    "ЪЬбвгджзийклмнптфцчшщъыьэюя"
    "ΓΔΘΛΞΠΣΦΨΩÆÐØÞßæðøþłŋƒ"
    "↓↔⇒⇔⊂⊃⊕⊗⊥∧∨¬∅∝∴≡∼⌈⌊⟨⟩∠∥◊"
)


@cache
def _masters(characters: tuple[str, ...]) -> tuple[NDArray[np.floating], list[Labels]]:
    """Render every character in every face that has it.

    Returns the stack M x 64 x 64 and, per character, the indices of its renderings.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images: list[NDArray[np.floating]] = []
    rows: list[list[int]] = [[] for _ in characters]
    for face in LATIN_FACES:
        path = folder / f"{face}.ttf"
        charmap = FT2Font(str(path)).get_charmap()
        font = ImageFont.truetype(str(path), 96)
        for position, character in enumerate(characters):
            # Computer Modern files put other signs at non-ASCII code points.
            ascii_only = face.startswith("cm")
            if ord(character) in charmap and (character.isascii() or not ascii_only):
                rows[position].append(len(images))
                images.append(_render(character, font))
    missing = [c for c, found in zip(characters, rows, strict=True) if not found]
    if missing:
        raise ValueError(f"no bundled font has {missing}")
    return np.stack(images), [np.array(found, dtype=np.int64) for found in rows]


def _render(character: str, font: ImageFont.FreeTypeFont) -> NDArray[np.floating]:
    """Draw one character, its longer side filling 44 of 64 pixels, centred."""
    left, top, right, bottom = font.getbbox(character)
    width, height = max(int(right - left), 1), max(int(bottom - top), 1)
    tight = Image.new("L", (width, height), 0)
    ImageDraw.Draw(tight).text((-left, -top), character, fill=255, font=font)
    factor = 44 / max(width, height)
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    canvas = Image.new("L", (MASTER, MASTER), 0)
    corner = (MASTER - size[0]) // 2, (MASTER - size[1]) // 2
    canvas.paste(tight.resize(size, Image.Resampling.LANCZOS), corner)
    # Half the master's resolution survives on the canvas, so blur before it is sampled.
    canvas = canvas.filter(ImageFilter.GaussianBlur(0.7))
    return np.asarray(canvas, dtype=np.float32) / 255


def draw_glyphs(
    characters: tuple[str, ...], count: int, rng: np.random.Generator, *, hard: bool
) -> tuple[Ink, Labels]:
    """Draw ``count`` canvases, classes balanced, each in a random face and pose.

    Returns ink (count x 32 x 32) and labels (count,), the positions in ``characters``.
    """
    masters, rows = _masters(characters)
    labels = balanced_labels(count, len(characters), rng)
    pick = rng.random(count)
    index = np.array(
        [rows[c][int(p * len(rows[c]))] for c, p in zip(labels, pick, strict=True)], dtype=np.int64
    )
    return warp(masters, index, Pose(count, rng, hard=hard)), labels
