"""Small stand-ins for the data that presets name, each in its own format: tiny images, texts."""

from __future__ import annotations

import csv
import gzip
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from merge_core.suites.suite_spec import ExpertSpec

SIZE, CLASSES = 32, 3
COMMIT = "5" * 40
TRAIN, TEST = 24, 9  # images


def snapshot(hub: Path, name: str, kind: str = "models") -> Path:
    """The folder of a repository in the hub's cache, made if need be."""
    repository = hub / f"{kind}--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
    place = repository / "snapshots" / COMMIT
    place.mkdir(parents=True, exist_ok=True)
    return place


def pictures(rng: np.random.Generator, count: int, channels: int = 3) -> np.ndarray:
    """uint8, N x 32 x 32 x channels (N x 32 x 32 for one)."""
    shape = (count, SIZE, SIZE, channels) if channels > 1 else (count, SIZE, SIZE)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def labels_of(count: int) -> np.ndarray:
    """int64, N: the classes in turn."""
    return np.arange(count) % CLASSES


def png(image: np.ndarray) -> bytes:
    """A picture's file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def _write_hub_dataset(
    expert: ExpertSpec, hub: Path, _folder: Path, rng: np.random.Generator
) -> None:
    import datasets

    data = expert.data
    assert data is not None
    assert data.dataset is not None
    place = snapshot(hub, data.dataset, "datasets")
    image, label = data.image_column or "image", data.label_column or "label"
    kind = (
        datasets.Value("bool")
        if "PatchCamelyon" in data.dataset
        else datasets.Value("int64")
        if label == "cls"
        else datasets.ClassLabel(names=["a_cat", "a_dog", "a_horse"])
    )
    features = datasets.Features({image: datasets.Image(), label: kind})
    where = data.config or "data"
    for split, count in (("train", TRAIN), (data.test or "test", TEST)):
        labels = labels_of(count) % (2 if kind.dtype == "bool" else CLASSES)
        rows = {
            image: [{"bytes": png(p), "path": None} for p in pictures(rng, count)],
            label: labels.astype(bool if kind.dtype == "bool" else int).tolist(),
        }
        (place / where).mkdir(exist_ok=True)
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(place / where / f"{split}-00000-of-00001.parquet"))
    if data.config is not None:
        (place / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {data.config}\n  data_files:\n"
            f"  - split: train\n    path: {where}/train-*\n  - split: test\n"
            f"    path: {where}/test-*\n---\n"
        )


def _write_folder(expert: ExpertSpec, _hub: Path, folder: Path, rng: np.random.Generator) -> None:
    assert expert.data is not None
    root = folder / (expert.data.path or "")
    for split, count in (
        ("train", TRAIN),
        (expert.data.val or "", 6),
        (expert.data.test or "", TEST),
    ):
        for number, image in enumerate(pictures(rng, count)):
            place = root / split / f"class_{labels_of(count)[number]}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.png").write_bytes(png(image))


def _write_torchvision(
    expert: ExpertSpec, _hub: Path, folder: Path, rng: np.random.Generator
) -> None:
    assert expert.data is not None
    root = folder / (expert.data.path or "")
    root.mkdir(exist_ok=True)
    {"MNIST": _mnist, "SVHN": _svhn, "GTSRB": _gtsrb, "StanfordCars": _cars}[
        expert.data.dataset or ""
    ](root, rng)


def _mnist(root: Path, rng: np.random.Generator) -> None:
    place = root / "MNIST/raw"
    place.mkdir(parents=True)
    for split, count in (("train", TRAIN), ("t10k", TEST)):
        images, labels = pictures(rng, count, channels=1), labels_of(count).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            packed = gzip.compress(header + array.tobytes())
            (place / f"{split}-{name}-ubyte.gz").write_bytes(packed)


def _svhn(root: Path, rng: np.random.Generator) -> None:
    from scipy.io import savemat

    for split, count in (("train", TRAIN), ("test", TEST)):
        images = pictures(rng, count).transpose(1, 2, 3, 0)
        savemat(
            root / f"{split}_32x32.mat",
            {"X": images, "y": (labels_of(count)[:, None] - 1) % 10 + 1},
        )


def _gtsrb(root: Path, rng: np.random.Generator) -> None:
    for number, image in enumerate(pictures(rng, TRAIN)):
        place = root / f"gtsrb/GTSRB/Training/{labels_of(TRAIN)[number]:05d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number:05d}.ppm")
    place = root / "gtsrb/GTSRB/Final_Test/Images"
    place.mkdir(parents=True)
    with (root / "gtsrb/GT-final_test.csv").open("w", newline="") as stream:
        rows = csv.writer(stream, delimiter=";")
        rows.writerow(["Filename", "ClassId"])
        for number, image in enumerate(pictures(rng, TEST)):
            Image.fromarray(image).save(place / f"{number:05d}.ppm")
            rows.writerow([f"{number:05d}.ppm", int(labels_of(TEST)[number])])


def _cars(root: Path, rng: np.random.Generator) -> None:
    from scipy.io import savemat

    kit = root / "stanford_cars/devkit"
    kit.mkdir(parents=True)
    names = np.array([f"car {i}" for i in range(CLASSES)], dtype=object)
    savemat(kit / "cars_meta.mat", {"class_names": names})
    for split, count, listed in (
        ("train", TRAIN, kit / "cars_train_annos.mat"),
        ("test", TEST, root / "stanford_cars/cars_test_annos_withlabels.mat"),
    ):
        place = root / f"stanford_cars/cars_{split}"
        place.mkdir()
        rows = np.zeros(count, dtype=[("class", "O"), ("fname", "O")])
        for number, image in enumerate(pictures(rng, count)):
            (place / f"{number:05d}.png").write_bytes(png(image))
            rows[number] = (int(labels_of(count)[number]) + 1, f"{number:05d}.png")
        savemat(listed, {"annotations": rows})


def _write_texts(expert: ExpertSpec, hub: Path, _folder: Path, rng: np.random.Generator) -> None:
    import datasets

    data = expert.data
    assert data is not None
    assert data.text_columns is not None
    place = snapshot(hub, data.dataset or "", "datasets")
    own = place / (data.config or "")
    own.mkdir()
    classes = 3 if data.config == "mnli" else 2
    columns = {name: datasets.Value("string") for name in data.text_columns}
    kind = datasets.ClassLabel(names=[f"class {i}" for i in range(classes)])
    features = datasets.Features({**columns, "label": kind})
    for split, count in (("train", TRAIN), (data.test or "", TEST)):
        rows: dict[str, Any] = {name: sentences(rng, count) for name in columns}
        rows["label"] = (np.arange(count) % classes).tolist()
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(own / f"{split}-00000-of-00001.parquet"))
    configs = "".join(
        f"- config_name: {folder.name}\n  data_files:\n"
        + "".join(
            f"  - split: {file.name.partition('-')[0]}\n    path: {folder.name}/{file.name}\n"
            for file in sorted(folder.glob("*.parquet"))
        )
        for folder in sorted(place.iterdir())
        if folder.is_dir()
    )
    (place / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


def sentences(rng: np.random.Generator, count: int) -> list[str]:
    """Words of random letters, of several lengths."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))
    return ["".join(rng.choice(letters, rng.integers(3, 30))) for _ in range(count)]


WRITERS = {
    "text": _write_texts,
    "huggingface": _write_hub_dataset,
    "folder": _write_folder,
    "torchvision": _write_torchvision,
}
