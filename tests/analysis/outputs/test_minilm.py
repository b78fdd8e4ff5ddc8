"""A really pre-trained encoder: vectors are those of sentence-transformers, to the last digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from analysis.evaluation.evaluator import Evaluator
from analysis.networks.towers import suite_network
from analysis.outputs.inputs import load_inputs
from merge_core.suites.suite import Suite, load_suite
from tests.evaluable import write_document
from tests.minilm import MINILM, WIDTH

TEXTS = (
    "A dad halted his daughter's wedding so her stepdad could help give her away.",
    "list flights",
    "Where can I go to update my personal profile, and what does it cost?",
    "why",
    "put a song by gary clark into the soul playlist",
    "The rain in Spain stays mainly in the plain",
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))


def suite_of(folder: Path, **fields: Any) -> Suite:
    """The model as base and as an expert with a random head, and twelve sentences as Parquet."""
    (folder / "data").mkdir()
    rows = pd.DataFrame({"text": [*TEXTS, *TEXTS[::-1]], "label": [0, 1, 2, 0, 1, 2] * 2})
    for split in ("train", "validation", "test"):
        rows.to_parquet(folder / f"data/{split}-00000-of-00001.parquet")
    state = load_file(MINILM / "model.safetensors")
    save_file(state, folder / "expert.safetensors")
    torch.manual_seed(0)
    save_file({"weight": torch.randn(3, WIDTH)}, folder / "head.safetensors")
    data = {"kind": "text", "path": "data", "text_columns": ["text"]}  # the base's tokenizer
    document: dict[str, Any] = {
        "name": "s",
        "base": str(MINILM),
        "experts": {
            "one": {"weights": "expert.safetensors", "head": "head.safetensors", "data": data}
        },
        **fields,
    }
    return load_suite(write_document(folder, document))


def test_features_are_the_vectors_of_sentence_transformers(tmp_path: Path) -> None:
    suite = suite_of(tmp_path)
    assert suite.architecture is not None
    told = (suite.architecture.name, suite.architecture.pooling, suite.architecture.normalize)
    assert told == ("bert", "mean", True)
    inputs = load_inputs(suite, "one", "test")
    expert = suite.expert("one")
    state = {name: expert.tensor(name) for name in expert}
    tokens = torch.from_numpy(inputs.images.astype(np.int64))
    got = suite_network(suite).features(state, tokens)
    order = np.random.default_rng(0).permutation(12)  # as splits are drawn
    texts = [[*TEXTS, *TEXTS[::-1]][number] for number in order]
    expected = SentenceTransformer(str(MINILM), device="cpu").encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(inputs.labels, np.array([0, 1, 2, 0, 1, 2] * 2)[order])
    head = load_file(tmp_path / "head.safetensors")["weight"]
    found = Evaluator(suite).outputs.predict(state, "one", "test")
    np.testing.assert_array_equal(found, (expected @ head.T).argmax(dim=1).numpy())


def test_pooling_and_normalisation_can_be_named(tmp_path: Path) -> None:
    architecture = {"name": "bert", "library": "transformers", "pooling": "first"}
    args = {"hidden_size": WIDTH, "num_hidden_layers": 6, "intermediate_size": 1536}
    suite = suite_of(tmp_path, architecture={**architecture, "args": args, "normalize": False})
    expert = suite.expert("one")
    state = {name: expert.tensor(name) for name in expert}
    tokens = torch.tensor([[101, 2339, 102, -1]])
    got = suite_network(suite).features(state, tokens)
    model = SentenceTransformer(str(MINILM), device="cpu")
    vectors = model.encode(["why"], output_value="token_embeddings", convert_to_tensor=True)
    torch.testing.assert_close(got[0], vectors[0][0], rtol=1e-4, atol=1e-5)
