"""The files around a pickle: torch's zip and legacy formats, old tensors, mappings."""

from __future__ import annotations

import pickle
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.pickled.machine import PickleFileError
from merge_core.checkpoints.pickled.zips import inflate
from merge_core.errors import CheckpointError
from tests.merge_core.checkpoints.pickled.pickled_files import FORMATS, assert_holds, legacy

pytestmark = pytest.mark.filterwarnings("ignore")  # torch on its own old formats


def assert_as_torch(path: Path) -> Checkpoint:
    """The file, made here and so trusted, gives what torch's own loader gives."""
    loaded = torch.load(path, weights_only=False)
    state = loaded.state_dict() if isinstance(loaded, nn.Module) else loaded
    return assert_holds(path, state)


OLD_PARAMETERS = {
    # torch 0.1 to 0.3 built parameters from (data, gradient, hooks, requires_grad, volatile) ...
    "variable": b"ctorch.nn.parameter\nParameter\n)\x81(%bNccollections\nOrderedDict\n)R\x88\x89tb",
    # ... tensors from (storage, offset, size, stride) ...
    "set": b"ctorch\nTensor\n)\x81(%bK\x01K\x02K\x03\x86K\x03K\x01\x86tb",
    # ... or by functions without gradients and hooks.
    "rebuilt": b"ctorch._utils\n_rebuild_tensor\n(%bK\x01K\x02K\x03\x86K\x03K\x01\x86tR",
    "typed": b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor\n"
    b"ctorch.nn.parameter\nParameter\n(%bK\x01K\x02K\x03\x86K\x03K\x01\x86t}tR",
}
STORAGE = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x08%btQ"
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n(%bK\x01K\x02K\x03\x86K\x03K\x01\x86\x89"
    b"ccollections\nOrderedDict\n)RtR"
)


@pytest.mark.parametrize("form", OLD_PARAMETERS)
def test_parameters_of_old_torch_are_recognised(tmp_path: Path, form: str) -> None:
    storage = STORAGE % b""
    inner = TENSOR % storage if form == "variable" else storage
    data = b"\x80\x02}U\x01w" + OLD_PARAMETERS[form] % inner + b"s."
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", data)
        archive.writestr("m/byteorder", "little")
        archive.writestr("m/data/0", torch.arange(8.0).numpy().tobytes())
        archive.writestr("m/version", "3\n")
    expected = torch.arange(1.0, 7.0).reshape(2, 3)
    assert_holds(path, {"w": expected})
    if form != "set":  # today's torch makes no tensor of a type by itself
        loaded = torch.load(path, weights_only=False)["w"]
        assert torch.equal(loaded, expected)


def test_views_of_storages_in_the_legacy_format(tmp_path: Path) -> None:
    storage = STORAGE % b"(U\x04viewK\x01K\x07t"
    data = b"\x80\x02}U\x01w" + TENSOR % storage + b"s."
    raw = struct.pack("<q", 8) + torch.arange(8.0).numpy().tobytes()
    (tmp_path / "m.pt").write_bytes(legacy(data, ["0"], raw))
    checkpoint = assert_as_torch(tmp_path / "m.pt")
    assert torch.equal(checkpoint.tensor("w"), torch.arange(2.0, 8.0).reshape(2, 3))


def test_ordered_dictionaries_of_python_2(tmp_path: Path) -> None:
    tensor = TENSOR % (STORAGE % b"N")
    data = b"\x80\x02ccollections\nOrderedDict\n](](U\x01w" + tensor + b"ee\x85R."
    raw = struct.pack("<q", 8) + torch.arange(8.0).numpy().tobytes()
    (tmp_path / "m.pt").write_bytes(legacy(data, ["0"], raw))
    assert_as_torch(tmp_path / "m.pt")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_files_are_refused_with_what_to_do(tmp_path: Path, form: int) -> None:
    """Torch before 0.1.11 wrote them; other tools pack folders so."""
    (tmp_path / "pickle").write_bytes(pickle.dumps({"w": 1}, 2))
    path = tmp_path / "m.pt"
    with tarfile.open(path, "w:", format=form) as archive:
        archive.add(tmp_path / "pickle", "pickle")
    with pytest.raises(CheckpointError, match=r"is a tar file; .* load it with torch and save it"):
        Checkpoint(path)


# ---------------------------------------------------------------------------------- containers


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("folder", ["", "archive/", "m/"])
def test_a_zip_written_again_by_other_tools_opens(
    tmp_path: Path, packing: int, folder: str
) -> None:
    model = nn.Sequential(nn.Linear(300, 7), nn.Linear(7, 2, dtype=torch.float64))
    model.append(nn.Linear(2, 2))
    model[2].weight = nn.Parameter(model[0].weight[1:3, 1:3])  # shares a storage
    torch.save(model, tmp_path / "m.pt")
    again = tmp_path / "again.pt"
    with zipfile.ZipFile(tmp_path / "m.pt") as old, zipfile.ZipFile(again, "w", packing) as new:
        new.comment = b"PK\x05 packed again"
        for name in old.namelist():
            new.writestr(folder + name.removeprefix("m/"), old.read(name))
    checkpoint = assert_holds(again, model.state_dict())
    whole, part = checkpoint.tensor("0.weight"), checkpoint.tensor("2.weight")
    if packing == zipfile.ZIP_DEFLATED:  # unpacked once for both
        assert part.data_ptr() - whole.data_ptr() == (300 + 1) * 4


def test_what_unpacks_to_more_than_it_says_is_not_unpacked() -> None:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    packed = packer.compress(bytes(1 << 26)) + packer.flush()
    tracemalloc.start()
    with pytest.raises(PickleFileError, match="another size"):
        inflate(packed, 1 << 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_file_of_more_than_four_gib_opens_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with torch.serialization.skip_data():  # the storages are holes in the file
        state = {"a": torch.empty(1 << 20, 1 << 10), "b": torch.empty(1 << 20, 1 << 10)}
        torch.save({**state, "c": torch.ones(3)}, path)
    assert path.stat().st_size > 8 << 30
    assert path.stat().st_blocks * 512 < 1 << 20, "the file system does not keep holes"
    checkpoint = Checkpoint(path)
    assert checkpoint.nbytes == (8 << 30) + 12
    assert torch.equal(checkpoint.tensor("c"), torch.zeros(3))


def test_a_file_that_cannot_be_mapped_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("unable to mmap")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse)
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    for save in FORMATS.values():
        save(model, tmp_path / "m.pt")
        assert_holds(tmp_path / "m.pt", model.state_dict())


def test_tensors_of_a_zip_are_views_of_the_file(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(64), "b": torch.ones(64), "c": torch.ones(64)}, tmp_path / "m.pt")
    checkpoint = Checkpoint(tmp_path / "m.pt")
    first, again, other = (checkpoint.tensor(name) for name in ("a", "a", "b"))
    assert first.data_ptr() == again.data_ptr()
    data = (tmp_path / "m.pt").read_bytes()
    apart = data.index(torch.ones(64).numpy().tobytes(), 1)
    second = data.index(torch.ones(64).numpy().tobytes(), apart + 256)
    assert other.data_ptr() - first.data_ptr() == second - apart


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(64)}, tmp_path / "m.pt")
    before = (tmp_path / "m.pt").read_bytes()
    Checkpoint(tmp_path / "m.pt").tensor("a").zero_()
    assert (tmp_path / "m.pt").read_bytes() == before


def test_weights_of_a_big_endian_machine_are_refused(tmp_path: Path) -> None:
    (tmp_path / "old.pt").write_bytes(legacy(pickle.dumps({}), [], b"", little_endian=False))
    with zipfile.ZipFile(tmp_path / "new.pt", "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({}))
        archive.writestr("m/byteorder", "big")
    for name in ("old.pt", "new.pt"):
        with pytest.raises(CheckpointError, match="big-endian"):
            Checkpoint(tmp_path / name)
