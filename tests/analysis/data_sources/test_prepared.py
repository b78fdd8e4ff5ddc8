"""Decoded images in the cache: what is kept, when it is made again, and what a suite gives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

import analysis.data_sources.prepared as prepared_module
import analysis.outputs.suite_outputs as outputs_module
from analysis.data_sources.prepared import PreparedSplit, prepare_split
from analysis.data_sources.source import UNLABELLED
from analysis.evaluation.evaluator import Evaluator
from analysis.outputs.inputs import has_labels, load_inputs, normalise_for_task, normalise_pixels
from analysis.outputs.prepared_inputs import PREPARED
from merge_core.errors import Cancelled, OutputError, SuiteError
from merge_core.progress import Progress
from merge_core.suites.data_files import content_digest
from merge_core.suites.data_spec import DataSpec
from merge_core.suites.suite import Suite, load_suite
from merge_core.yaml_text import dump_yaml
from tests.analysis.data_sources.files import (
    cycle,
    noise,
    spec,
    write_folder,
    write_idx,
    write_mnist,
)
from tests.evaluable import MEANS, STDS, TASKS, copy_evaluable, edit_arrays

WHAT = "data of task 'a'"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def prepare(
    root: Path, split: str = "test", progress: Progress | None = None, **fields: Any
) -> PreparedSplit:
    """A split of the IDX files in `root`, but for the given fields (None leaves one out)."""
    whole = {"kind": "idx", "path": "m", "mean": [0.5] * 3} | fields
    data = spec(**{name: value for name, value in whole.items() if value is not None})
    return prepare_split(data, None, split, lambda n: root / n, WHAT, progress)  # type: ignore[arg-type]


def test_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "m")
    first = prepare(tmp_path)
    order = np.random.default_rng(0).permutation(12)
    expected = noise(12, 6, 6, seed=1)[order]
    np.testing.assert_array_equal(first.images, np.stack([expected] * 3, axis=-1))
    assert first.labels.tolist() == cycle(12, 3, 1)[order].tolist()
    monkeypatch.setattr(prepared_module, "open_source", None)
    again = prepare(tmp_path)
    np.testing.assert_array_equal(first.images, again.images)
    assert (again.labels.tolist(), again.class_names) == (first.labels.tolist(), first.class_names)


def test_what_changed_is_decoded_again(tmp_path: Path) -> None:
    write_mnist(tmp_path / "m")
    first = prepare(tmp_path)
    write_idx(tmp_path / "m" / "t10k-labels-idx1-ubyte", (cycle(12, 3, 1) + 1) % 3)
    assert prepare(tmp_path).labels.tolist() == ((first.labels + 1) % 3).tolist()
    assert len(prepare(tmp_path, limit=5).labels) == 5
    np.testing.assert_array_equal(prepare(tmp_path, limit=5).images, first.images[:5])
    assert prepare(tmp_path, transform={"size": 3}, mean=None).images.shape == (12, 3, 3, 3)
    assert prepare(tmp_path, seed=1).labels.tolist() != prepare(tmp_path).labels.tolist()


def test_what_was_damaged_is_decoded_again(tmp_path: Path, cache: Path) -> None:
    write_mnist(tmp_path / "m")
    first = prepare(tmp_path)
    expected = np.array(first.images)
    for suffix in (".npy", ".json"):
        (path,) = (cache / "images").glob(f"*{suffix}")
        for content in (b"", path.read_bytes()[:90], b'{"labels": [1]}'):
            path.write_bytes(content)
            np.testing.assert_array_equal(prepare(tmp_path).images, expected)
        path.unlink()
        np.testing.assert_array_equal(prepare(tmp_path).images, expected)


def test_nothing_half_decoded_is_kept(tmp_path: Path, cache: Path) -> None:
    write_mnist(tmp_path / "m")
    seen: list[int] = []
    progress = Progress(lambda done, total, label: seen.append(done))
    progress.listener = lambda done, total, label: (seen.append(done), progress.cancel.set())[0]
    with pytest.raises(Cancelled):
        prepare(tmp_path, progress=progress)
    assert seen == [0]
    assert list((cache / "images").iterdir()) == []
    (cache / "images").rmdir()
    (cache / "images").write_text("in the way")
    with pytest.raises(OutputError, match="could not be written"):
        prepare(tmp_path)


def test_the_cache_stays_within_its_size(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path / "m")
    monkeypatch.setattr(prepared_module, "MOST_BYTES", 4000)  # two splits of 12 x 6 x 6 x 3 bytes
    for seed in range(6):
        prepare(tmp_path, seed=seed)
        for age, path in enumerate(sorted((cache / "images").iterdir())):
            os.utime(path, (age, age))
    assert sum(path.stat().st_size for path in (cache / "images").iterdir()) <= 4000


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"classes": ["one", "two"]}, r"image \d+ of t10k.*its label is 2, and there are 2"),
        ({"classes": ["one", "one", "two"]}, "each once"),
        ({"classes": "nowhere.txt"}, r"nowhere\.txt .classes of data.*cannot be read"),
        ({"val": "dev"}, "no split 'dev'"),
    ],
)
def test_classes_that_do_not_fit(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    write_mnist(tmp_path / "m")
    with pytest.raises(SuiteError, match=words):
        prepare(tmp_path, **fields)


def test_classes_from_a_file(tmp_path: Path) -> None:
    write_mnist(tmp_path / "m")
    (tmp_path / "names.txt").write_text("nought\n one \n\ntwo\n")
    assert prepare(tmp_path, classes="names.txt").class_names == ("nought", "one", "two")


def test_a_class_that_is_not_listed(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz",
        test_images=noise(6, 4, 4, 3),
        test_labels=cycle(6, 3),
        class_names=np.array(["x", "y", "z"]),
    )
    given = {"kind": "numpy", "file": "a.npz", "path": None, "val_share": 0.01}
    found = prepare(tmp_path, **given, classes=["z", "x", "y"])
    plain = prepare(tmp_path, **given)
    assert [found.class_names[i] for i in found.labels] == [
        plain.class_names[i] for i in plain.labels
    ]
    with pytest.raises(SuiteError, match="its class is 'y', which is not among"):
        prepare(tmp_path, **given, classes=["z", "x"])
    with pytest.raises(SuiteError, match=r"no class 'w'. There is x, y, z"):
        prepare(tmp_path, **given, classes=["z", "x", "w"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "the kind 'numpy' needs 'file'"),
        ({"kind": "folder"}, "the kind 'folder' needs 'path'"),
        ({"kind": "folder", "file": "a.npz", "path": "f"}, "'folder' takes no 'file', only path"),
        ({"kind": "idx", "path": "f", "dataset": "MNIST"}, "takes no 'dataset'"),
        ({"kind": "torchvision", "path": "f", "dataset": "LSUN"}, "no dataset 'LSUN'.*SVHN"),
        ({"kind": "huggingface"}, "either 'path'.*or 'dataset'"),
        ({"kind": "huggingface", "path": "p", "dataset": "a/b"}, "either 'path'.*or 'dataset'"),
        ({"kind": "zip", "path": "f"}, "Input should be 'numpy', 'folder'"),
        ({"file": "a", "transform": "timm", "mean": [0, 0, 0]}, "its own mean and std"),
        ({"file": "a", "transform": "tim"}, "should be 'timm' or 'open_clip'"),
        ({"file": "a", "transform": {"size": 8, "crop": 1}}, "Extra inputs"),
        ({"file": "a", "val": "x", "test": "x", "val_share": 1}, "less than 1"),
        ({"file": "a", "limit": 0}, "greater than or equal to 1"),
        ({"file": "a", "std": [1, 0, 1]}, "greater than 0"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){words}"):
        DataSpec.model_validate(fields)


def test_what_is_dumped_means_the_same() -> None:
    """As suite.yaml is written from a spec."""
    for fields in ({"file": "a"}, {"file": "a", "std": [1, 1, 1]}, {"kind": "folder", "path": "f"}):
        data = spec(**fields)
        for again in (data.model_dump(), data.model_dump(exclude_none=True)):
            read = spec(**again)
            assert read == data
            assert (read.plain, read.normalised_only) == (data.plain, data.normalised_only)
    assert spec(file="a").plain
    assert not spec(file="a", limit=3).plain


def test_a_folder_is_known_by_its_content(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", {"test": 2}, ["x", "y"])
    write_folder(tmp_path / "b", {"test": 2}, ["x", "y"])
    first = content_digest(tmp_path / "a")
    assert content_digest(tmp_path / "b") == first
    (tmp_path / "b" / ".hidden").write_text("nothing")
    assert content_digest(tmp_path / "b") == first
    seen = {first}
    path = tmp_path / "b" / "test" / "x" / "0.png"
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    seen.add(content_digest(tmp_path / "b"))
    path.rename(path.with_name("9.png"))
    seen.add(content_digest(tmp_path / "b"))
    path.with_name("9.png").unlink()
    seen.add(content_digest(tmp_path / "b"))
    assert len(seen) == 4


def as_folders(suite: Suite, **fields: Any) -> Suite:
    """The suite with its archives' images as files, described as a folder for each task."""
    from PIL import Image

    document = yaml.safe_load(suite.path.read_text())
    for task in suite.tasks:
        with np.load(suite.root / f"inputs/{task}.npz") as archive:
            for split in ("val", "test"):
                pairs = zip(archive[f"{split}_images"], archive[f"{split}_labels"], strict=True)
                for number, (image, label) in enumerate(pairs):
                    place = (
                        suite.root / "images" / task / split / str(archive["class_names"][label])
                    )
                    place.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(image).save(place / f"{number:03}.png")
                for name in archive["class_names"]:
                    (suite.root / "images" / task / split / str(name)).mkdir(exist_ok=True)
        data = document["experts"][task].pop("data")
        document["experts"][task]["data"] = {
            "kind": "folder",
            "path": f"images/{task}",
            "mean": data["mean"],
            "std": data["std"],
            **fields,
        }
    suite.path.write_text(dump_yaml(document))
    return load_suite(suite.path)


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return copy_evaluable(tmp_path / "suite")


def test_accuracies_do_not_depend_on_how_the_images_are_stored(suite: Suite) -> None:
    before = Evaluator(suite).experts(suite.tasks)
    digests = [suite.data_digest(task) for task in suite.tasks]
    changed = as_folders(suite)
    assert [has_labels(changed, task, "val") for task in TASKS] == [True] * len(TASKS)
    after = Evaluator(changed).experts(suite.tasks)
    assert after["correct"].tolist() == before["correct"].tolist()
    assert 0 < after["accuracy"].min() < 1
    assert not set(digests) & {changed.data_digest(task) for task in suite.tasks}


def test_large_splits_are_normalised_a_batch_at_a_time(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TASKS[0]
    whole = Evaluator(suite)
    expected = whole.experts([task])["correct"].tolist()
    monkeypatch.setattr(PREPARED, "fits", lambda size, device: False)  # as if it were too large
    sizes: list[int] = []

    def watched(images: np.ndarray, *rest: Any) -> torch.Tensor:
        sizes.append(len(images))
        return normalise_for_task(images, *rest)

    monkeypatch.setattr(outputs_module, "normalise_for_task", watched)
    monkeypatch.setattr(outputs_module, "READ", 6)
    streamed = Evaluator(as_folders(suite))
    assert streamed.experts([task])["correct"].tolist() == expected
    assert max(sizes) == 6
    some = np.array([7, 2, 11])
    raw = streamed.outputs.raw_inputs(task, "val").images[some]
    torch.testing.assert_close(
        streamed.outputs.pixels(task, "val", some),
        normalise_pixels(raw, MEANS[task], STDS[task]),
        rtol=0,
        atol=0,
    )


def test_images_without_labels(suite: Suite) -> None:
    changed = as_folders(suite, labelled=False)
    task = TASKS[0]
    inputs = load_inputs(changed, task, "val")
    assert set(inputs.labels.tolist()) == {UNLABELLED}
    assert not has_labels(changed, task, "val")
    with pytest.raises(SuiteError, match="have no labels"):
        Evaluator(changed).experts([task])


def test_a_plain_archive_takes_no_room_in_the_cache(suite: Suite, cache: Path) -> None:
    load_inputs(suite, TASKS[0], "val")
    assert not (cache / "images").exists()
    edit_arrays(suite.root / f"inputs/{TASKS[0]}.npz", val_labels=None)
    assert not has_labels(suite, TASKS[0], "val")
