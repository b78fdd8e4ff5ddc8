"""Our names of dtypes against torch's and the safetensors library's."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save

from merge_core.checkpoints.dtypes import DTYPES, SAFETENSORS_DTYPES, Dtype

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
