"""Uploads: what is kept, under which names, and what is refused at which limit."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from merge_core.checkpoints.checkpoint import Checkpoint
from ui.server import uploads
from ui.server.uploads import keep

GOOD = save({"w": torch.ones(2, 3)})


class Sent(io.BytesIO):
    """A file as the browser sent it."""

    def __init__(self, name: str, content: bytes = GOOD) -> None:
        super().__init__(content)
        self.name = name
        self.size = len(content)


@given(name=st.text(max_size=120))
def test_no_name_leaves_the_folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("place")
    folder = place / "own"
    folder.mkdir()
    name = f"{name}.safetensors"
    assert keep([Sent(name), Sent(name), Sent(f"../{name}")], folder) == []
    files = sorted(place.rglob("*"))
    assert len(files) == 4  # the folder and three files
    assert all(file.parent == folder for file in files if file.is_file())
    assert all(Checkpoint(file).nbytes == 24 for file in files if file.is_file())


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (Sent("a.pt"), "not a .safetensors file"),
        (Sent("a.safetensors.exe"), "not a .safetensors file"),
        (Sent("a.safetensors", b""), "empty"),
        (Sent("a.safetensors", GOOD[:-1]), "truncated"),
        (Sent("a.safetensors", b"\xff" * 64), "safetensors"),
        (Sent("a.safetensors", b"\x80\x04cos\nsystem\n."), "safetensors"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(sent: Sent, why: str, tmp_path: Path) -> None:
    (refused,) = keep([sent], tmp_path)
    assert why in refused
    assert repr(sent.name) in refused
    assert str(tmp_path) not in refused
    assert list(tmp_path.iterdir()) == []


def test_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MOST_FILES", 3)
    refused = keep([Sent(f"{i}.safetensors") for i in range(5)], tmp_path)
    assert len(refused) == 2
    assert all("at most 3 files" in text for text in refused)
    monkeypatch.setattr(uploads, "MOST_FILES", 9)
    monkeypatch.setattr(uploads, "MOST_BYTES", 4 * len(GOOD))
    assert keep([Sent("three.safetensors")], tmp_path) == []
    (refused_one,) = keep([Sent("four.safetensors")], tmp_path)
    assert "GB of uploads" in refused_one
    monkeypatch.setattr(uploads, "MOST_BYTES", 1e12)
    monkeypatch.setattr(uploads, "SPARE_BYTES", 1e30)
    (refused_one,) = keep([Sent("five.safetensors")], tmp_path)
    assert "disk is nearly full" in refused_one
    assert len(list(tmp_path.iterdir())) == 4


def test_a_disk_that_is_full_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    (refused,) = keep([Sent("a.safetensors")], tmp_path)
    assert "disk is full" in refused
    assert list(tmp_path.iterdir()) == []
