"""The hub of :mod:`tests.hub_server` in place of the real one, and models to put there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save
from torch import Tensor

from tests.hub_server import Hub

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback, an empty cache, and no token."""
    made = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield made
    made.close()


def weights(seed: int = 0, side: int = 8, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A small model, seeded."""
    source = torch.Generator().manual_seed(seed)
    return {
        "encoder.0.weight": torch.randn(side, side, generator=source).to(dtype),
        "encoder.0.bias": torch.randn(side, generator=source).to(dtype),
        "norm.weight": torch.randn(side, generator=source).to(dtype),
    }


def files_of(state: Mapping[str, Tensor]) -> dict[str, bytes]:
    """A repository's files: one safetensors file, its configuration, and what is never fetched."""
    return {
        "model.safetensors": save(dict(state), {"format": "pt"}),
        "config.json": b'{"model_type": "own"}',
        "README.md": b"# A model\n",
        "pytorch_model.bin": b"never asked for",
        "modeling_own.py": b"raise SystemExit",
        ".gitattributes": b"",
    }


def shard_files(state: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The same model in two shards with an index."""
    names = list(state)
    parts = {SHARDS[0]: names[:1], SHARDS[1]: names[1:]}
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    files = {file: save({n: state[n] for n in own}) for file, own in parts.items()}
    return {**files, INDEX: json.dumps(index).encode(), "config.json": b"{}"}
