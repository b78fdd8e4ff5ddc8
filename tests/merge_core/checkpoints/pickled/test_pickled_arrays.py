"""Numpy arrays in pickled state dicts: what ``pickle.load`` would give, without running it."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.pickled.arrays import CODES
from merge_core.errors import CheckpointError

rng = np.random.default_rng(0)
NUMBERS = rng.integers(0, 2, (3, 4)) + rng.integers(0, 9, (3, 4)) / 2
ARRAYS: dict[str, Any] = {
    **{code: NUMBERS.astype(code) for code in CODES},
    "fortran": np.asfortranarray(NUMBERS),
    "turned": NUMBERS.astype("f4").T,
    "kernel": np.asfortranarray(rng.normal(size=(2, 3, 4, 5)).astype("f4")),
    "strided": NUMBERS[::2, 1:],
    "one": np.array(2.5),
    "large": rng.normal(size=(200, 300)).astype("f4"),
}
# Texts, objects and foreign byte orders are no weights.
OTHERS: dict[str, Any] = {
    "texts": np.array(["a", "b"]),
    "objects": np.array([{}, None], dtype=object),
    "big": NUMBERS.astype(">f4"),
    "times": np.array(["2020-01-01"], dtype="M8[D]"),
    "scalar": np.float32(1.5),
    "note": "a text",
}


def assert_holds_arrays(path: Path) -> None:
    model = Checkpoint(path)
    assert sorted(model) == sorted(ARRAYS)
    for name, value in ARRAYS.items():
        assert model.info(name).shape == value.shape
        assert np.array_equal(model.tensor(name).numpy(), value)
        assert model.tensor(name).numpy().dtype == value.dtype


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_come_back_from_plain_pickles(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps({**ARRAYS, **OTHERS}, protocol=protocol))
    assert_holds_arrays(path)
    path.write_bytes(pickle.dumps({"model": {**ARRAYS, **OTHERS}, "x": 1}, protocol=protocol))
    assert_holds_arrays(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_arrays_beside_tensors(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.pth.tar"
    state = {"w": torch.arange(6.0).reshape(2, 3), "mean": NUMBERS}
    torch.save(state, path, pickle_protocol=4, _use_new_zipfile_serialization=zipped)
    model = Checkpoint(tmp_path)  # the folder's one weight file
    assert torch.equal(model.tensor("w"), state["w"])
    assert np.array_equal(model.tensor("mean").numpy(), NUMBERS)


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_arrays_come_back_from_the_text_of_old_protocols(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "m.pkl"
    small = {name: value for name, value in ARRAYS.items() if name != "large" or protocol}
    path.write_bytes(pickle.dumps({**small, **OTHERS}, protocol=protocol))
    model = Checkpoint(path)
    assert sorted(model) == sorted(small)
    for name, value in small.items():
        assert np.array_equal(model.tensor(name).numpy(), value)


def test_arrays_in_text_or_compressed_count_as_those_in_bytes(tmp_path: Path) -> None:
    state = {"w": torch.ones(2), "mean": NUMBERS, "large": ARRAYS["large"]}
    torch.save(state, tmp_path / "text.pt")  # protocol 2 writes bytes as text
    torch.save(state, tmp_path / "stored.pt", pickle_protocol=4)
    for source_name, name in (("stored.pt", "packed.pt"), ("text.pt", "packed_text.pt")):
        with (
            zipfile.ZipFile(tmp_path / source_name) as source,
            zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as target,
        ):
            for member in source.namelist():
                target.writestr(member, source.read(member))
    for name in ("text.pt", "packed.pt", "packed_text.pt"):
        model = Checkpoint(tmp_path / name)
        assert sorted(model) == sorted(state)
        assert np.array_equal(model.tensor("mean").numpy(), NUMBERS)
        assert np.array_equal(model.tensor("large").numpy(), ARRAYS["large"])


def test_a_text_that_is_no_array_of_its_size_is_refused(tmp_path: Path) -> None:
    data = pickle.dumps({"w": np.full((40, 40), 0.3)}, protocol=2)
    start = data.index(b"\xc3")  # one of two bytes that stand for one
    damaged = data[:start] + b"aa" + data[start + 2 :]
    (tmp_path / "m.pkl").write_bytes(damaged)
    with pytest.raises(CheckpointError, match="another size"):
        Checkpoint(tmp_path / "m.pkl").tensor("w")


def test_an_array_larger_than_its_bytes_is_refused(tmp_path: Path) -> None:
    data = pickle.dumps({"w": np.ones((3, 4), "f4")}, protocol=4)
    lying = data.replace(b"K\x03K\x04\x86", b"K\x03K\x07\x86")
    assert lying != data
    (tmp_path / "m.pkl").write_bytes(lying)
    with pytest.raises(CheckpointError, match="reaches beyond its storage"):
        Checkpoint(tmp_path / "m.pkl")


@pytest.mark.parametrize("name", ["m.tar", "m.pt.tar", "m.pth.tar"])
def test_files_named_tar_are_torch_files(tmp_path: Path, name: str) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / name)
    assert torch.equal(Checkpoint(tmp_path / name).tensor("w"), torch.ones(2))


def test_an_archive_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "data.tar").write_bytes(b"x" * 1024)
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
    assert list(Checkpoint(tmp_path)) == ["w"]
    with pytest.raises(CheckpointError, match=r"data\.tar"):
        Checkpoint(tmp_path / "data.tar")
