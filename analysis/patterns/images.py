"""Weights as pictures: what is signed becomes grey levels or colours, many tiles one PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

Normalisation = Literal["symmetric", "joint"]
NORMALISATIONS: dict[Normalisation, str] = {
    "symmetric": "grey is zero",
    "joint": "min-max",
}
# Tiles are enlarged until a row of them is about this wide, so that pixels stay crisp.
WIDTH = 1000


def normalise(
    values: np.ndarray, kind: Normalisation = "symmetric", shared: bool = False
) -> np.ndarray:
    """Signed weights as intensities in [0, 1], over all pixels and channels of an image at once.

    Args:
        values: images x H x W x C, any unit.
        kind: "joint" maps the smallest entry to 0 and the largest to 1, and loses the sign;
            "symmetric" is ½ + w / (2 max|w|): zero is mid-grey ½ and the sign is kept.
        shared: one scale for all images, so that their sizes can be compared.

    Returns:
        float64, same shape; ½ throughout where an image is constant (joint) or zero (symmetric).

    Source: "joint" as in arXiv:2411.09263, section 3 (released code); "symmetric" [derived].

    Example:
        >>> weights = np.array([-1.0, 0.0, 2.0]).reshape(1, 1, 3, 1)
        >>> normalise(weights).ravel().tolist()
        [0.25, 0.5, 1.0]
        >>> normalise(weights, "joint").ravel().round(2).tolist()
        [0.0, 0.33, 1.0]
    """
    values = np.asarray(values, dtype=np.float64)
    axes = tuple(range(values.ndim)) if shared else tuple(range(1, values.ndim))
    if kind == "joint":
        low = values.min(axis=axes, keepdims=True)
        span = values.max(axis=axes, keepdims=True) - low
        return np.divide(values - low, span, out=np.full_like(values, 0.5), where=span > 0)
    top = np.abs(values).max(axis=axes, keepdims=True)
    ratio = np.divide(values, top, out=np.zeros_like(values), where=top > 0)
    return 0.5 + ratio / 2


@dataclass(frozen=True)
class Tiles:
    """One picture of many tiles.

    Attributes:
        source: the PNG as a data URI.
        rows: of tiles.
        columns: of tiles.
        tile: height and width of one tile in the PNG's pixels.
        gap: transparent pixels between tiles.
    """

    source: str
    rows: int
    columns: int
    tile: tuple[int, int]
    gap: int

    def centre(self, index: int) -> tuple[float, float]:
        """The middle (x, y) of a tile, in pixels of the PNG, by its index in reading order."""
        row, column = divmod(index, self.columns)
        height, width = self.tile
        return (
            column * (width + self.gap) + (width - 1) / 2,
            row * (height + self.gap) + (height - 1) / 2,
        )


def tile_png(images: np.ndarray | Sequence[np.ndarray | None], columns: int) -> Tiles:
    """Images side by side in one PNG, enlarged by a whole number so that pixels stay crisp.

    Args:
        images: each H x W x C with C = 1 (grey) or 3 (RGB), all of one shape; uint8, or floats
            in [0, 1]. None leaves a tile empty.
        columns: tiles in a row, at least 1.

    Returns:
        The picture; gaps and empty places are transparent.

    Raises:
        ValueError: no image at all, other shapes, or floats outside [0, 1].

    Example:
        >>> tiles = tile_png(np.zeros((5, 8, 8, 1)), columns=3)
        >>> (tiles.rows, tiles.columns), tiles.source[:22]
        ((2, 3), 'data:image/png;base64,')
    """
    given = [image for image in images if image is not None]
    shapes = {image.shape for image in given}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 3 or shape[2] not in (1, 3):
        raise ValueError("Tiles must be images H x W x C of one shape, with C = 1 or 3.")
    height, width, _ = shape
    rows = -(-len(images) // columns)
    factor = max(1, WIDTH // (columns * width))
    tile = (height * factor, width * factor)
    gap = max(2, tile[1] // 20)
    canvas = np.zeros(
        (rows * (tile[0] + gap) - gap, columns * (tile[1] + gap) - gap, 4), dtype=np.uint8
    )
    for index, image in enumerate(images):
        if image is None:
            continue
        row, column = divmod(index, columns)
        top, left = row * (tile[0] + gap), column * (tile[1] + gap)
        part = canvas[top : top + tile[0], left : left + tile[1]]
        # A single grey channel spreads over red, green and blue.
        part[..., :3] = _bytes(image).repeat(factor, axis=0).repeat(factor, axis=1)
        part[..., 3] = 255
    stream = io.BytesIO()
    Image.fromarray(canvas).save(stream, format="PNG")
    source = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    return Tiles(source, rows, columns, tile, gap)


def _bytes(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint8:
        return image
    # Written so that NaN fails too.
    if not (image.min() >= 0 and image.max() <= 1):
        raise ValueError("Intensities must lie in [0, 1].")
    return np.floor(image * 255 + 0.5).astype(np.uint8)


def block_means(matrix: np.ndarray, most: int) -> np.ndarray:
    """A matrix reduced to at most `most` x `most` cells, each the mean of a block.

    Args:
        matrix: m x n.
        most: cells along a side. Blocks differ by one row or column where it does not divide.

    Returns:
        float64, min(m, most) x min(n, most).

    Example:
        >>> block_means(np.arange(16.0).reshape(4, 4), most=2).tolist()
        [[2.5, 4.5], [10.5, 12.5]]
    """
    result = np.asarray(matrix, dtype=np.float64)
    for axis, length in enumerate(result.shape):
        if length > most:
            edges = np.arange(most) * length // most
            sizes = np.diff(np.append(edges, length)).reshape((-1, 1) if axis == 0 else (1, -1))
            result = np.add.reduceat(result, edges, axis=axis) / sizes
    return result


def stitch(maps: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """Maps side by side in one matrix, for a single heat map.

    Args:
        maps: count x m x n.
        columns: maps in a row, at least 1.
        gap: cells between maps.

    Returns:
        float64; NaN, which a heat map leaves out, between maps and in empty places.

    Example:
        >>> stitch(np.ones((2, 1, 2)), columns=2)
        array([[ 1.,  1., nan,  1.,  1.]])
    """
    count, m, n = maps.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (m + gap) - gap, columns * (n + gap) - gap), np.nan)
    for index, values in enumerate(maps):
        row, column = divmod(index, columns)
        top, left = row * (m + gap), column * (n + gap)
        canvas[top : top + m, left : left + n] = values
    return canvas
