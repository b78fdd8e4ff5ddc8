"""Datasets of a user's own, on small files written here in the very formats."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from data.pool_images import ImageTask
from data.vision_datasets import KNOWN, VISION_DATASETS, load_vision_dataset
from merge_core.errors import PoolError

Rows = tuple[np.ndarray, np.ndarray]


def noise(count: int, shape: tuple[int, ...], classes: int, seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8), np.arange(count) % classes


def write_pickle(path: Path, content: dict[str, object]) -> list[str]:
    """Write as the CIFAR archives are; returns name and MD5 as torchvision lists them."""
    data = pickle.dumps(content, protocol=2)
    path.write_bytes(data)
    return [path.name, hashlib.md5(data).hexdigest()]


def write_cifar10(root: Path, patch: pytest.MonkeyPatch) -> tuple[Rows, Rows]:
    """Five training batches and a test batch: 3072 bytes an image, red, green, blue planes."""
    folder = root / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    train, test = noise(100, (32, 32, 3), 10, 0), noise(20, (32, 32, 3), 10, 1)

    def batch(name: str, images: np.ndarray, labels: np.ndarray) -> list[str]:
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        return write_pickle(folder / name, {"data": planes, "labels": labels.tolist()})

    parts = np.split(np.arange(100), 5)
    listed = [batch(f"data_batch_{i + 1}", *(a[p] for a in train)) for i, p in enumerate(parts)]
    patch.setattr(datasets.CIFAR10, "train_list", listed)
    patch.setattr(datasets.CIFAR10, "test_list", [batch("test_batch", *test)])
    names = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    _, md5 = write_pickle(folder / "batches.meta", {"label_names": names})
    patch.setattr(
        datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5}
    )
    return train, test


def write_cifar100(root: Path, patch: pytest.MonkeyPatch) -> tuple[Rows, Rows]:
    """One training and one test file, with fine and coarse labels."""
    folder = root / datasets.CIFAR100.base_folder
    folder.mkdir(parents=True)
    train, test = noise(200, (32, 32, 3), 100, 2), noise(100, (32, 32, 3), 100, 3)

    def whole(name: str, images: np.ndarray, labels: np.ndarray) -> list[str]:
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        content = {
            "data": planes,
            "fine_labels": labels.tolist(),
            "coarse_labels": (labels // 5).tolist(),
        }
        return write_pickle(folder / name, content)

    patch.setattr(datasets.CIFAR100, "train_list", [whole("train", *train)])
    patch.setattr(datasets.CIFAR100, "test_list", [whole("test", *test)])
    names = {"fine_label_names": [f"fine{i}" for i in range(100)]}
    _, md5 = write_pickle(folder / "meta", names)
    patch.setattr(
        datasets.CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": md5}
    )
    return train, test


def write_mnist(root: Path, packed: bool = False) -> tuple[Rows, Rows]:
    """IDX files: magic number, sizes (big-endian), bytes."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    train, test = noise(60, (28, 28), 10, 4), noise(20, (28, 28), 10, 5)
    for prefix, (images, labels) in (("train", train), ("t10k", test)):
        contents = {
            f"{prefix}-images-idx3-ubyte": struct.pack(">IIII", 0x803, len(images), 28, 28)
            + images.tobytes(),
            f"{prefix}-labels-idx1-ubyte": struct.pack(">II", 0x801, len(labels))
            + labels.astype(np.uint8).tobytes(),
        }
        for name, content in contents.items():
            (folder / name).write_bytes(content)
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return (train[0][..., None], train[1]), (test[0][..., None], test[1])


def pictures(folder: Path, prefix: str, count: int, value: int, size: int = 64) -> list[str]:
    """JPEG files of one grey level each; returns their names."""
    folder.mkdir(parents=True)
    names = [f"{prefix}_{i}.JPEG" for i in range(count)]
    for i, name in enumerate(names):
        level = np.full((size, size, 3), value + i, dtype=np.uint8)
        Image.fromarray(level).save(folder / name, quality=95)
    return names


CLASSES = {"n01443537": 40, "n01629819": 120, "n01641577": 200}  # grey level of each


def write_tiny(root: Path) -> None:
    """Tiny-ImageNet: train/<class>/images and boxes, val/images with annotations, words.txt."""
    root.mkdir(parents=True)
    lines = []
    for number, (name, value) in enumerate(CLASSES.items()):
        files = pictures(root / "train" / name / "images", name, 10, value)
        boxes = "".join(f"{file}\t0\t0\t62\t62\n" for file in files)
        (root / "train" / name / f"{name}_boxes.txt").write_text(boxes)
        place = root / "val" / "images"
        place.mkdir(parents=True, exist_ok=True)
        for i in range(2):
            file = f"val_{2 * i + 7 * number}.JPEG"
            level = np.full((64, 64, 3), value + 20 + i, dtype=np.uint8)
            Image.fromarray(level).save(place / file, quality=95)
            lines.append(f"{file}\t{name}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\nn01629819\tnewt\n")


def write_folders(root: Path, size: int = 40) -> None:
    for part, count in (("train", 6), ("val", 2)):
        for name, value in (("cat", 50), ("dog", 150)):
            pictures(root / part / name, part, count, value + (20 if part == "val" else 0), size)


def contents(split: Rows) -> set[tuple[bytes, int]]:
    return {(image.tobytes(), int(label)) for image, label in zip(*split, strict=True)}


def check_partition(task: ImageTask, train: Rows, test: Rows) -> None:
    """Validation comes from training, without overlap; test is the dataset's own."""
    np.testing.assert_array_equal(task.splits["test"][0], test[0])
    np.testing.assert_array_equal(task.splits["test"][1], test[1])
    fitting, held = contents(task.splits["train"]), contents(task.splits["val"])
    assert not fitting & held
    assert fitting | held == contents(train)
    held_labels = task.splits["val"][1]
    assert set(held_labels) == set(train[1])  # every class is there


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = write_cifar10(tmp_path, monkeypatch)
    task = load_vision_dataset("cifar10", tmp_path)
    check_partition(task, train, test)
    assert task.class_names[3] == "cat"
    assert len(task.splits["val"][1]) == 10


def test_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = write_cifar100(tmp_path, monkeypatch)
    task = load_vision_dataset("cifar100", tmp_path)
    check_partition(task, train, test)
    assert len(task.class_names) == 100
    assert (task.size, task.channels) == (32, 3)


@pytest.mark.parametrize("packed", [False, True])
def test_mnist(tmp_path: Path, packed: bool) -> None:
    train, test = write_mnist(tmp_path, packed)
    task = load_vision_dataset("mnist", tmp_path)
    check_partition(task, train, test)
    assert (task.size, task.channels, len(task.class_names)) == (28, 1, 10)


def test_tiny_imagenet(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny-imagenet-200")
    task = load_vision_dataset("folder", tmp_path / "tiny-imagenet-200")
    assert task.class_names == ("goldfish", "newt", "n01641577")
    assert task.title == "tiny-imagenet-200"
    assert task.size == 64
    assert [len(labels) for _, labels in task.splits.values()] == [27, 3, 6]
    levels = list(CLASSES.values())
    for split, low, high in (("train", -2, 12), ("val", -2, 12), ("test", 17, 24)):
        for image, label in zip(*task.splits[split], strict=True):
            assert low <= image.mean() - levels[label] <= high, split


def test_plain_class_folders_are_resized(tmp_path: Path) -> None:
    write_folders(tmp_path)
    task = load_vision_dataset("folder", tmp_path, size=24)
    assert task.class_names == ("cat", "dog")
    assert task.size == 24
    assert [len(labels) for _, labels in task.splits.values()] == [10, 2, 4]
    for image, label in zip(*task.splits["test"], strict=True):
        assert abs(image.mean() - (70.5, 170.5)[label]) < 3


def test_constants_belong_to_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path / "a", monkeypatch)
    write_cifar100(tmp_path / "b", monkeypatch)
    write_mnist(tmp_path / "c")
    write_folders(tmp_path / "d")
    tasks = {
        name: load_vision_dataset(name, tmp_path / place)
        for name, place in zip(VISION_DATASETS, "abcd", strict=True)
    }
    # Published per-channel values of the four training sets, to two digits.
    means = {"cifar10": (0.49, 0.48, 0.45), "cifar100": (0.51, 0.49, 0.44), "mnist": (0.13,)}
    stds = {"cifar10": (0.25, 0.24, 0.26), "cifar100": (0.27, 0.26, 0.28), "mnist": (0.31,)}
    means["folder"], stds["folder"] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for name, task in tasks.items():
        assert task.mean == pytest.approx(means[name], abs=0.0051), name
        assert task.std == pytest.approx(stds[name], abs=0.0051), name
        assert len(task.mean) == len(task.std) == task.channels
    assert tasks["cifar10"].mean != tasks["cifar100"].mean
    assert set(KNOWN) == {"cifar10", "cifar100", "mnist"}


def test_the_seed_determines_the_validation_split(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    first, again, other = (load_vision_dataset("mnist", tmp_path, seed) for seed in (0, 0, 1))
    assert contents(first.splits["val"]) == contents(again.splits["val"])
    assert contents(first.splits["val"]) != contents(other.splits["val"])


def test_a_limit(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    task = load_vision_dataset("mnist", tmp_path, limit=7)
    assert [len(labels) for _, labels in task.splits.values()] == [7, 7, 7]
    with pytest.raises(PoolError, match="at least 1"):
        load_vision_dataset("mnist", tmp_path, limit=0)


def test_what_is_missing(tmp_path: Path) -> None:
    for name in VISION_DATASETS:
        with pytest.raises(PoolError, match="is not a folder"):
            load_vision_dataset(name, tmp_path / "absent")
    for name, known in KNOWN.items():
        with pytest.raises(PoolError, match=f"does not hold {known.title}"):
            load_vision_dataset(name, tmp_path)
    with pytest.raises(PoolError, match="holds no folder train/"):
        load_vision_dataset("folder", tmp_path)
    with pytest.raises(PoolError, match="Choose one of"):
        load_vision_dataset("imagenet", tmp_path)


def test_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, monkeypatch)
    write_mnist(tmp_path)
    batch = tmp_path / datasets.CIFAR10.base_folder / "data_batch_2"
    batch.write_bytes(batch.read_bytes()[:-10])
    with pytest.raises(PoolError, match="CIFAR-10"):
        load_vision_dataset("cifar10", tmp_path)
    labels = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-10])
    with pytest.raises(PoolError, match="MNIST"):
        load_vision_dataset("mnist", tmp_path)
    labels.write_bytes(b"no idx file")
    with pytest.raises(PoolError, match="MNIST"):
        load_vision_dataset("mnist", tmp_path)


def test_faulty_folders(tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        write_folders(tmp_path / name)
        return tmp_path / name

    empty = fresh("empty")
    (empty / "train" / "bird").mkdir()
    (empty / "val" / "bird").mkdir()
    with pytest.raises(PoolError, match="bird"):
        load_vision_dataset("folder", empty)
    bare = tmp_path / "bare"
    (bare / "train").mkdir(parents=True)
    (bare / "val").mkdir()
    with pytest.raises(PoolError, match="Give every class a folder"):
        load_vision_dataset("folder", bare)
    odd = fresh("odd")
    pictures(odd / "train" / "emu", "x", 2, 9)
    with pytest.raises(PoolError, match=r"different classes \(emu\)"):
        load_vision_dataset("folder", odd)
    foreign = fresh("foreign")
    (foreign / "train" / "cat" / "train_0.JPEG").write_text("no image")
    with pytest.raises(PoolError, match="cannot be read as an image"):
        load_vision_dataset("folder", foreign)
    lone = fresh("lone")
    for i in range(1, 6):
        (lone / "train" / "dog" / f"train_{i}.JPEG").unlink()
    with pytest.raises(PoolError, match="at least two"):
        load_vision_dataset("folder", lone)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no images"),
        ("val_0.JPEG n01443537\n", "line 1"),
        ("val_0.JPEG\tn999\t0\t0\t1\t1\n", "line 1"),
        ("absent.JPEG\tn01443537\t0\t0\t1\t1\n", "cannot be read"),
    ],
)
def test_faulty_annotations(tmp_path: Path, text: str, message: str) -> None:
    root = tmp_path / "tiny"
    write_tiny(root)
    (root / "val" / "val_annotations.txt").write_text(text)
    with pytest.raises(PoolError, match=message):
        load_vision_dataset("folder", root)
