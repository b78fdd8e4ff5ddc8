"""Good files: every container, name, dtype and shape comes back as it was stored."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.dtypes import DTYPES, Dtype
from merge_core.checkpoints.shards import TensorInfo
from merge_core.errors import CheckpointError

STATE: dict[str, Tensor] = {
    "f64": torch.tensor([[1.0, 1e-300], [-1e300, 0.1]], dtype=torch.float64),
    "f32": torch.linspace(-1, 1, 6).reshape(2, 3),
    "f16": torch.tensor([65504.0, -6e-8, 0.0], dtype=torch.float16),
    "bf16": torch.tensor([[3e38, -1e-38]], dtype=torch.bfloat16),
    "fp8": torch.tensor([448.0, -0.5]).to(torch.float8_e4m3fn),
    "i64": torch.tensor([2**62, -1]),
    "i32": torch.tensor([[7]], dtype=torch.int32),
    "u8": torch.tensor([255, 0], dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "kernel": torch.randn(2, 3, 1, 2, generator=torch.Generator().manual_seed(0)),
    "empty": torch.zeros(0, 4),
}


def assert_holds(checkpoint: Checkpoint, state: dict[str, Tensor]) -> None:
    assert sorted(checkpoint) == sorted(state)
    assert len(checkpoint) == len(state)
    for name, value in state.items():
        assert name in checkpoint
        assert checkpoint.info(name) == TensorInfo(tuple(value.shape), Dtype.of(value.dtype))
        got = checkpoint.tensor(name)
        assert got.dtype == value.dtype
        assert got.shape == value.shape
        assert torch.equal(
            got.view(torch.uint8) if got.ndim else got,
            value.view(torch.uint8) if value.ndim else value,
        )
        assert got.device.type == "cpu"
        assert not got.requires_grad


def write_shards(folder: Path, state: dict[str, Tensor], pickled: bool = False) -> Path:
    """Two shards and their index."""
    folder.mkdir(exist_ok=True)
    names = sorted(state)
    suffix, stem = (".bin", "pytorch_model") if pickled else (".safetensors", "model")
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"{stem}-{i + 1:05d}-of-00002{suffix}"
        content = {name: state[name] for name in part}
        torch.save(content, folder / file) if pickled else save_file(content, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_a_safetensors_file_gives_back_every_dtype_and_shape(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "m.safetensors", metadata={"note": "kept"})
    checkpoint = Checkpoint(tmp_path / "m.safetensors")
    assert_holds(checkpoint, STATE)
    assert checkpoint.metadata == {"note": "kept"}
    assert checkpoint.nbytes == sum(v.numel() * v.element_size() for v in STATE.values())


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_a_torch_zip_gives_back_every_dtype_and_shape(tmp_path: Path, suffix: str) -> None:
    torch.save(STATE, tmp_path / f"m{suffix}")
    assert_holds(Checkpoint(str(tmp_path / f"m{suffix}")), STATE)


@pytest.mark.parametrize("pickled", [False, True])
def test_shards_read_as_one_through_the_index_or_its_folder(tmp_path: Path, pickled: bool) -> None:
    index = write_shards(tmp_path / "sharded", STATE, pickled)
    assert_holds(Checkpoint(index), STATE)
    assert_holds(Checkpoint(index.parent), STATE)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "anything.pt", "weights.safetensors"]
)
def test_a_folder_with_one_weight_file_is_that_file(tmp_path: Path, name: str) -> None:
    state = {"w": torch.ones(2)}
    save = save_file if name.endswith("safetensors") else torch.save
    save(state, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    assert_holds(Checkpoint(tmp_path), state)


def test_a_folder_prefers_safetensors_over_pickles(tmp_path: Path) -> None:
    torch.save({"old": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    save_file({"new": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(Checkpoint(tmp_path)) == ["new"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s},
        lambda s: {"model": s, "optimizer": {"lr": 0.1}, "epoch": 3},
        lambda s: {"model_state_dict": s},
        lambda s: {"module": {"state_dict": s}},
        lambda s: {**s, "epoch": 7, "name": "x"},
    ],
)
def test_usual_wrappers_are_unwrapped(
    tmp_path: Path, wrap: Callable[[dict[str, Tensor]], dict[str, Any]]
) -> None:
    state = {"a.weight": torch.ones(2, 2), "a.bias": torch.zeros(2)}
    torch.save(wrap(state), tmp_path / "m.pt")
    assert_holds(Checkpoint(tmp_path / "m.pt"), state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.module."])
def test_wrapper_prefixes_are_removed_where_all_names_have_them(
    tmp_path: Path, prefix: str
) -> None:
    state = {"a": torch.ones(1), "b": torch.zeros(2)}
    save_file({prefix + name: value for name, value in state.items()}, tmp_path / "m.safetensors")
    assert_holds(Checkpoint(tmp_path / "m.safetensors"), state)


def test_a_prefix_that_only_some_names_have_is_part_of_the_name(tmp_path: Path) -> None:
    state = {"module.a": torch.ones(1), "b": torch.zeros(2)}
    save_file(state, tmp_path / "m.safetensors")
    assert_holds(Checkpoint(tmp_path / "m.safetensors"), state)


def test_trained_parameters_come_back_as_plain_tensors(tmp_path: Path) -> None:
    torch.save({"w": torch.nn.Parameter(torch.ones(2, 2))}, tmp_path / "m.pt")
    assert_holds(Checkpoint(tmp_path / "m.pt"), {"w": torch.ones(2, 2)})


def test_tied_and_transposed_weights_read_as_they_look(tmp_path: Path) -> None:
    w = torch.arange(6.0).reshape(2, 3)
    torch.save({"w": w, "tied": w, "turned": w.T}, tmp_path / "m.pt")
    checkpoint = Checkpoint(tmp_path / "m.pt")
    assert torch.equal(checkpoint.tensor("tied"), w)
    assert torch.equal(checkpoint.tensor("turned"), w.T)


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    # A sparse file that claims 64 GiB: reading its data would take the machine down.
    size = 64 << 30
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [1 << 17, 1 << 17], "data_offsets": [0, size]}}
    ).encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + size)
    assert path.stat().st_blocks * 512 < 1 << 20, "the file system does not keep holes"
    checkpoint = Checkpoint(path)
    assert checkpoint.info("w") == TensorInfo((1 << 17, 1 << 17), DTYPES["float32"])
    assert checkpoint.nbytes == size


def test_a_tensor_can_be_read_again_and_again(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "m.safetensors")
    checkpoint = Checkpoint(tmp_path / "m.safetensors")
    assert torch.equal(checkpoint.tensor("f32"), checkpoint.tensor("f32"))


def test_an_unknown_name_is_said_to_be_unknown(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "m.safetensors")
    checkpoint = Checkpoint(tmp_path / "m.safetensors")
    for ask in (checkpoint.info, checkpoint.tensor):
        with pytest.raises(CheckpointError, match=r"m\.safetensors.*'nope'"):
            ask("nope")


def test_the_digest_follows_content_and_nothing_else(tmp_path: Path) -> None:
    first, copy, other = (tmp_path / f"{n}.safetensors" for n in ("first", "copy", "other"))
    save_file({"w": torch.ones(4)}, first)
    shutil.copyfile(first, copy)
    os.utime(copy, (1, 1))
    save_file({"w": torch.tensor([1.0, 1.0, 1.0, 1.0000001])}, other)
    digest = Checkpoint(first).digest
    assert len(digest) == 64
    assert Checkpoint(copy).digest == digest
    assert Checkpoint(other).digest != digest


def test_the_digest_notices_a_change_hidden_behind_an_old_date(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(4)}, path)
    before, stat = Checkpoint(path).digest, path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Checkpoint(path).digest != before


def test_a_shard_changes_the_digest_of_the_whole(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "a", STATE)
    moved = write_shards(tmp_path / "b", STATE)
    changed = write_shards(tmp_path / "c", {**STATE, "scalar": torch.tensor(2.6)})
    assert Checkpoint(index).digest == Checkpoint(moved).digest != Checkpoint(changed).digest
