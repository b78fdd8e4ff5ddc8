"""Intensities, tiles read back from the PNG, and block means."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from analysis.patterns.images import Tiles, block_means, normalise, stitch, tile_png

SEEDS = st.integers(0, 10**6)


def signed_noise(seed: int, count: int = 4, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.integers(-3, 4, (count, 1, 1, 1))
    return rng.normal(0.3, 1, (count, 3, 5, channels)) * scales


def decode(tiles: Tiles) -> np.ndarray:
    head, data = tiles.source.split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@given(SEEDS)
def test_joint_reaches_both_ends_over_all_channels(seed: int) -> None:
    values = signed_noise(seed)
    shown = normalise(values, "joint")
    for image, raw in zip(shown, values, strict=True):
        assert image.min() == 0.0
        assert image.max() == 1.0
        # One affine map for all channels: ratios of differences stay.
        flat, before = image.ravel(), raw.ravel()
        expected = (before - before.min()) / (before.max() - before.min())
        assert flat == pytest.approx(expected, abs=1e-12)


@given(SEEDS)
def test_symmetric_keeps_zero_and_sign(seed: int) -> None:
    values = signed_noise(seed)
    values[:, 0, 0] = 0.0
    shown = normalise(values, "symmetric")
    assert (shown[:, 0, 0] == 0.5).all()
    assert (np.sign(shown - 0.5) == np.sign(values)).all()
    assert np.abs(shown - 0.5).max(axis=(1, 2, 3)) == pytest.approx(np.full(4, 0.5))


@pytest.mark.parametrize("kind", ["joint", "symmetric"])
def test_a_shared_scale_keeps_the_order_between_images(kind) -> None:
    values = signed_noise(7)
    shown = normalise(values, kind, shared=True)
    assert (np.argsort(shown.ravel()) == np.argsort(values.ravel())).all()
    assert normalise(values, kind).max(axis=(1, 2, 3)).min() > 0.5
    alone = normalise(values[:1], kind)
    assert normalise(values[:1], kind, shared=True) == pytest.approx(alone)


def test_nothing_to_scale_is_mid_grey() -> None:
    flat = np.stack([np.zeros((2, 2, 1)), np.full((2, 2, 1), -3.0)])
    assert (normalise(flat, "joint") == 0.5).all()
    assert (normalise(flat, "symmetric")[0] == 0.5).all()
    assert (normalise(flat, "symmetric")[1] == 0.0).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_come_back_from_the_png(channels: int) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (3, 4, channels), dtype=np.uint8) for _ in range(5)]
    tiles = tile_png([*images, None], 2)
    assert (tiles.rows, tiles.columns) == (3, 2)
    picture = decode(tiles)
    factor = tiles.tile[0] // 3
    assert tiles.tile == (3 * factor, 4 * factor)
    assert factor > 1
    for place, image in enumerate(images):
        x, y = tiles.centre(place)
        top, left = round(y - (tiles.tile[0] - 1) / 2), round(x - (tiles.tile[1] - 1) / 2)
        part = picture[top : top + tiles.tile[0], left : left + tiles.tile[1]]
        assert (part[..., 3] == 255).all()
        # Every pixel is a square of one colour.
        for i in range(factor):
            assert (part[i::factor, i::factor, :3] == image).all()
    x, y = tiles.centre(5)
    assert picture[round(y), round(x), 3] == 0
    assert (picture[:, tiles.tile[1] : tiles.tile[1] + tiles.gap, 3] == 0).all()


def test_floats_become_bytes_and_zero_is_one_grey() -> None:
    tiles = tile_png([np.array([[[0.0], [0.5], [1.0]]])], 1)
    row = decode(tiles)[0, :: tiles.tile[1] // 3, 0]
    assert row.tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    "images",
    [
        [],
        [None],
        [np.zeros((2, 2))],
        [np.zeros((2, 2, 2))],
        [np.zeros((2, 2, 1)), np.zeros((3, 2, 1))],
        [np.full((2, 2, 1), 1.01)],
        [np.full((2, 2, 1), -0.01)],
        [np.full((2, 2, 1), np.nan)],
    ],
)
def test_what_is_no_picture_is_refused(images: list) -> None:
    with pytest.raises(ValueError, match=r"Tiles must be|Intensities must"):
        tile_png(images, 2)


@given(SEEDS, st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_blocks_are_means(seed: int, m: int, n: int, most: int) -> None:
    matrix = np.random.default_rng(seed).normal(size=(m, n))
    result = block_means(matrix, most)
    assert result.shape == (min(m, most), min(n, most))
    rows = np.arange(min(m, most) + 1) * m // min(m, most)
    columns = np.arange(min(n, most) + 1) * n // min(n, most)
    for i, row in enumerate(result):
        for j, value in enumerate(row):
            block = matrix[rows[i] : rows[i + 1], columns[j] : columns[j + 1]]
            assert value == pytest.approx(block.mean(), abs=1e-12)


def test_stitched_maps_stand_apart() -> None:
    maps = np.arange(3 * 2 * 2.0).reshape(3, 2, 2)
    expected = [
        [0, 1, np.nan, 4, 5],
        [2, 3, np.nan, 6, 7],
        [np.nan] * 5,
        [8, 9, np.nan, np.nan, np.nan],
        [10, 11, np.nan, np.nan, np.nan],
    ]
    assert np.array_equal(stitch(maps, 2), np.array(expected), equal_nan=True)
