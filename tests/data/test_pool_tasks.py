"""The images of the bundled pools: splits, sizes, constants, and the archive they are stored in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from analysis.data_sources.archive import read_split
from data.pool_images import (
    SPLITS,
    ImageTask,
    check_disjoint,
    limit_images,
    pixel_constants,
    write_inputs,
)
from data.pool_tasks import POOL_TASKS, Sizes, resize
from merge_core.errors import PoolError

# As many in val as in test: splits that shared a random stream would be the same images.
SMALL = Sizes(train=60, val=40, noisy_train=60, noisy_shipped=20, noisy_val=40, test=40)
EXPECTED = {"digits": (16, 1, 10), "noisy-letters": (24, 3, 26), "letters": (20, 1, 10)}
EXPECTED["shapes"] = (20, 3, 10)


@pytest.fixture(scope="module", params=POOL_TASKS)
def task(request: pytest.FixtureRequest) -> ImageTask:
    return POOL_TASKS[request.param](SMALL, 0)


def test_form(task: ImageTask) -> None:
    size, channels, classes = EXPECTED[task.name]
    assert (task.size, task.channels, len(task.class_names)) == (size, channels, classes)
    for images, labels in task.splits.values():
        assert images.dtype == np.uint8
        assert images.shape == (len(labels), size, size, channels)
        assert labels.dtype == np.int64
        assert set(labels) == set(range(classes))


def test_no_two_splits_share_an_image(task: ImageTask) -> None:
    seen = [{image.tobytes() for image in images} for images, _ in task.splits.values()]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


def test_constants_are_those_of_the_training_images(task: ImageTask) -> None:
    pixels = task.splits["train"][0].astype(np.float64) / 255
    np.testing.assert_allclose(task.mean, pixels.mean((0, 1, 2)), atol=5.1e-5)
    np.testing.assert_allclose(task.std, pixels.std((0, 1, 2)), atol=5.1e-5)


def test_the_seed_determines_drawn_images_and_does_not_touch_the_digits() -> None:
    for name, make in POOL_TASKS.items():
        first, again, other = make(SMALL, 3), make(SMALL, 3), make(SMALL, 4)
        for split in SPLITS:
            np.testing.assert_array_equal(first.splits[split][0], again.splits[split][0])
            same = np.array_equal(first.splits[split][0], other.splits[split][0])
            assert same == (name == "digits")


def test_all_real_digits_are_there_in_file_order() -> None:
    digits = POOL_TASKS["digits"](SMALL, 0)
    assert [len(labels) for _, labels in digits.splits.values()] == [1047, 250, 500]
    labels = np.concatenate([labels for _, labels in digits.splits.values()])
    np.testing.assert_array_equal(labels, load_digits().target)
    images = np.concatenate([images for images, _ in digits.splits.values()])
    means = images.reshape(-1, 8, 2, 8, 2).mean((2, 4)) * (16 / 255)  # back to 8 x 8
    original = load_digits().images
    for mean, image in zip(means[::100], original[::100], strict=True):
        assert np.corrcoef(mean.ravel(), image.ravel())[0, 1] > 0.98


def test_resizing_keeps_constants_and_channels() -> None:
    for channels in (1, 3):
        flat = np.full((2, 8, 8, channels), 77, dtype=np.uint8)
        flat[1] = 200
        large = resize(flat, 16)
        assert large.shape == (2, 16, 16, channels)
        assert (large[0] == 77).all()
        assert (large[1] == 200).all()


def shared_image(task: ImageTask) -> ImageTask:
    images, labels = task.splits["test"]
    images = images.copy()
    images[3] = task.splits["train"][0][5]
    return replace(task, splits={**task.splits, "test": (images, labels)})


def test_a_shared_image_is_noticed(task: ImageTask) -> None:
    check_disjoint(task)
    with pytest.raises(PoolError, match="train and test share 1 image"):
        check_disjoint(shared_image(task))


def test_limits(task: ImageTask) -> None:
    few = limit_images(task, 9, 0)
    for split in SPLITS:
        images, labels = few.splits[split]
        assert len(images) == len(labels) == 9
        whole = {image.tobytes(): label for image, label in zip(*task.splits[split], strict=True)}
        assert all(
            whole[image.tobytes()] == label for image, label in zip(images, labels, strict=True)
        )
    assert limit_images(task, None, 0) is task
    with pytest.raises(PoolError, match="at least 1"):
        limit_images(task, 0, 0)


def test_the_archive_is_what_pools_read(task: ImageTask, tmp_path: Path) -> None:
    path = tmp_path / "inputs.npz"
    write_inputs(path, task)
    for split in SPLITS:
        read = read_split(path, split, "x", PoolError, task.channels)  # type: ignore[arg-type]
        images, labels = task.splits[split]
        assert read.class_names == task.class_names
        if split == "train" and task.shipped:
            assert len(read.labels) == task.shipped
            known = {image.tobytes() for image in images}
            assert all(image.tobytes() in known for image in read.images)
        else:
            np.testing.assert_array_equal(read.images, images)
            np.testing.assert_array_equal(read.labels, labels)


def test_constants_of_a_plain_colour() -> None:
    images = np.zeros((2, 4, 4, 2), dtype=np.uint8)
    images[..., 1] = 51
    images[1, ..., 1] = 153
    assert pixel_constants(images) == ((0.0, 0.4), (0.0, 0.2))
