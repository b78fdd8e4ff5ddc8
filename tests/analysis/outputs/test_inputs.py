"""Evaluation inputs and heads: what is read, and that damaged files are refused in words."""

from __future__ import annotations

import pickle
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from analysis.data_sources.source import UNLABELLED
from analysis.outputs.heads import load_head
from analysis.outputs.inputs import has_labels, load_inputs, normalise_for_task
from merge_core.errors import SuiteError
from merge_core.suites.suite import Suite, load_suite
from merge_core.yaml_text import dump_yaml
from tests.evaluable import IMAGES, MEANS, SIZE, STDS, copy_evaluable, edit_arrays

TASK = "shapes"


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return copy_evaluable(tmp_path / "suite")


def archive(suite: Suite) -> Path:
    return suite.root / f"inputs/{TASK}.npz"


def head_file(suite: Suite) -> Path:
    return suite.root / f"heads/{TASK}.safetensors"


def without(suite: Suite, field: str) -> Suite:
    document = yaml.safe_load(suite.path.read_text())
    del document["experts"][TASK][field]
    suite.path.write_text(dump_yaml(document))
    return load_suite(suite.path)


class TestInputs:
    @pytest.mark.parametrize("split", ["val", "test"])
    @pytest.mark.parametrize("limit", [None, 1, 7, 1000])
    def test_what_the_file_holds(self, suite: Suite, split: str, limit: int | None) -> None:
        inputs = load_inputs(suite, TASK, split, limit)  # type: ignore[arg-type]
        with np.load(archive(suite)) as stored:
            np.testing.assert_array_equal(inputs.images, stored[f"{split}_images"][:limit])
            np.testing.assert_array_equal(inputs.labels, stored[f"{split}_labels"][:limit])
        assert len(inputs.labels) == min(limit or IMAGES, IMAGES)
        assert inputs.labels.dtype == np.int64
        assert inputs.class_names == tuple(f"{TASK}-{i}" for i in range(4))

    def test_class_names_are_numbers_where_none_are_given(self, suite: Suite) -> None:
        edit_arrays(archive(suite), class_names=None, val_labels=np.arange(IMAGES) % 3)
        assert load_inputs(suite, TASK, "val").class_names == ("0", "1", "2")

    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint64])
    def test_any_integer_labels(self, suite: Suite, dtype: type) -> None:
        edit_arrays(archive(suite), val_labels=(np.arange(IMAGES) % 4).astype(dtype))
        labels = load_inputs(suite, TASK, "val").labels
        assert labels.dtype == np.int64
        assert labels.tolist() == [i % 4 for i in range(IMAGES)]

    def test_normalisation_by_hand(self, suite: Suite) -> None:
        images = load_inputs(suite, TASK, "val").images
        got = normalise_for_task(images, suite, TASK)
        assert got.shape == (IMAGES, 3, SIZE, SIZE)
        assert got.dtype == torch.float32
        for n, row, column, channel in ((0, 0, 0, 0), (3, 5, 11, 1), (19, 15, 2, 2)):
            by_hand = (images[n, row, column, channel] / 255 - MEANS[TASK][channel]) / STDS[TASK][
                channel
            ]
            assert got[n, channel, row, column].item() == pytest.approx(by_hand, abs=1e-5)

    @pytest.mark.parametrize(
        ("arrays", "words"),
        [
            ({"val_images": None}, "val_images"),
            ({"val_labels": np.zeros(IMAGES - 1, int)}, "one class number per image"),
            ({"val_labels": np.zeros((IMAGES, 1), int)}, "one class number per image"),
            ({"val_labels": np.full(IMAGES, -1)}, "one class number per image, from 0"),
            ({"val_labels": np.full(IMAGES, 0.7)}, "float64, not integers"),
            ({"val_labels": np.full(IMAGES, "cat")}, "not integers"),
            ({"val_labels": np.array(3)}, "not a numpy archive"),
            ({"val_images": np.array(3)}, "not a numpy archive"),
            ({"val_images": np.zeros((IMAGES, SIZE, SIZE, 3))}, "must be uint8.*got float64"),
            ({"val_images": np.zeros((IMAGES, SIZE, SIZE), np.uint8)}, r"shape N x .*\(20, 16, 16"),
            ({"val_images": np.zeros((IMAGES, 3, SIZE, SIZE), np.uint8)}, "must be uint8"),
            (
                {
                    "val_images": np.zeros((0, SIZE, SIZE, 3), np.uint8),
                    "val_labels": np.zeros(0, int),
                },
                "one class number per image",
            ),
        ],
    )
    def test_malformed_arrays(
        self, suite: Suite, arrays: dict[str, np.ndarray | None], words: str
    ) -> None:
        edit_arrays(archive(suite), **arrays)
        with pytest.raises(SuiteError, match=rf"(?s)inputs/{TASK}\.npz.*{words}"):
            load_inputs(suite, TASK, "val")
        load_inputs(suite, TASK, "test")  # the other split is as it was

    def test_labels_may_be_left_out(self, suite: Suite) -> None:
        edit_arrays(archive(suite), val_labels=None)
        inputs = load_inputs(suite, TASK, "val")
        assert (inputs.labels == UNLABELLED).all()
        assert inputs.labels.shape == (len(inputs.images),)
        assert (has_labels(suite, TASK, "val"), has_labels(suite, TASK, "test")) == (False, True)
        archive(suite).write_bytes(b"PK no archive")
        with pytest.raises(SuiteError, match=rf"inputs/{TASK}\.npz.*cannot be read"):
            has_labels(suite, TASK, "val")

    @pytest.mark.parametrize("key", ["val_images", "val_labels", "class_names"])
    def test_pickled_objects_are_never_opened(self, suite: Suite, key: str, tmp_path: Path) -> None:
        trap = tmp_path / "trap"
        edit_arrays(archive(suite), **{key: np.array([Trap(str(trap))] * IMAGES, dtype=object)})
        with pytest.raises(SuiteError, match="not a numpy archive"):
            load_inputs(suite, TASK, "val")
        assert not trap.exists()
        pickle.loads(pickle.dumps(Trap(str(trap))))
        assert trap.exists()  # the trap works: opening the object would have sprung it

    def test_other_files_under_that_name(self, suite: Suite, tmp_path: Path) -> None:
        whole = archive(suite).read_bytes()
        lone = tmp_path / "lone.npy"
        np.save(lone, np.zeros(3))
        texts = [b"", b"a text file\n", whole[: len(whole) // 2], lone.read_bytes()]
        for content in [*texts, pickle.dumps({"a": 1})]:
            archive(suite).write_bytes(content)
            with pytest.raises(SuiteError, match=rf"inputs/{TASK}\.npz \(data of task '{TASK}'\)"):
                load_inputs(suite, TASK, "val")
        archive(suite).unlink()
        with pytest.raises(SuiteError, match="cannot be read"):
            load_inputs(suite, TASK, "val")

    @pytest.mark.parametrize("compressed", [False, True])
    def test_damage_anywhere_never_ends_in_a_traceback(
        self, suite: Suite, compressed: bool
    ) -> None:
        with np.load(archive(suite)) as stored:
            arrays = dict(stored)
        (np.savez_compressed if compressed else np.savez)(archive(suite), **arrays)
        whole = archive(suite).read_bytes()
        source = np.random.default_rng(0)
        refused = 0
        for _ in range(150):
            damaged = bytearray(whole)
            for place in source.integers(0, len(whole), 3):
                damaged[place] = source.integers(256)
            archive(suite).write_bytes(damaged)
            with suppress(SuiteError):  # and nothing else
                load_inputs(suite, TASK, "val")
                continue
            refused += 1
        assert refused > 10

    def test_no_data(self, suite: Suite) -> None:
        bare = without(suite, "data")
        for read in (
            lambda: load_inputs(bare, TASK, "val"),
            lambda: normalise_for_task(np.zeros((1, 2, 2, 3), np.uint8), bare, TASK),
        ):
            with pytest.raises(SuiteError, match=f"Task '{TASK}' has no data; add 'data:'"):
                read()


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


class TestHead:
    def test_logits_by_hand(self, suite: Suite) -> None:
        stored = load_file(head_file(suite))
        features = torch.randn(5, 16)
        got = load_head(suite, TASK).logits(features)
        by_hand = np.einsum("nw,cw->nc", features.numpy(), stored["weight"].numpy())
        np.testing.assert_allclose(got.numpy(), by_hand + stored["bias"].numpy(), atol=1e-5)

    @pytest.mark.parametrize("prefix", ["head.", "model.fc.", "module."])
    def test_a_prefix_is_allowed(self, suite: Suite, prefix: str) -> None:
        plain = load_head(suite, TASK)
        save_file({prefix + k: v for k, v in load_file(head_file(suite)).items()}, head_file(suite))
        assert torch.equal(load_head(suite, TASK).weight, plain.weight)
        assert torch.equal(load_head(suite, TASK).bias, plain.bias)

    def test_without_bias_it_is_zero(self, suite: Suite) -> None:
        weight = load_file(head_file(suite))["weight"].half()
        save_file({"weight": weight}, head_file(suite))
        head = load_head(suite, TASK)
        assert head.weight.dtype == torch.float32
        assert torch.equal(head.bias, torch.zeros(4))
        assert torch.equal(head.weight, weight.float())

    @pytest.mark.parametrize(
        ("tensors", "words"),
        [
            ({"bias": torch.zeros(4)}, "must hold a 'weight'"),
            ({"weight": torch.zeros(4)}, "must hold a 'weight' of shape classes x width"),
            ({"kernel": torch.zeros(4, 16)}, "must hold a 'weight'"),
            ({"weights": torch.zeros(4, 16)}, "must hold a 'weight'"),
            ({"weight": torch.zeros(4, 16), "bias": torch.zeros(3)}, "disagree"),
            ({"weight": torch.full((4, 16), torch.nan)}, "NaN or infinite"),
            ({"a.weight": torch.ones(4, 16), "b.weight": torch.zeros(4, 16)}, "several layers"),
        ],
    )
    def test_malformed_heads(
        self, suite: Suite, tensors: dict[str, torch.Tensor], words: str
    ) -> None:
        save_file(tensors, head_file(suite))
        with pytest.raises(SuiteError, match=rf"(?s){TASK}.*{words}"):
            load_head(suite, TASK)

    def test_missing_or_foreign_file(self, suite: Suite) -> None:
        head_file(suite).write_text("not weights")
        with pytest.raises(SuiteError, match=f"Head of task '{TASK}': .*safetensors"):
            load_head(suite, TASK)
        head_file(suite).unlink()
        with pytest.raises(SuiteError, match=f"Head of task '{TASK}': .*does not exist"):
            load_head(suite, TASK)

    def test_no_head(self, suite: Suite) -> None:
        with pytest.raises(SuiteError, match=f"Task '{TASK}' has no head; add 'head:'"):
            load_head(without(suite, "head"), TASK)
