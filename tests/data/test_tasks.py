"""The seeded generators: determinism, form, balance, and labels derived again from the pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from data.build_suite import image_hashes, make_splits
from data.suite_plans import QUICK
from data.tasks import SPLITS, TASKS, Draw, Task, draw_auxiliary, stream
from data.tasks.canvas import Pose, balanced_labels, warp
from data.tasks.curves import LOOPS, RATIOS, draw_loops
from data.tasks.digits import BLOCKS, draw_digits
from data.tasks.dots import draw_dots
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
from data.tasks.lines import ORIENTATIONS, STEP_DEGREES, draw_lines
from data.tasks.moons import PHASES, draw_moons
from data.tasks.pointers import HOURS, draw_arrows, draw_clocks
from data.tasks.positions import draw_positions
from data.tasks.shapes import SHAPES, draw_shapes
from data.tasks.signs import DIGITS, ENDS, LIT, MATRIX, NUMERALS, draw_matrix, draw_segments
from data.tasks.styles import BRIGHT_SHARE, Paper, clean_style, wild_style
from data.tasks.textures import TEXTURES, draw_textures

every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@every_task
def test_clean_domain_is_well_formed_and_seeded(task: Task) -> None:
    images, labels = task.draw_clean("val", 60, seed=3)
    assert images.shape == (60, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert set(labels.tolist()) <= set(range(len(task.classes)))
    again, labels_again = task.draw_clean("val", 60, seed=3)
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, labels_again)
    other, _ = task.draw_clean("val", 60, seed=4)
    assert not np.array_equal(images, other)


@every_task
def test_wild_domain_is_well_formed_and_differs_from_the_clean_one(task: Task) -> None:
    images, labels = task.draw_wild(60, seed=3)
    assert images.shape == (60, 32, 32, 3)
    assert images.dtype == np.uint8
    assert len(np.unique(labels)) > 1
    np.testing.assert_array_equal(images, task.draw_wild(60, seed=3)[0])
    clean, _ = task.draw_clean("train", 60, seed=3)

    def roughness(stack: np.ndarray) -> float:
        return float(np.abs(np.diff(stack.astype(float), axis=2)).mean())

    if task.name != "textures":  # whose clean images are themselves full of edges
        assert roughness(images) > roughness(clean)


@every_task
def test_classes_are_named_once_and_balanced(task: Task) -> None:
    assert len(set(task.classes)) == len(task.classes)
    _, labels = task.draw_clean("val", 250, seed=0)
    counts = np.bincount(labels, minlength=len(task.classes))
    # The digits' blocks are what the writers wrote; the others are balanced by construction.
    spread = 10 if task.name == "digits" else 1
    assert counts.max() - counts.min() <= spread


@every_task
def test_splits_share_no_image(task: Task) -> None:
    splits = make_splits(task, QUICK, seed=0)
    assert [len(splits[name][1]) for name in SPLITS] == [QUICK.train, QUICK.val, QUICK.test]
    sets = [image_hashes(splits[name][0]) for name in SPLITS]
    assert len(set.union(*sets)) == sum(len(s) for s in sets)


def test_a_shared_image_is_refused() -> None:
    class Leaky(Task):
        def draw_clean(self, split, count, seed, domain=None):  # type: ignore[no-untyped-def]
            return super().draw_clean("train", count, seed, domain)

    leaky = Leaky("leaky", "Leaky", ORIENTATIONS, draw_lines, TASKS[0].paper)
    # The three splits draw a different number from one stream; equal sizes make them equal.
    with pytest.raises(ValueError, match="leaky: train and val share 10 images"):
        make_splits(leaky, replace(QUICK, train=10, val=10, test=10), seed=0)


def test_task_order_is_the_one_documented() -> None:
    assert [task.name for task in TASKS] == [
        "digits",
        "letters",
        "greek",
        "symbols",
        "shapes",
        "lines",
        "dots",
        "textures",
        "cyrillic",
        "hebrew",
        "arabic",
        "georgian",
        "pieces",
        "segments",
        "matrix",
        "clocks",
        "arrows",
        "loops",
        "moons",
        "positions",
    ]


def test_streams_differ_by_name_and_seed() -> None:
    draws = {
        stream(seed, *names).integers(2**40)
        for seed in (0, 1)
        for names in (("a",), ("b",), ("a", "b"), ("b", "a"))
    }
    assert len(draws) == 8


def test_balanced_labels_differ_by_at_most_one() -> None:
    counts = np.bincount(balanced_labels(103, 10, np.random.default_rng(0)))
    assert sorted(counts.tolist()) == [10] * 7 + [11] * 3


@pytest.mark.parametrize("hard", [False, True])
def test_dots_can_be_counted(hard: bool) -> None:
    ink, labels = draw_dots(120, np.random.default_rng(1), hard=hard)
    counted = [ndimage.label(canvas > 0.5, structure=np.ones((3, 3)))[1] for canvas in ink]
    np.testing.assert_array_equal(np.array(counted) - 1, labels)


@pytest.mark.parametrize(("hard", "off"), [(False, 5.5), (True, 7.4)])
def test_line_angles_follow_from_second_moments(hard: bool, off: float) -> None:
    ink, labels = draw_lines(240, np.random.default_rng(2), hard=hard)
    y, x = np.mgrid[:32, :32].astype(float)
    y = -y  # up is positive
    mass = ink.sum(axis=(1, 2))
    dx = x - ((ink * x).sum(axis=(1, 2)) / mass)[:, None, None]
    dy = y - ((ink * y).sum(axis=(1, 2)) / mass)[:, None, None]
    xx, yy, xy = ((ink * m).sum(axis=(1, 2)) for m in (dx * dx, dy * dy, dx * dy))
    angle = np.rad2deg(0.5 * np.arctan2(2 * xy, xx - yy))
    error = np.mod(angle - labels * STEP_DEGREES + 90, 180) - 90
    assert np.abs(error).max() < off


def test_filled_shapes_have_their_areas() -> None:
    ink, labels = draw_shapes(4000, np.random.default_rng(3), hard=False)
    middle = np.array([ndimage.center_of_mass(canvas) for canvas in ink]).round().astype(int)
    filled = ink[np.arange(len(ink)), middle[:, 0], middle[:, 1]] > 0.9
    area = ink.sum(axis=(1, 2))
    # Areas for circumradius 1 (the circle's is 0.9, half the square's side 0.78).
    expected = {
        "circle": np.pi * 0.9**2,
        "square": (2 * 0.78) ** 2,
        **{
            name: n / 2 * np.sin(2 * np.pi / n)
            for name, n in (("triangle", 3), ("pentagon", 5), ("hexagon", 6))
        },
    }
    mean_square = (10.0**2 + 10.0 * 12.5 + 12.5**2) / 3  # of radii uniform in 10 to 12.5
    for name, value in expected.items():
        found = area[filled & (labels == SHAPES.index(name))].mean()
        assert found == pytest.approx(value * mean_square, rel=0.06), name


def test_textures_fill_the_canvas_with_both_tones() -> None:
    ink, labels = draw_textures(200, np.random.default_rng(4), hard=False)
    assert np.bincount(labels).tolist() == [20] * len(TEXTURES)
    assert (ink.min(axis=(1, 2)) < 0.3).all()
    assert (ink.max(axis=(1, 2)) > 0.7).all()


CHARACTERS = (LETTERS, GREEK, SYMBOLS, CYRILLIC, HEBREW, ARABIC, GEORGIAN, PIECES)


@pytest.mark.parametrize("characters", [*CHARACTERS, AUXILIARY])
def test_every_glyph_is_drawn(characters: tuple[str, ...]) -> None:
    count = 2 * len(characters)
    ink, labels = draw_glyphs(characters, count, np.random.default_rng(5), hard=False)
    assert np.bincount(labels).tolist() == [2] * len(characters)
    # White pieces are outlines thinner than any letter's stroke.
    assert (ink.max(axis=(1, 2)) > (0.5 if characters == PIECES else 0.6)).all()


@pytest.mark.parametrize("characters", CHARACTERS)
def test_glyphs_of_different_classes_differ(characters: tuple[str, ...]) -> None:
    """Mean images of the classes are distinct: no character fell back to a placeholder box."""
    count = 40 * len(characters)
    ink, labels = draw_glyphs(characters, count, np.random.default_rng(6), hard=False)
    means = np.stack([ink[labels == c].mean(axis=0).ravel() for c in range(len(characters))])
    gaps = np.linalg.norm(means[:, None] - means[None], axis=-1)
    assert gaps[~np.eye(len(characters), dtype=bool)].min() > 0.8


def turn_of(x: float, y: float) -> float:
    """Degrees clockwise from the top, of a direction with y down."""
    return float(np.rad2deg(np.arctan2(x, -y)))


def apart(first: float, second: float) -> float:
    return abs((first - second + 180) % 360 - 180)


@pytest.mark.parametrize(("hard", "off"), [(False, 12), (True, 18)])
def test_arrows_point_where_they_say(hard: bool, off: float) -> None:
    ink, labels = draw_arrows(160, np.random.default_rng(7), hard=hard)
    y, x = np.mgrid[:32, :32].astype(float)
    for canvas, label in zip(ink, labels, strict=True):
        mass = canvas.sum()
        dx, dy = x - (canvas * x).sum() / mass, y - (canvas * y).sum() / mass
        xx, yy, xy = ((canvas * m).sum() for m in (dx * dx, dy * dy, dx * dy))
        axis = 0.5 * np.arctan2(2 * xy, xx - yy)
        along = dx * np.cos(axis) + dy * np.sin(axis)
        # The barbs draw the centre towards the tip, so the longer end is the shaft's.
        sign = -np.sign((canvas * along**3).sum())
        assert apart(turn_of(sign * np.cos(axis), sign * np.sin(axis)), 45 * label) < off


def test_short_hands_show_the_hour() -> None:
    ink, labels = draw_clocks(600, np.random.default_rng(7), hard=False)
    reach = 5.5  # within the short hand, whose width is 2.6
    angle = np.deg2rad(30 * np.arange(len(HOURS)))
    rows, columns = (np.rint(15.5 + reach * v).astype(int) for v in (-np.cos(angle), np.sin(angle)))
    seen = np.stack([ink[labels == hour].mean(axis=0)[rows, columns] for hour in range(12)])
    seen[:, 0] = np.where(np.arange(12) == 0, seen[:, 0], 0)  # where the long hand always is
    np.testing.assert_array_equal(seen.argmax(axis=1), np.arange(12))


def test_moons_are_lit_by_the_cosine_of_their_phase() -> None:
    ink, labels = draw_moons(800, np.random.default_rng(8), hard=False)
    area = ink.sum(axis=(1, 2))
    mean = np.array([area[labels == phase].mean() for phase in range(len(PHASES))])
    share = (mean - mean[0]) / (mean[4] - mean[0])
    # The rim, a tenth of the radius, is lit in every phase and hides that much of the others.
    np.testing.assert_allclose(share, (1 - np.cos(np.deg2rad(45 * np.arange(8)))) / 2, atol=0.1)
    east = (ink * (np.arange(32) - 15.5)).sum(axis=(1, 2)) / area
    assert (
        east[np.isin(labels, (1, 2, 3))].mean() > 1 > -1 > east[np.isin(labels, (5, 6, 7))].mean()
    )


def test_discs_lie_where_they_say() -> None:
    ink, labels = draw_positions(160, np.random.default_rng(8), hard=False)
    for canvas, label in zip(ink, labels, strict=True):
        parts, count = ndimage.label(canvas > 0.4, structure=np.ones((3, 3)))
        assert count == 2
        disc, ring = sorted(ndimage.find_objects(parts), key=lambda box: box[0].stop - box[0].start)
        (dy, dx), (ry, rx) = ([(s.start + s.stop) / 2 for s in box] for box in (disc, ring))
        assert apart(turn_of(dx - rx, dy - ry), 45 * label) < 14


def test_signs_are_told_apart_by_what_is_lit() -> None:
    assert [len(lit) for lit in LIT[:10]] == [6, 2, 5, 5, 4, 5, 6, 3, 7, 6]
    assert len({frozenset(lit) for lit in LIT}) == len(DIGITS)
    assert all(set(lit) <= set(ENDS) for lit in LIT)


def test_numerals_look_like_their_dots() -> None:
    rows = [text.split() for text in MATRIX]
    assert all(len(each) == 7 and {len(row) for row in each} == {5} for each in rows)
    ink, labels = draw_matrix(400, np.random.default_rng(3), hard=False)
    mean = np.array([ink[labels == numeral].mean(axis=0) for numeral in range(len(NUMERALS))])
    bitmaps = np.array([[list(row) for row in each] for each in rows]).astype(float)
    templates = np.zeros((len(NUMERALS), 32, 32))
    templates[:, 5:26, 8:23] = np.kron(bitmaps, np.ones((3, 3)))
    templates = ndimage.gaussian_filter(templates, (0, 1.5, 1.5))
    alike = np.corrcoef(mean.reshape(10, -1), templates.reshape(10, -1))[:10, 10:]
    np.testing.assert_array_equal(alike.argmax(axis=1), np.arange(10))


@pytest.mark.parametrize(
    ("draw", "classes"),
    [(draw_segments, DIGITS), (draw_matrix, NUMERALS), (draw_loops, LOOPS), (draw_moons, PHASES)],
)
@pytest.mark.parametrize("hard", [False, True])
def test_drawn_classes_differ_and_fit_the_canvas(
    draw: Draw, classes: tuple[str, ...], hard: bool
) -> None:
    ink, labels = draw(30 * len(classes), np.random.default_rng(9), hard=hard)
    assert ink.dtype == np.float32
    assert ((ink >= 0) & (ink <= 1)).all()
    assert np.bincount(labels).tolist() == [30] * len(classes)
    means = np.stack([ink[labels == c].mean(axis=0).ravel() for c in range(len(classes))])
    gaps = np.linalg.norm(means[:, None] - means[None], axis=-1)
    assert gaps[~np.eye(len(classes), dtype=bool)].min() > 0.5


def test_loops_close_through_every_quadrant() -> None:
    ink, _ = draw_loops(80, np.random.default_rng(10), hard=False)
    assert len(RATIOS) == len(LOOPS)
    for canvas in ink:
        _, count = ndimage.label(canvas > 0.3, structure=np.ones((3, 3)))
        assert count == 1
    quarters = ink.reshape(80, 2, 16, 2, 16).sum(axis=(2, 4))
    assert (quarters > 3).all()


def test_unknown_glyph_is_an_error() -> None:
    with pytest.raises(ValueError, match="no bundled font has"):
        draw_glyphs(("A", "\U000f0000"), 2, np.random.default_rng(0), hard=False)


def test_digit_blocks_are_disjoint_and_cover_the_set() -> None:
    rows = [set(range(1797)[block]) for block in BLOCKS.values()]
    assert set.union(*rows) == set(range(1797))
    assert sum(map(len, rows)) == 1797


def test_digits_cannot_be_asked_for_twice() -> None:
    with pytest.raises(ValueError, match="holds 250 digits, 251 were asked for"):
        draw_digits(251, np.random.default_rng(0), hard=False, split="val")


def test_auxiliary_set_is_large_and_apart_from_the_tasks() -> None:
    assert len(AUXILIARY) >= 100
    assert len(set(AUXILIARY)) == len(AUXILIARY)
    assert not set(AUXILIARY) & set().union(*CHARACTERS)
    images, labels = draw_auxiliary(len(AUXILIARY), seed=0)
    assert images.shape == (len(AUXILIARY), 32, 32, 3)
    assert sorted(labels.tolist()) == list(range(len(AUXILIARY)))


def test_warp_at_rest_is_a_plain_reduction() -> None:
    pose = Pose(1, np.random.default_rng(0), hard=False)
    for name in ("angle", "shear", "dx", "dy"):
        setattr(pose, name, np.zeros(1))
    pose.scale = np.ones(1)
    master = np.zeros((1, 64, 64), dtype=np.float32)
    master[0, 16:32, 40:48] = 1
    expected = master.reshape(1, 32, 2, 32, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(warp(master, np.array([0]), pose), expected, atol=1e-5)


def test_clean_style_paints_paper_and_ink() -> None:
    paper = Paper((1.0, 0.9, 0.8), (0.1, 0.2, 0.3), "plain")
    ink = np.zeros((1, 32, 32), dtype=np.float32)
    ink[:, 16:] = 1
    image = clean_style(ink, paper, np.random.default_rng(0))[0] / 255
    np.testing.assert_allclose(image[0, 0], paper.paper, atol=0.035)
    np.testing.assert_allclose(image[-1, -1], paper.ink, atol=0.035)


def test_ruling_lies_between_paper_and_ink() -> None:
    blank = np.zeros((1, 32, 32), dtype=np.float32)
    faint, strong = (
        clean_style(blank, Paper((1, 1, 1), (0, 0, 0), "lined", 8.0, 2.0, s), stream(0, "r"))
        for s in (0.2, 0.6)
    )
    assert abs(faint.min() / 255 - 0.8) < 0.04
    assert abs(strong.min() / 255 - 0.4) < 0.04
    # Lines of width 2, every 8 pixels: a quarter of the canvas.
    share = (255 - strong.astype(float)).mean() / 255 / 0.6
    assert 0.15 < share < 0.35


def test_unknown_ruling_is_an_error() -> None:
    paper = Paper((1, 1, 1), (0, 0, 0), "spiral")
    with pytest.raises(ValueError, match="unknown ruling 'spiral'"):
        clean_style(np.zeros((1, 32, 32), dtype=np.float32), paper, np.random.default_rng(0))


def test_wild_style_is_mostly_bright_on_dark() -> None:
    ink = np.zeros((400, 32, 32), dtype=np.float32)
    ink[:, 8:24, 8:24] = 1
    images = wild_style(ink, np.random.default_rng(0)).astype(float)
    inside = images[:, 8:24, 8:24].mean(axis=(1, 2, 3))
    corner = images[:, :6, :6].mean(axis=(1, 2, 3))
    assert abs((inside > corner).mean() - BRIGHT_SHARE) < 0.08
