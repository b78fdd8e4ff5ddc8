"""Every kind of data gives the images, labels and class names that were written."""

from __future__ import annotations

import gzip
import os
import pickle
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets as torchvision_datasets

from analysis.data_sources import open_source
from analysis.data_sources.prepared import PreparedSplit, prepare_split
from merge_core.errors import SuiteError
from tests.analysis.data_sources.files import (
    BATCHES,
    CIFAR10,
    cycle,
    noise,
    planes,
    spec,
    write_cifar10,
    write_folder,
    write_idx,
    write_mnist,
)

WHAT = "data of task 'a'"
AS_IT_IS = {"mean": [0.5] * 3}  # without a transform


def records(root: Path, split: str, **fields: Any) -> list[tuple[np.ndarray, int]]:
    """All records of a split, decoded."""
    source = open_source(spec(**fields), lambda name: root / name, WHAT)
    found = source.splits[split]()
    return [(np.asarray(image), label) for image, label in (found[i] for i in range(len(found)))]


def prepare(root: Path, split: str = "test", **fields: Any) -> PreparedSplit:
    """A split as it is evaluated."""
    return prepare_split(spec(**fields), None, split, lambda name: root / name, WHAT)  # type: ignore[arg-type]


def assert_same(
    found: list[tuple[np.ndarray, int]], images: np.ndarray, labels: np.ndarray
) -> None:
    assert [label for _, label in found] == labels.tolist()
    np.testing.assert_array_equal(np.stack([image for image, _ in found]), images)


@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path: Path, packed: bool) -> None:
    write_mnist(tmp_path / "m", packed=packed)
    for split, count, seed in (("train", 20, 0), ("t10k", 12, 1)):
        found = records(tmp_path, split, kind="idx", path="m")
        assert_same(found, noise(count, 6, 6, seed=seed), cycle(count, 3, seed))
    grey = prepare(tmp_path, kind="idx", path="m", **AS_IT_IS)
    assert grey.images.shape == (12, 6, 6, 3)
    assert grey.class_names == ("0", "1", "2")
    assert (grey.images[..., 0] == grey.images[..., 2]).all()


def test_torchvision_reads_our_idx_files_alike(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw")
    theirs = torchvision_datasets.MNIST(tmp_path, train=False)
    ours = records(tmp_path, "t10k", kind="torchvision", dataset="MNIST", path=".")
    assert_same(ours, theirs.data.numpy(), theirs.targets.numpy())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_cifar10_as_python_wrote_it(tmp_path: Path, protocol: int) -> None:
    whole = write_cifar10(tmp_path / "cifar-10-batches-py", protocol)
    for split, (images, labels) in whole.items():
        assert_same(records(tmp_path, split, kind="cifar", path="."), images, labels)
    inner = open_source(
        spec(kind="torchvision", dataset="CIFAR10", path="."), lambda name: tmp_path / name, WHAT
    )
    assert inner.classes == tuple(CIFAR10)


def test_cifar10_as_python_2_wrote_it(tmp_path: Path) -> None:
    """The published files: protocol 2, bytes as BINSTRING, texts as SHORT_BINSTRING."""
    images, labels = noise(4, 32, 32, 3), [3, 1, 2, 0]
    raw = planes(images).tobytes()

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t"
        + text(b"b")
        + b"tR(K\x01(K\x04M"
        + struct.pack("<H", 3072)
        + b"tcnumpy\ndtype\n("
        + text(b"u1")
        + b"K\x00K\x01tR(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<i", len(raw))
        + raw
        + b"tb"
    )
    numbers = b"(" + b"".join(b"K" + bytes([n]) for n in labels) + b"e"
    body = b"\x80\x02}(" + text(b"data") + array + text(b"labels") + b"]" + numbers + b"u."
    theirs = pickle.loads(body, encoding="latin1")  # what the bytes above mean
    np.testing.assert_array_equal(theirs["data"], planes(images))
    (tmp_path / "test_batch").write_bytes(body)
    assert_same(records(tmp_path, "test", kind="cifar", path="."), images, np.array(labels))


def test_cifar10_binary(tmp_path: Path) -> None:
    images, labels = noise(6, 32, 32, 3), cycle(6, 10)
    rows = np.column_stack([labels.astype(np.uint8), planes(images)])
    (tmp_path / "test_batch.bin").write_bytes(rows.tobytes())
    (tmp_path / "batches.meta.txt").write_text("\n".join(CIFAR10) + "\n\n")
    assert_same(records(tmp_path, "test", kind="cifar", path="."), images, labels)
    found = prepare(tmp_path, kind="cifar", path=".", **AS_IT_IS)
    assert found.class_names == tuple(CIFAR10)


def test_cifar100_has_its_fine_labels(tmp_path: Path) -> None:
    images, fine = noise(5, 32, 32, 3), cycle(5, 100)
    content = {"data": planes(images), "coarse_labels": [9] * 5, "fine_labels": fine.tolist()}
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "test").write_bytes(pickle.dumps(content, protocol=2))
    assert_same(records(tmp_path, "test", kind="cifar", path="python"), images, fine)
    rows = np.column_stack([np.full(5, 9, np.uint8), fine.astype(np.uint8), planes(images)])
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "test.bin").write_bytes(rows.tobytes())
    assert_same(records(tmp_path, "test", kind="cifar", path="binary"), images, fine)


class Trap:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("sprung",))


@pytest.mark.parametrize("place", ["data", "labels", "extra"])
def test_a_hostile_cifar_file_is_inert(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content: dict[str, Any] = {"data": planes(noise(2, 32, 32, 3)), "labels": [0, 1]}
    content[place] = Trap()
    data = pickle.dumps(content, protocol=2)
    (tmp_path / "test_batch").write_bytes(data)
    with pytest.raises(SuiteError, match=r"test_batch.*mkdir.*Nothing was run"):
        records(tmp_path, "test", kind="cifar", path=".")
    assert not (tmp_path / "sprung").exists()
    pickle.loads(data)
    assert (tmp_path / "sprung").exists()  # the trap works


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": [0]}, "1 labels for 2 images"),
        ({"labels": [0, 999]}, "no class number"),
        ({"labels": ["cat", "dog"]}, "no list of labels"),
        ({"data": np.zeros((2, 3072))}, "does not consist of bytes"),
        ({"data": np.zeros((2, 3071), np.uint8)}, "32 x 32"),
        ({"data": "text"}, "is no array"),
        ({"data": np.asfortranarray(planes(noise(2, 32, 32, 3)))}, "is no array"),
    ],
)
def test_damaged_cifar_files_say_so(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    content = {"data": planes(noise(2, 32, 32, 3)), "labels": [0, 1]} | change
    whole = pickle.dumps(content, protocol=4)
    (tmp_path / "test_batch").write_bytes(whole)
    with pytest.raises(SuiteError, match=rf"test_batch \(data of task 'a'\).*{words}"):
        records(tmp_path, "test", kind="cifar", path=".")
    (tmp_path / "test_batch").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SuiteError, match="test_batch"):
        records(tmp_path, "test", kind="cifar", path=".")


@given(
    place=st.integers(0, 10**6),
    value=st.integers(0, 255),
    cut=st.booleans(),
    protocol=st.sampled_from([2, 4, 5]),
)
@settings(max_examples=150)
def test_damage_anywhere_is_refused_or_harmless(
    damaged: dict[int, tuple[Path, bytes]], place: int, value: int, cut: bool, protocol: int
) -> None:
    path, whole = damaged[protocol]
    # Most bytes are pixels: look at the instructions around them.
    edges = [*range(400), *range(len(whole) - 400, len(whole))]
    spot = edges[place % len(edges)]
    rest = b"" if cut else bytes([value]) + whole[spot + 1 :]
    path.write_bytes(whole[:spot] + rest)
    with suppress(SuiteError):
        for image, label in records(path.parent, "test", kind="cifar", path="."):
            assert image.shape == (32, 32, 3)
            assert label >= 0


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, bytes]]:
    """A CIFAR batch in each protocol: where it lies, and its bytes."""
    found = {}
    for protocol in (2, 4, 5):
        path = tmp_path_factory.mktemp("damaged") / "test_batch"
        content = {"data": planes(noise(2, 32, 32, 3)), "labels": [0, 1]}
        found[protocol] = (path, pickle.dumps(content, protocol=protocol))
    return found


def test_a_batch_of_cifar_that_is_missing_is_no_training_split(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / BATCHES[2]).unlink()
    source = open_source(spec(kind="cifar", path="."), lambda name: tmp_path / name, WHAT)
    assert list(source.splits) == ["test"]
    (tmp_path / "test_batch").unlink()
    with pytest.raises(SuiteError, match="holds no CIFAR archive"):
        open_source(spec(kind="cifar", path="."), lambda name: tmp_path / name, WHAT)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "cannot be read as an IDX"),
        (struct.pack(">HBB3I", 0, 8, 3, 2, 6, 6) + b"x" * 71, "fewer"),
        (struct.pack(">HBB3I", 0, 8, 3, 2, 6, 6) + b"x" * 73, "more"),
        (struct.pack(">HBB3I", 0, 13, 3, 2, 6, 6) + b"x" * 72, "no array of bytes"),
        (struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**31, 2**31), "a size that no dataset has"),
        (struct.pack(">HBB3I", 0, 8, 3, 1 << 12, 1 << 10, 1 << 10), "fewer"),
    ],
)
@pytest.mark.parametrize("end", ["", ".gz"])
def test_damaged_idx_files_say_so(tmp_path: Path, data: bytes, words: str, end: str) -> None:
    path = tmp_path / f"test-images-idx3-ubyte{end}"
    path.write_bytes(gzip.compress(data) if end else data)
    with pytest.raises(SuiteError, match=rf"test-images.*{words}"):
        records(tmp_path, "test", kind="idx", path=".")


def test_idx_labels_must_be_there_and_as_many(tmp_path: Path) -> None:
    write_idx(tmp_path / "test-images-idx3-ubyte", noise(4, 6, 6))
    with pytest.raises(SuiteError, match=r"labels-idx1-ubyte.*missing.*labelled: false"):
        records(tmp_path, "test", kind="idx", path=".")
    found = records(tmp_path, "test", kind="idx", path=".", labelled=False)
    assert_same(found, noise(4, 6, 6), np.full(4, -1))
    write_idx(tmp_path / "test-labels-idx1-ubyte", cycle(3, 2))
    with pytest.raises(SuiteError, match="3 labels for 4 images"):
        records(tmp_path, "test", kind="idx", path=".")
    (tmp_path / "test-images-idx3-ubyte").rename(tmp_path / "mnist.idx")
    with pytest.raises(SuiteError, match="holds no IDX files"):
        records(tmp_path, "test", kind="idx", path=".")


def test_folders(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", {"train": 3, "val": 1, "test": 2}, ["cat", "ant", "bee"])
    theirs = torchvision_datasets.ImageFolder(str(tmp_path / "f" / "test"))
    ours = records(tmp_path, "test", kind="folder", path="f")
    assert len(ours) == len(theirs) == 6
    for (image, label), (picture, target) in zip(ours, theirs, strict=True):
        assert label == target
        np.testing.assert_array_equal(image, np.asarray(picture))
    chosen = {"kind": "folder", "path": "f", "classes": ["cat", "ant", "bee"]}
    assert [label for _, label in records(tmp_path, "test", **chosen)] == [0, 0, 1, 1, 2, 2]


def test_folders_of_other_classes_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", {"val": 1, "test": 1}, ["ant", "bee"])
    with pytest.raises(SuiteError, match=r"no folder for the class 'cow'.*1 of 3"):
        records(tmp_path, "test", kind="folder", path="f", classes=["ant", "bee", "cow"])
    with pytest.raises(SuiteError, match="'bee' that is none of the 1"):
        records(tmp_path, "test", kind="folder", path="f", classes=["ant"])
    (tmp_path / "f" / "val" / "dog").mkdir()
    with pytest.raises(SuiteError, match=r"f/test .*no folder for the class 'dog'"):
        records(tmp_path, "test", kind="folder", path="f")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SuiteError, match="holds no folder of a class"):
        records(tmp_path, "test", kind="folder", path="empty")
    with pytest.raises(SuiteError, match=r"nowhere .data of task 'a'. is not a folder"):
        records(tmp_path, "test", kind="folder", path="nowhere")


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", {"test": 2}, ["ant", "bee"])
    bad = tmp_path / "f" / "test" / "bee" / "1.png"
    whole = bad.read_bytes()
    for data in (b"", b"no image", whole[: len(whole) // 2]):
        bad.write_bytes(data)
        with pytest.raises(SuiteError, match=r"bee/1\.png \(data of task 'a'\) cannot be used"):
            prepare(tmp_path, kind="folder", path="f", transform={"size": 8}, val_share=0.01)


def test_images_of_several_sizes_need_a_transform(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", {"test": 2}, ["ant", "bee"])
    with pytest.raises(SuiteError, match=r"12 x 1[01] pixels.*transform: timm"):
        prepare(tmp_path, kind="folder", path="f", val_share=0.01, **AS_IT_IS)


def test_torchvision_datasets_of_its_own_kinds(tmp_path: Path) -> None:
    write_folder(tmp_path / "eurosat", {"2750": 2}, ["Forest", "River"])
    theirs = torchvision_datasets.EuroSAT(str(tmp_path))
    found = records(tmp_path, "all", kind="torchvision", dataset="EuroSAT", path=".")
    assert [label for _, label in found] == theirs.targets
    np.testing.assert_array_equal(found[3][0], np.asarray(theirs[3][0]))
    with pytest.raises(SuiteError, match=r"gtsrb .*is not a folder.*--download"):
        records(tmp_path, "test", kind="torchvision", dataset="GTSRB", path=".")
    with pytest.raises(SuiteError, match="does not hold SVHN"):
        records(tmp_path, "test", kind="torchvision", dataset="SVHN", path=".")


def test_numpy_archives_take_transforms_and_limits(tmp_path: Path) -> None:
    images, labels = noise(9, 8, 8, 3), cycle(9, 3)
    np.savez(tmp_path / "a.npz", test_images=images, test_labels=labels)
    assert_same(records(tmp_path, "test", file="a.npz"), images, labels)
    found = prepare(tmp_path, file="a.npz", limit=2, transform={"size": 4})
    assert found.images.shape == (2, 4, 4, 3)
    (tmp_path / "a.npz").write_bytes(b"PK no archive")
    with pytest.raises(SuiteError, match=r"a\.npz .*cannot be read"):
        prepare(tmp_path, file="a.npz", limit=2, transform={"size": 4})


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two Parquet files as the hub has them, written by the library itself."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("hub")
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "word": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
        }
    )
    for split, count, seed in (("train", 8, 0), ("test", 5, 1)):
        rows = {
            "img": [Image.fromarray(pixels) for pixels in noise(count, 7, 7, 3, seed=seed)],
            "word": [["b", "c", "a"][i % 3] for i in range(count)],
            "label": cycle(count, 2, seed).tolist(),
        }
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return folder


def test_hugging_face_datasets(hub_folder: Path, tmp_path: Path) -> None:
    given = {"kind": "huggingface", "path": str(hub_folder)}
    found = records(tmp_path, "test", **given)
    assert_same(found, noise(5, 7, 7, 3, seed=1), cycle(5, 2, 1))
    assert prepare(tmp_path, **given, **AS_IT_IS).class_names == ("no", "yes")
    words = records(tmp_path, "test", **given, label_column="word")
    assert [label for _, label in words] == [1, 2, 0, 1, 2]
    swapped = prepare(tmp_path, **given, **AS_IT_IS, classes=["yes", "no"], seed=3)
    plain = prepare(tmp_path, **given, **AS_IT_IS, seed=3)
    assert swapped.labels.tolist() == (1 - plain.labels).tolist()
    unlabelled = records(tmp_path, "test", **given, labelled=False)
    assert {label for _, label in unlabelled} == {-1}
    with pytest.raises(SuiteError, match="no column 'picture'"):
        records(tmp_path, "test", **given, image_column="picture")
    with pytest.raises(SuiteError, match="holds no images"):
        prepare(tmp_path, **given, **AS_IT_IS, image_column="word")


def test_hugging_face_datasets_from_the_cache_of_the_hub(
    hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    place = tmp_path / "datasets--org--name"
    shutil.copytree(hub_folder / "data", place / "snapshots" / commit / "data")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = records(tmp_path, "test", kind="huggingface", dataset="org/name")
    assert_same(found, noise(5, 7, 7, 3, seed=1), cycle(5, 2, 1))


def test_hugging_face_datasets_that_are_not_there(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(SuiteError, match=r"somebody/nothing .*not in the cache.*--download"):
        records(tmp_path, "test", kind="huggingface", dataset="somebody/nothing")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "test.csv").write_text("image,label\n1,2\n")
    with pytest.raises(SuiteError, match="reader 'csv'"):
        records(tmp_path, "test", kind="huggingface", path="text")
    (tmp_path / "text" / "test.csv").unlink()
    (tmp_path / "text" / "test.pkl").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(SuiteError, match="text"):
        records(tmp_path, "test", kind="huggingface", path="text")
