"""A folder of text classifiers becomes a suite that is evaluated, with nothing written by hand but
where its texts lie."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from merge_core.suites.suite import load_suite
from merge_core.yaml_text import dump_yaml
from tests.analysis.networks.test_encoders import classifier
from tests.mergescope.test_cli import call
from tests.minilm import MINILM

TEXTS = ("good", "a bad film", "why not", "it was the best of times", "never again", "fine")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A BERT and two classifiers of it."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "models"
    for seed, name in enumerate(("mood", "news")):
        model = classifier("bert", seed)
        model.config.id2label = dict(enumerate(["world", "bad", "good", "sport"]))
        model.save_pretrained(place / name)
    classifier("bert", 2).bert.save_pretrained(place / "base")
    monkeypatch.chdir(place)
    return place


def test_init_names_the_network_and_says_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert call(monkeypatch, "suite", "init", folder, "--base", folder / "base") == 0
    out = capsys.readouterr().out
    assert "network: bert of transformers; features: what the library's own classifier" in out
    assert "heads within the checkpoints: mood, news" in out
    suite = load_suite(folder)
    assert suite.spec.architecture is not None
    assert suite.spec.architecture.args["hidden_size"] == 16
    assert suite.why_not_evaluated == "no data is given for mood, news"


def test_the_pooling_of_sentence_transformers_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("base", "mood"):
        shutil.copytree(MINILM, tmp_path / name)
    shutil.rmtree(tmp_path / "mood/1_Pooling")  # as a trainer of transformers leaves it
    (tmp_path / "mood/modules.json").unlink()
    assert call(monkeypatch, "suite", "init", tmp_path, "--base", tmp_path / "base") == 0
    said = "features: the mean over a text's tokens, divided by their norm"
    assert said in capsys.readouterr().out
    document = yaml.safe_load((tmp_path / "suite.yaml").read_text(encoding="utf-8"))
    assert document["architecture"]["pooling"] == "mean"
    assert document["architecture"]["normalize"] is True
    assert call(monkeypatch, "inspect", tmp_path, "--headers-only") == 0
    assert said in capsys.readouterr().out
    # Left out, it is told by the same files.
    del document["architecture"]
    (tmp_path / "suite.yaml").write_text(dump_yaml(document), encoding="utf-8")
    told = load_suite(tmp_path).architecture
    assert told is not None
    assert (told.name, told.pooling, told.normalize) == ("bert", "mean", True)


def test_prepare_says_whose_classes_these_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    model = classifier("bert")
    model.config.id2label = dict(enumerate(["world", "bad", "good", "sport"]))
    model.save_pretrained(tmp_path / "mood")
    rows = [f"{text},{('good', 'bad')[i % 2]}" for i, text in enumerate(TEXTS)]
    (tmp_path / "texts.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    data = {"kind": "text", "path": "texts.csv", "text_columns": ["text"]}
    document = {
        "name": "s",
        "experts": {"mood": {"weights": "mood", "data": {**data, "tokenizer": str(MINILM)}}},
    }
    (tmp_path / "suite.yaml").write_text(dump_yaml(document), encoding="utf-8")
    assert call(monkeypatch, "prepare", tmp_path) == 0
    out = capsys.readouterr().out
    assert "classes of mood: 0 world, 1 bad, 2 good, 3 sport" in out
    assert "4 x 16, the checkpoint's own" in out
