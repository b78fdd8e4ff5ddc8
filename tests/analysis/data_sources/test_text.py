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


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """The same rows in the format that a name says."""
    import csv
    import json

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            delimiter = "," if path.suffix == ".csv" else "\t"
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)


SPOKEN = [
    {"text": 'a, "b"', "label": "yes"},
    {"text": "null", "label": "no"},
    {"text": "12", "label": "yes"},
    {"text": "", "label": "maybe"},
]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(
    "place", ["{split}{suffix}", "{split}/part-1{suffix}", "d/x_{split}{suffix}"]
)
def test_tables_of_every_kind_are_the_same_texts_and_labels(
    folder: Path, suffix: str, place: str
) -> None:
    for split, rows in (("train", SPOKEN[:2]), ("dev", SPOKEN[:3]), ("test", SPOKEN)):
        write_table(folder / "tables" / place.format(split=split, suffix=suffix), rows)
    (folder / "tables/README.txt").write_text("nothing")
    tokens, labels, names = read(folder, path="tables", test="test")
    assert names == ("maybe", "no", "yes")
    found = {spell(row): names[label] for row, label in zip(tokens, labels, strict=True)}
    # A text's white space and marks that the vocabulary lacks are the tokenizer's affair.
    assert {found[text] for text in ("null", "12", "")} == {"no", "yes", "maybe"}
    assert found["null"] == "no"
    assert found[""] == "maybe"
    assert len(read(folder, "val", path="tables", test="test")[0]) == 3


def test_one_file_is_split_by_the_seed(folder: Path) -> None:
    for suffix in (".csv", ".jsonl", ".parquet"):
        write_table(folder / f"one{suffix}", SPOKEN * 5)
        given = {"path": f"one{suffix}", "test": None, "val_share": 0.25}
        val, test = (read(folder, split, **given)[1] for split in ("val", "test"))
        assert (len(val), len(test)) == (5, 15)
        counts = np.bincount(np.concatenate([val, test]))
        assert counts.tolist() == [5, 5, 10]


@pytest.mark.parametrize("where", ["suite", "folder"])
def test_classes_are_numbered_as_they_are_listed(folder: Path, where: str) -> None:
    write_table(folder / "tables/test.csv", SPOKEN)
    fields: dict[str, Any] = {"path": "tables", "test": "test"}
    if where == "suite":
        fields["classes"] = ["yes", "no", "maybe"]
    else:
        (folder / "tables/classes.txt").write_text("yes\nno\nmaybe\n")
    _, labels, names = read(folder, "test", **fields)
    assert names == ("yes", "no", "maybe")
    assert set(labels) <= {0, 1, 2}
    numbered = [{**row, "label": number} for number, row in enumerate(SPOKEN[:3])]
    write_table(folder / "tables/test.csv", numbered)
    assert read(folder, "test", **fields)[2] == names


def test_a_label_that_is_no_class_is_named(folder: Path) -> None:
    write_table(folder / "tables/test.csv", SPOKEN)
    with pytest.raises(SuiteError, match="'maybe' is none of the 2 classes"):
        read(folder, path="tables", test="test", classes=["no", "yes"], val_share=0.01)
    (folder / "tables/test.csv").write_bytes(b"\xff\xfe\x00broken\x00")
    with pytest.raises(SuiteError, match="cannot be read as a table"):
        read(folder, path="tables", test="test")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer": None}, "Texts need a tokenizer"),
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
        ({"text_columns": []}, "at least 1"),
        ({"text_columns": ["a", "b", "c"]}, "at most 2"),
        ({"mean": [0, 0, 0]}, "takes no transform, mean"),
        ({"dataset": "org/name"}, "either 'path', a folder or file, or 'dataset'"),
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
