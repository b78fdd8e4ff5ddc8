"""Texts in the place of weights: said to be what they are, whatever the file's ending."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.shards import PICKLE_SUFFIXES
from merge_core.errors import CheckpointError

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 123456\n"
OLD_LFS = LFS.replace("git-lfs", "hawser")
KEY = "SHA256E-s123--4d4d.safetensors"
TEXTS = {
    "LFS": (LFS, "Git LFS pointer.*git lfs pull"),
    "LFS, Windows": (LFS.replace("\n", "\r\n"), "Git LFS"),
    "LFS before 1.0": (OLD_LFS, "Git LFS"),
    "annex": (f"/annex/objects/{KEY}\n", "git annex get"),
    "annex, unlocked": (f"/annex/objects/{KEY}\nmore\n", "git annex get"),
    "annex link as a file": (f"../../.git/annex/objects/x1/2y/{KEY}/{KEY}", "git annex get"),
    "page": ("<!DOCTYPE html><html><head>", "web page"),
    "old page": ("\n<HTML lang=en>", "web page"),
    "message": ('{"error":"Repository not found"}', "server's message"),
    "gated": ("Access to model org/name is restricted. You must be logged in.", "log in"),
    "not found": ("Entry not found", "server's message"),
}
NAMES = ["m.safetensors", *(f"m{end}" for end in PICKLE_SUFFIXES), "model.safetensors.index.json"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("text", "told"), TEXTS.values(), ids=TEXTS.keys())
def test_a_text_in_place_of_weights_is_named(
    tmp_path: Path, name: str, text: str, told: str
) -> None:
    (tmp_path / name).write_bytes(text.encode())
    with pytest.raises(CheckpointError, match=told) as caught:
        Checkpoint(tmp_path / name)
    assert name in str(caught.value)


def test_a_pointer_among_shards_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    (tmp_path / "two.safetensors").write_text(LFS)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"two\.safetensors is a Git LFS pointer"):
        Checkpoint(tmp_path)


def test_weights_that_begin_like_a_text_are_read(tmp_path: Path) -> None:
    # Pickles of protocol 0 are texts.
    import pickle

    import numpy as np

    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"version": np.ones(3)}, protocol=0))
    assert list(Checkpoint(tmp_path / "m.pkl")) == ["version"]
