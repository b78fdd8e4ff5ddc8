"""Our names of dtypes against torch's and the safetensors library's, and reading without torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.dtypes import DTYPES, SAFETENSORS_DTYPES, Dtype
from merge_core.errors import CheckpointError

OF_TORCH = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}


def test_every_dtype_of_torch_is_known_as_it_is() -> None:
    for value in OF_TORCH:
        known = DTYPES[str(value).removeprefix("torch.")]
        assert known == Dtype.of(value)
        assert known.torch is value
        assert known.itemsize == value.itemsize
        assert known.is_floating_point == value.is_floating_point


@pytest.mark.parametrize("code", SAFETENSORS_DTYPES)
def test_safetensors_calls_them_so(code: str) -> None:
    data = save({"w": torch.zeros(3, dtype=SAFETENSORS_DTYPES[code].torch)})
    length = int.from_bytes(data[:8], "little")
    tensor = json.loads(data[8 : 8 + length])["w"]
    assert tensor["dtype"] == code
    begin, end = tensor["data_offsets"]
    assert end - begin == 3 * SAFETENSORS_DTYPES[code].itemsize


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_read_without_torch_as_with_it(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.randn(7, 3, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    save_file({"a": torch.ones(3), "b": value, "c": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    torch.save({"b": value}, tmp_path / "x.pt")
    places = np.array([0, 2, 6])
    expected = value.reshape(7, 6)[[0, 2, 6]].double().numpy()
    for file in ("x.safetensors", "x.pt"):
        found = Checkpoint(tmp_path / file).rows("b", places)
        assert found.dtype == np.float64
        assert np.array_equal(found, expected)
    bad = value.clone()
    bad[2, 0, 0] = torch.nan
    save_file({"b": bad}, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match="1 NaN or infinite entries of 18"):
        Checkpoint(tmp_path / "bad.safetensors").rows("b", places)


def test_rows_of_a_file_that_changed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"b": torch.ones(4, 4)}, path)
    opened = Checkpoint(path)
    save_file({"b": torch.zeros(4, 4)}, path)
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        opened.rows("b", np.arange(2))
