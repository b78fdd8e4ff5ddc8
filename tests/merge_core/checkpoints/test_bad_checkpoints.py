"""Bad files: each is refused with a CheckpointError that names it, and none runs code."""

from __future__ import annotations

import json
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import CheckpointError

GOOD = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(3)}


def read_all(path: Path) -> None:
    checkpoint = Checkpoint(path)
    for name in checkpoint:
        checkpoint.tensor(name)


def refusal(path: Path) -> str:
    """The message with which a file is refused; fails on any other exception or none."""
    with pytest.raises(CheckpointError) as caught:
        read_all(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.3, 0.6, 0.9, 0.999])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"cut{suffix}"
    save_file(GOOD, path) if suffix == ".safetensors" else torch.save(GOOD, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    message = refusal(path)
    assert ("empty" in message) == (share == 0.0)
    assert "again" in message or "original" in message


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_text_under_a_weight_files_name_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"notes{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234567\n")
    refusal(path)


def test_a_foreign_zip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "holiday.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photo.txt", "not weights")
    refusal(path)


def test_a_torch_file_renamed_to_safetensors_is_refused(tmp_path: Path) -> None:
    torch.save(GOOD, tmp_path / "m.safetensors")
    assert "format" in refusal(tmp_path / "m.safetensors")


def test_a_payload_in_a_pickle_is_refused_and_never_runs(tmp_path: Path) -> None:
    marker = tmp_path / "owned"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            import os

            return os.system, (f"touch {marker}",)

    attacks = {"zip.pt": Payload(), "inside.pt": {**GOOD, "extra": Payload()}}
    for name, content in attacks.items():
        torch.save(content, tmp_path / name)
        assert "foreign code" in refusal(tmp_path / name)
    for name in ("bare.pt", "bare.bin", "bare.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload()))
        refusal(tmp_path / name)
    assert not marker.exists()
    # The payload is live: unpickled in earnest, it does run.
    pickle.loads((tmp_path / "bare.pt").read_bytes())
    assert marker.exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), 3, None, "text"])
def test_what_is_not_a_dictionary_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "m.pt")
    assert type(content).__name__ in refusal(tmp_path / "m.pt")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"state_dict": {}}])
def test_a_file_without_tensors_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "m.pt")
    assert "no tensors" in refusal(tmp_path / "m.pt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse", "meta", "complex", "quantised", "uint16"])
def test_tensors_that_cannot_be_merged_are_named(tmp_path: Path, kind: str) -> None:
    value = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "meta": lambda: torch.ones(2, device="meta"),
        "complex": lambda: torch.ones(2, dtype=torch.complex64),
        "quantised": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "uint16": lambda: torch.ones(2, dtype=torch.uint16),
    }[kind]()
    torch.save({"fine": torch.ones(1), "odd.weight": value}, tmp_path / "m.pt")
    assert "'odd.weight'" in refusal(tmp_path / "m.pt")


def test_a_safetensors_dtype_that_torch_lacks_is_named(tmp_path: Path) -> None:
    save_file({"odd": torch.ones(2, dtype=torch.uint16)}, tmp_path / "m.safetensors")
    message = refusal(tmp_path / "m.safetensors")
    assert "'odd'" in message
    assert "U16" in message


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("bad", "dtype"),
    [
        ([float("nan")], torch.float32),
        ([float("inf"), float("-inf"), float("nan")], torch.float16),
        ([float("-inf")], torch.bfloat16),
        ([float("inf")], torch.bfloat16),
        ([float("nan"), float("nan")], torch.float64),
        ([float("nan")], torch.float8_e4m3fn),
    ],
)
def test_non_finite_entries_are_named_and_counted(
    tmp_path: Path, suffix: str, bad: list[float], dtype: torch.dtype
) -> None:
    path = tmp_path / f"m{suffix}"
    state = {"blocks.3.weight": torch.tensor([1.0, *bad, 2.0]).to(dtype)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    message = refusal(path)
    assert "'blocks.3.weight'" in message
    assert f"{len(bad)} NaN or infinite entries of {len(bad) + 2}" in message


def test_one_bad_entry_among_many_is_found_wherever_it_is(tmp_path: Path) -> None:
    for place in (0, 4999, 9999):
        w = torch.zeros(10_000)
        w[place] = float("nan")
        save_file({"w": w}, tmp_path / "m.safetensors")
        assert "1 NaN" in refusal(tmp_path / "m.safetensors")


def test_missing_files_folders_and_endings_are_told_apart(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "absent.safetensors")
    assert "ending" in refusal_of_written(tmp_path / "weights.onnx")
    (tmp_path / "hollow").mkdir()
    assert "no weight file" in refusal(tmp_path / "hollow")
    for name in ("a.pt", "b.pt"):
        torch.save(GOOD, tmp_path / "hollow" / name)
    assert "2 weight files" in refusal(tmp_path / "hollow")
    (tmp_path / "folder.safetensors").mkdir()
    refusal(tmp_path / "folder.safetensors")
    refusal(tmp_path / ("n" * 300))


def refusal_of_written(path: Path) -> str:
    path.write_bytes(b"x")
    return refusal(path)


def index_of(folder: Path, weight_map: Any) -> Path:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "one.safetensors")
    index_of(tmp_path, {"w": "one.safetensors", "x": "two.safetensors"})
    assert "does not exist" in refusal(tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"two\.safetensors"):
        Checkpoint(tmp_path)


def test_a_shard_without_the_promised_tensor_is_named(tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "one.safetensors")
    message = refusal(index_of(tmp_path, {"w": "one.safetensors", "x": "one.safetensors"}))
    assert "'x'" in message
    assert "one.safetensors" in message


@pytest.mark.parametrize(
    "outside", ["../secret.safetensors", "/etc/passwd", "sub/one.safetensors", "./one.safetensors"]
)
def test_an_index_cannot_point_outside_its_folder(tmp_path: Path, outside: str) -> None:
    save_file(GOOD, tmp_path / "secret.safetensors")
    inner = tmp_path / "inner"
    inner.mkdir()
    save_file(GOOD, inner / "one.safetensors")
    message = refusal(index_of(inner, {"w": outside}))
    assert "outside" in message
    assert outside in message


@pytest.mark.parametrize("outside", ["..", "", ".", "a\0b.safetensors"])
def test_an_index_naming_no_file_is_refused(tmp_path: Path, outside: str) -> None:
    with pytest.raises(CheckpointError):
        Checkpoint(index_of(tmp_path, {"w": outside}))


@pytest.mark.parametrize(
    "text", ["", "not json", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}',
             '{"weight_map": {"w": 3}}', '{"weight_map": null}', "\xff"],
)  # fmt: skip
def test_a_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text.encode("latin-1"))
    assert "shard index" in refusal(index)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_random_damage_never_raises_anything_else(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    save_file(GOOD, path) if suffix == ".safetensors" else torch.save(GOOD, path)
    good, source = path.read_bytes(), random.Random(0)
    start = max(0, good.find(b"data.pkl"))  # where the pickle, or the header, lies
    messages = []
    for _ in range(300):
        data = bytearray(good)
        for _ in range(source.choice([1, 1, 3])):
            near = start + source.randrange(min(200, len(data) - start))
            far = source.randrange(len(data))
            data[near if source.random() < 0.7 else far] = source.randrange(256)
        path.write_bytes(data)
        try:
            read_all(path)
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all(path.name in message for message in messages)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("act", ["removed", "replaced", "rewritten", "cut"])
def test_a_file_that_changes_under_an_open_checkpoint_is_refused(
    tmp_path: Path, suffix: str, act: str
) -> None:
    def write(path: Path, state: dict[str, torch.Tensor]) -> None:
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)

    path = tmp_path / f"m{suffix}"
    write(path, GOOD)
    checkpoint = Checkpoint(path)
    checkpoint.tensor("w")
    if act == "removed":
        path.unlink()
    elif act == "replaced":
        write(tmp_path / f"new{suffix}", {k: v + 1 for k, v in GOOD.items()})
        (tmp_path / f"new{suffix}").replace(path)
    elif act == "rewritten":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        with path.open("r+b") as stream:
            stream.truncate(100)
    for ask in (lambda: checkpoint.tensor("w"), lambda: checkpoint.digest):
        with pytest.raises(CheckpointError, match=rf"m\{suffix}.*(removed|changed)"):
            ask()
