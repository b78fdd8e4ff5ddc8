"""Hostile pickles: nothing that they name is imported or called, in any format."""

from __future__ import annotations

import contextlib
import pickle
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import CheckpointError
from tests.merge_core.checkpoints.pickled.pickled_by_hand import (
    DATA,
    HEAD,
    MAGIC,
    REBUILD,
    entries,
    is_clear,
    legacy,
    module,
    nest,
    outcome,
    storage,
    tensor,
    text,
    to_zip,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_pickles_made_here_are_good_ones(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(to_zip(HEAD + entries(w=tensor()) + b"."))
    expected = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(Checkpoint(tmp_path / "m.pt").tensor("w"), expected)
    assert torch.equal(torch.load(tmp_path / "m.pt")["w"], expected)
    raw = struct.pack("<q", 6) + DATA
    # The legacy format's storages also state a view.
    source = storage()[:-2] + b"NtQ"
    pickled = HEAD + entries(w=tensor(source=source)) + b"."
    (tmp_path / "m.pt").write_bytes(legacy(pickled, HEAD + b"]" + text("0") + b"a." + raw))
    assert torch.equal(Checkpoint(tmp_path / "m.pt").tensor("w"), expected)
    assert torch.equal(torch.load(tmp_path / "m.pt")["w"], expected)


# -------------------------------------------------------------------------------- payloads

CANARY = """
from pathlib import Path

def touch(*args, **kwargs):
    Path(r"{marker}").touch()
    return touch

touch()

class Canary(dict):
    def __new__(cls, *args, **kwargs):
        touch()
        return super().__new__(cls)

    __init__ = __setstate__ = __setitem__ = __hash__ = __eq__ = __repr__ = __str__ = touch
    append = extend = add = __bool__ = __len__ = __iter__ = __call__ = __setattr__ = touch
"""
TOUCH = b"ccanary\ntouch\n"
KIND = b"ccanary\nCanary\n"
OBJECT = KIND + b")\x81"
# What Python's own unpickler would import, call, build or ask, in every way that it has.
PAYLOADS = {
    "import": TOUCH,
    "import by stack": text("canary") + text("touch") + b"\x93",
    "dotted name": text("canary") + text("Canary.append") + b"\x93",
    "reduce": TOUCH + b")R",
    "reduce nested": TOUCH + TOUCH + b")R\x85R",
    "reduce of a result": TOUCH + b")R)R",
    "instance": b"(N" + b"icanary\ntouch\n",
    "object": b"(" + TOUCH + b"No",
    "new": OBJECT,
    "new with keywords": KIND + b")}\x92",
    "set state": OBJECT + b"}b",
    "set slots": OBJECT + b"N" + entries(a=b"N") + b"\x86b",
    "set item": OBJECT + b"NNs",
    "set items": OBJECT + b"(NNu",
    "append": OBJECT + b"Na",
    "appends": OBJECT + b"(NNe",
    "add": OBJECT + b"(N\x90",
    "as key": b"}" + OBJECT + b"Ns",
    "in a set": b"\x8f(" + OBJECT + b"\x90",
    "in a frozen set": b"(" + OBJECT + b"\x91",
    "copyreg": b"ccopyreg\n_reconstructor\n" + KIND + b"c__builtin__\ndict\n}\x87R",
    "copyreg new": b"ccopyreg\n__newobj__\n" + KIND + b"\x85R",
    "memo": b"ccollections\nOrderedDict\nq\x000" + TOUCH + b"q\x000h\x00)R",
    "duplicate": TOUCH + b"2)R\x86",
    "getattr": b"c__builtin__\ngetattr\n" + KIND + text("touch") + b"\x86R",
    "partial": b"cfunctools\npartial\n" + TOUCH + b"\x85R)R",
    "map": b"c__builtin__\nlist\nc__builtin__\nmap\n" + TOUCH + b"]Na\x86R\x85R",
    "apply": b"coperator\ncall\n" + TOUCH + b"\x85R",
    "file": b"cio\nopen\n" + text("MARKER") + text("w") + b"\x86R",
    "ordered": b"ccollections\nOrderedDict\n" + OBJECT + b"\x85R",
    "default": b"ccollections\ndefaultdict\n" + TOUCH + b"\x85R",
    "size": b"ctorch\nSize\n" + OBJECT + b"\x85R",
    "rebuild": REBUILD + b"(" + OBJECT * 4 + b"\x89NtR",
    "rebuild by type": b"ctorch._tensor\n_rebuild_from_type_v2\n("
    + TOUCH + KIND + b")" + OBJECT + b"tR",
    "parameter": b"ctorch._utils\n_rebuild_parameter\n" + OBJECT + b"\x89N\x87R",
    "rebuild a wrapper": b"ctorch._utils\n_rebuild_wrapper_subclass\n" + KIND + b"\x85R",
    "module state": b"ctorch.nn.modules.module\nModule\n)\x81" + OBJECT + b"b",
    "module parts": module(_modules=OBJECT, _parameters=entries(w=OBJECT), _buffers=TOUCH),
    "hidden buffers": module(
        _modules=b"}", _parameters=b"}", _non_persistent_buffers_set=b"]" + OBJECT + b"a"
    ),
    "old parameter": b"ctorch.nn.parameter\nParameter\n)\x81(" + OBJECT + b"NNNNtb",
    "scripted": b"c__torch__.canary\nCanary\n)\x81" + entries(w=OBJECT) + b"b",
}  # fmt: skip
EARNEST = (  # those that run in Python's own unpickler without further ado
    "import", "reduce", "reduce nested", "reduce of a result", "instance", "object", "new",
    "set state", "set item", "set items", "append", "as key", "copyreg", "copyreg new", "memo",
    "duplicate", "partial", "map", "file", "import by stack",
)  # fmt: skip
ATTACKS = (
    "os.system", "posix.system", "nt.system", "os.popen", "subprocess.Popen", "builtins.eval",
    "__builtin__.eval", "builtins.exec", "builtins.__import__", "builtins.open", "runpy.run_path",
    "socket.create_connection", "shutil.rmtree",
)  # fmt: skip


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that appears when the canary is imported or touched."""
    marker = tmp_path / "MARKER"
    (tmp_path / "canary.py").write_text(CANARY.format(marker=marker))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield marker
    sys.modules.pop("canary", None)


def containers(payload: bytes) -> dict[str, bytes]:
    """A payload alone, beside a tensor, as a key, in each format."""
    beside = entries(w=tensor(), extra=payload)
    within = b"}" + payload + tensor() + b"s"
    ways = {"alone": payload, "beside": beside, "key": within, "wrapped": entries(model=payload)}
    files = {f"zip, {way}": to_zip(HEAD + content + b".") for way, content in ways.items()}
    files["bare"] = HEAD + payload + b"."
    files["protocol 4"] = b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + payload + b"."
    files["legacy"] = legacy(HEAD + payload + b".", HEAD + b"].")
    files["legacy, in the keys"] = legacy(HEAD + b"}.", HEAD + payload + b".")
    files["legacy, for the version"] = pickle.dumps(MAGIC, 2) + HEAD + payload + b"."
    files["nested"] = nest(legacy(HEAD + payload + b".", HEAD + b"]."))
    return files


@pytest.mark.parametrize("name", PAYLOADS)
def test_payloads_stay_inert(name: str, marker: Path) -> None:
    path = marker.parent / "m.pt"
    before = set(sys.modules)
    for place, data in containers(PAYLOADS[name]).items():
        path.write_bytes(data)
        assert is_clear(outcome(path)), place
        assert not marker.exists(), place
        assert set(sys.modules) == before, place
    path.write_bytes(containers(PAYLOADS[name])["zip, beside"])
    if name.startswith("rebuild"):  # it pretends to be a tensor
        with pytest.raises(CheckpointError, match="'extra'"):
            Checkpoint(path)
        return
    checkpoint = Checkpoint(path)
    assert torch.equal(checkpoint.tensor("w"), torch.arange(6.0).reshape(2, 3))
    named = " ".join(checkpoint.unsafe_globals)
    assert any(module in named for module in ("canary", "io.open"))


@pytest.mark.parametrize("name", EARNEST)
def test_the_payloads_are_live(name: str, marker: Path) -> None:
    with contextlib.suppress(Exception):
        pickle.loads(HEAD + PAYLOADS[name] + b".")
    assert marker.exists()


def test_foreign_functions_under_the_names_of_torchs_make_no_tensors(tmp_path: Path) -> None:
    mock = b"cforeign\n_rebuild_tensor_v2\n"
    args = tensor()[len(REBUILD) : -1]
    path = tmp_path / "m.pt"
    path.write_bytes(to_zip(HEAD + entries(w=mock + args + b"R", good=tensor()) + b"."))
    assert list(Checkpoint(path)) == ["good"]
    assert Checkpoint(path).unsafe_globals == ("foreign._rebuild_tensor_v2",)
    typed = b"ctorch._tensor\n_rebuild_from_type_v2\n(" + mock + b"ctorch\nTensor\n" + args + b"}tR"
    path.write_bytes(to_zip(HEAD + entries(w=typed, good=tensor()) + b"."))
    with pytest.raises(CheckpointError, match=r"'w' is made by foreign\."):
        Checkpoint(path)


def test_foreign_names_are_fit_to_be_shown(tmp_path: Path) -> None:
    names = b"cforeign\n\x1b[31m\x00bad\n", b"cforeign\n" + b"long" * 10_000 + b"\n"
    content = entries(w=tensor(), a=names[0], b=names[1])
    (tmp_path / "m.pt").write_bytes(to_zip(HEAD + content + b"."))
    named = Checkpoint(tmp_path / "m.pt").unsafe_globals
    assert len(named) == 2
    assert all(name.isprintable() and len(name) <= 120 for name in named)


def test_what_a_nested_pickle_would_import_is_listed_too(tmp_path: Path) -> None:
    inner = legacy(HEAD + b"cforeign\nThing\n0" + storage()[:-2] + b"NtQ.", HEAD + b"]" + text("0")
                   + b"a." + struct.pack("<q", 6) + DATA)  # fmt: skip
    content = entries(w=tensor(source=nest(inner)[len(HEAD) : -1]))
    (tmp_path / "m.pkl").write_bytes(HEAD + content + b".")
    checkpoint = Checkpoint(tmp_path / "m.pkl")
    assert torch.equal(checkpoint.tensor("w"), torch.arange(6.0).reshape(2, 3))
    assert checkpoint.unsafe_globals == ("foreign.Thing",)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_file_that_asks_for_what_only_attacks_need_is_refused(tmp_path: Path, name: str) -> None:
    module_name, _, function = name.rpartition(".")
    call = f"c{module_name}\n{function}\n".encode() + text("touch owned") + b"\x85R"
    for data in containers(call).values():
        path = tmp_path / "m.pt"
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="foreign code"):
            Checkpoint(path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt"]
