"""Texts: tokens as the tokenizer gives them, splits as for images, and heads beside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Tokenizer, RobertaTokenizer

from analysis.data_sources.text import PADDING, read_texts
from analysis.evaluation.evaluator import Evaluator
from analysis.networks.towers import suite_network
from analysis.outputs.heads import load_head
from analysis.outputs.inputs import has_labels, load_inputs
from merge_core.errors import SuiteError
from merge_core.suites.data_spec import DataSpec, HeadSpec
from merge_core.suites.suite import Suite, load_suite
from tests.evaluable import write_document
from tests.stand_ins import GPT2, LETTERS, ROBERTA

SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>", "Ġ", *LETTERS]
VOCABULARY = {symbol: number for number, symbol in enumerate(SYMBOLS)}
TEXTS = ["abc", "a b", "", "a much longer text than fits", "z"] * 4
WHAT = "data of task 'one'"


@pytest.fixture(autouse=True)
def own_cache_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of texts with two labels, and two tokenizers."""
    place = tmp_path / "texts"
    place.mkdir()
    columns = {
        "text": TEXTS,
        "other": TEXTS[::-1],
        "label": [i % 2 for i in range(len(TEXTS))],
        "score": [i / 2 for i in range(len(TEXTS))],
    }
    kinds = {
        "text": datasets.Value("string"),
        "other": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["no", "yes"]),
        "score": datasets.Value("float32"),
    }
    for split, count in (("train", 20), ("validation", 8)):
        rows = {name: values[:count] for name, values in columns.items()}
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
        table.to_parquet(str(place / f"{split}-00000-of-00001.parquet"))
    for name, kind in (("gpt2", GPT2Tokenizer), ("roberta", RobertaTokenizer)):
        kind(vocab=VOCABULARY, merges=[]).save_pretrained(tmp_path / name)
    return tmp_path


def spec_of(tokenizer: str = "gpt2", **fields: Any) -> DataSpec:
    document = {"kind": "text", "path": "texts", "text_columns": ["text"], "tokenizer": tokenizer}
    return DataSpec.model_validate({**document, "test": "validation", "length": 9, **fields})


def read(folder: Path, split: Any = "test", **fields: Any) -> Any:
    return read_texts(spec_of(**fields), split, lambda path: folder / path, WHAT)


def spell(row: np.ndarray) -> str:
    """A row of tokens as text again, by the vocabulary."""
    return "".join(SYMBOLS[token] for token in row if token != PADDING).replace("Ġ", " ")


def test_every_token_is_kept_up_to_the_length_and_padding_is_none(folder: Path) -> None:
    tokens, labels, names = read(folder)
    assert tokens.shape == (8, 9)
    assert tokens.dtype == np.int32
    assert sorted(map(spell, tokens)) == sorted(text[:9] for text in TEXTS[:8])
    assert sorted(labels) == [0] * 4 + [1] * 4
    assert names == ("no", "yes")
    for row in tokens:  # padding stands at the end alone
        there = row != PADDING
        assert (np.diff(there.astype(int)) <= 0).all()


def test_labels_stay_with_their_texts(folder: Path) -> None:
    (folder / "texts").rename(folder / "old")
    (folder / "texts").mkdir()
    rows = {"text": ["abc", "z", "hj"], "label": [2, 0, 1]}
    for split in ("train", "validation"):
        table = datasets.Dataset.from_dict(rows)
        table.to_parquet(str(folder / f"texts/{split}-00000-of-00001.parquet"))
    tokens, labels, names = read(folder)
    assert {spell(row): label for row, label in zip(tokens, labels, strict=True)} == {
        "abc": 2,
        "z": 0,
        "hj": 1,
    }
    assert names == ("0", "1", "2")


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_tables_of_text_and_named_labels(folder: Path, ending: str) -> None:
    (folder / "texts").rename(folder / "old")
    (folder / "texts").mkdir()
    rows = {"abc": "spam", "z": "ham", "hj": "eggs"}
    for split, lines in (("train", list(rows.items())), ("validation", list(rows.items())[1:])):
        if ending == "csv":
            text = "text,label\n" + "".join(f"{a},{b}\n" for a, b in lines)
        else:
            text = "".join(f'{{"text": "{a}", "label": "{b}"}}\n' for a, b in lines)
        (folder / f"texts/{split}.{ending}").write_text(text)
    tokens, labels, names = read(folder)
    assert names == ("eggs", "ham", "spam")
    found = {spell(row): names[label] for row, label in zip(tokens, labels, strict=True)}
    assert found == {"z": "ham", "hj": "eggs"}
    with (folder / f"texts/train.{ending}").open("a") as stream:
        stream.write("abc,\n" if ending == "csv" else '{"text": "abc", "label": null}\n')
    with pytest.raises(SuiteError, match="a row without a label"):
        read(folder)


def test_training_texts_are_none_of_the_others(folder: Path) -> None:
    shared = {"test": "validation", "val_share": 0.25, "length": 64}
    parts = {part: read(folder, part, **shared)[0] for part in ("train", "val")}
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 15, "val": 5}
    together = sorted(spell(row) for rows in parts.values() for row in rows)
    assert together == sorted(TEXTS)
    own = read(folder, "train", val="validation", **shared)[0]
    assert sorted(map(spell, own)) == sorted(TEXTS)
    with pytest.raises(SuiteError, match="which split is for fine-tuning"):
        read(folder, "train", test="train", val="validation")


def test_pairs_are_joined_as_each_tokenizer_joins_them(folder: Path) -> None:
    pair = {"text_columns": ["text", "other"], "length": 64}
    gpt2 = {spell(row) for row in read(folder, **pair)[0]}
    roberta = {spell(row) for row in read(folder, tokenizer="roberta", **pair)[0]}
    expected = list(zip(TEXTS[:8], TEXTS[::-1][:8], strict=True))
    assert gpt2 == {first + second for first, second in expected}
    assert roberta == {f"<s>{first}</s></s>{second}</s>" for first, second in expected}


def test_validation_texts_are_a_drawn_share_of_the_training_split(folder: Path) -> None:
    val = read(folder, "val", val_share=0.25)[0]
    assert len(val) == 5
    assert len(read(folder, "val", val_share=0.25, limit=3)[0]) == 3
    np.testing.assert_array_equal(read(folder, "val", val_share=0.25, limit=3)[0], val[:3])
    assert len(read(folder, "test", limit=2)[0]) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_columns": ["texts"]}, r"no column 'texts'; there is text, other, label"),
        ({"label_column": "class"}, "no column 'class'"),
        ({"label_column": "score"}, "holds no class numbers"),
        ({"tokenizer": "texts"}, "holds no tokenizer"),
        ({"path": "nowhere"}, "is not a folder"),
        ({"test": "testing"}, "no split 'testing'"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        read(folder, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer": None}, "needs 'tokenizer'"),
        ({"text_columns": []}, "at least 1"),
        ({"text_columns": ["a", "b", "c"]}, "at most 2"),
        ({"mean": [0, 0, 0]}, "takes no transform, mean"),
        ({"classes": ["a"]}, "takes no transform, mean, std or classes"),
        ({"dataset": "org/name"}, "either 'path', a folder, or 'dataset'"),
        ({"file": "x.npz"}, "takes no 'file'"),
    ],
)
def test_fields_that_texts_do_not_have_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec_of(**fields)


def suite_of(folder: Path, name: str = "gpt2", **experts: Any) -> Suite:
    from transformers import (
        GPT2Config,
        GPT2ForSequenceClassification,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    torch.manual_seed(0)
    args, layers = (GPT2, "score") if name == "gpt2" else (ROBERTA, "classifier")
    if name == "gpt2":
        model = GPT2ForSequenceClassification(GPT2Config(**GPT2, num_labels=2))
    else:
        model = RobertaForSequenceClassification(RobertaConfig(**ROBERTA, num_labels=2))
    save_file(model.state_dict(), folder / "expert.safetensors")
    data = spec_of(name).model_dump(mode="json", exclude_unset=True)
    head = {"file": "expert.safetensors", "layers": layers}
    one = {"weights": "expert.safetensors", "head": head, "data": data}
    document = {
        "name": "texts",
        "architecture": {"name": name, "library": "transformers", "args": args},
        "experts": {"one": one, "two": {**one, "data": {**data, "length": 12}}, **experts},
    }
    return load_suite(write_document(folder, document))


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "roberta"])
def test_padding_changes_nothing_and_the_head_is_the_models_own(folder: Path, name: str) -> None:
    from transformers import (
        GPT2Config,
        GPT2ForSequenceClassification,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    suite = suite_of(folder, name)
    expert = suite.expert("one")
    state = {key: expert.tensor(key) for key in expert}
    if name == "gpt2":
        model = GPT2ForSequenceClassification(GPT2Config(**GPT2, num_labels=2)).eval()
    else:
        model = RobertaForSequenceClassification(RobertaConfig(**ROBERTA, num_labels=2)).eval()
    model.load_state_dict(state)
    tokens = torch.from_numpy(load_inputs(suite, "one", "test").images.astype(np.int64))
    tokens = tokens[(tokens >= 0).any(dim=1)]  # GPT-2 has no token for an empty text
    got = load_head(suite, "one").logits(suite_network(suite).features(state, tokens))
    alone = [model(input_ids=row[row >= 0][None]).logits[0] for row in tokens]
    torch.testing.assert_close(got, torch.stack(alone), rtol=1e-4, atol=1e-6)


def test_tasks_of_several_lengths_are_run_together(folder: Path) -> None:
    suite = suite_of(folder)
    evaluator = Evaluator(suite)
    expert = suite.expert("one")
    state = {name: expert.tensor(name) for name in expert}
    images = evaluator.outputs.images(["one", "two"], "test")
    found = evaluator.outputs.measure(expert.digest, lambda: state, images, "test")
    for task in ("one", "two"):
        expected = evaluator.outputs.predict(state, task, "test")
        np.testing.assert_array_equal(found[task]["classes"], expected)
    assert has_labels(suite, "one", "test")


def test_images_and_texts_are_not_taken_for_each_other(folder: Path) -> None:
    suite = suite_of(folder)
    expert = suite.expert("one")
    state = {name: expert.tensor(name) for name in expert}
    with pytest.raises(SuiteError, match="takes texts, and these are images"):
        suite_network(suite).features(state, torch.zeros(2, 3, 8, 8))
    with pytest.raises(SuiteError, match="do not fit the architecture"):
        suite_network(suite).features(state, torch.full((1, 50), 3))  # longer than its positions


def test_a_head_that_is_not_there_is_asked_for(folder: Path) -> None:
    suite = suite_of(folder, three={"weights": "expert.safetensors", "head": "expert.safetensors"})
    with pytest.raises(SuiteError, match=r"several layers.*by 'layers'"):
        load_head(suite, "three")
    with pytest.raises(ValueError, match="'layers' are those of a 'file'"):
        HeadSpec.model_validate({"zero_shot": {"text_tower": "x"}, "layers": "score"})
