"""Cross-entropy, divergence and choices of tiny models of each family, against transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis.evaluation.evaluator import Evaluator
from analysis.language import network
from analysis.outputs.prediction_store import PredictionStore
from merge_core.errors import SuiteError
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.suites.suite import Suite, load_suite
from tests.language_models import LLAMA, build, save_tokenizer, texts, write_suite

COMMON = {key: LLAMA[key] for key in ("vocab_size", "hidden_size", "intermediate_size")} | {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": COMMON | {"num_key_value_heads": 2, "head_dim": 16},  # not hidden / heads
    "qwen2": COMMON | {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": COMMON | {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": COMMON | {"num_key_value_heads": 2, "sliding_window": 4, "head_dim": 8},
    "gemma": COMMON | {"num_key_value_heads": 1, "head_dim": 8},
    "gemma2": COMMON | {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "phi": COMMON | {"partial_rotary_factor": 0.5},
    "phi3": COMMON | {"num_key_value_heads": 2},
}
# float32 against float64 on random logits of order one: rounding of order 1e-7 a layer.
CLOSE = 2e-5


def make_suite(
    folder: Path, kind: str, data: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[Suite, dict[str, Any]]:
    """A suite of two random experts about a random base, and the models themselves."""
    torch.manual_seed(1)
    models = {}
    save_tokenizer(folder / "base")
    model = build(kind, **FAMILIES[kind]).to(dtype)
    for name in ("base", "sums", "tunes"):
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.1 * torch.randn_like(value))
        model.save_pretrained(folder / name)
        models[name] = build(kind, **FAMILIES[kind])
        models[name].load_state_dict(model.state_dict())
    tasks = {
        t: {"weights": t, "data": {"kind": "language", **data, "path": f"{t}.txt"}} for t in models
    }
    tasks.pop("base")
    for task in tasks:
        (folder / f"{task}.txt").write_text("\n".join(texts(task, 12, 5)))
    return load_suite(write_suite(folder, tasks)), models


def tokens_of(folder: Path, lines: list[str]) -> list[list[int]]:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "base" / "tokenizer.json"))
    return [tokenizer(line)["input_ids"] for line in lines]


def loss_by_library(model: Any, row: list[int]) -> float:
    """transformers' own loss of one text, float64."""
    ids = torch.tensor([row])
    with torch.no_grad():
        return float(model.double()(input_ids=ids, labels=ids).loss)


def logs(model: Any, row: list[int]) -> Tensor:
    with torch.no_grad():
        return model.double()(input_ids=torch.tensor([row])).logits[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("kind", FAMILIES)
def test_cross_entropy_and_divergence_are_the_librarys_own(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, models = make_suite(tmp_path, kind, {"val_share": 0.5})
    evaluator = Evaluator(suite, PredictionStore(tmp_path / "kept.sqlite"))
    # Several texts of different lengths in a batch, so that there is padding.
    frame = evaluator.checkpoint(suite.expert("sums"), suite.tasks)
    images = evaluator.outputs.images(suite.tasks, "val")
    measured = evaluator.measure_member(
        suite.expert("sums"), images, "val", ("cross_entropy", "divergence", "entropy")
    )
    for task in suite.tasks:
        rows = [
            each.tokens.tolist() for each in evaluator.outputs.raw_inputs(task, "val").sequences
        ]
        every = tokens_of(tmp_path, texts(task, 12, 5))
        assert len({len(row) for row in rows}) > 1
        assert all(row in every for row in rows)
        own = [loss_by_library(models["sums"], row) for row in rows]
        counts = [len(row) - 1 for row in rows]
        row = frame[frame["task"] == task].iloc[0]
        assert row["cross_entropy"] == pytest.approx(np.average(own, weights=counts), abs=CLOSE)
        assert row["tokens"] == sum(counts)
        assert row["images"] == 6
        np.testing.assert_allclose(measured[task]["cross_entropy"], own, atol=CLOSE)
        for place, ids in enumerate(rows):
            p, q = logs(models["sums"], ids), logs(models[task], ids)
            kl = float((q.exp() * (q - p)).sum(-1).mean())
            assert measured[task]["divergence"][place] == pytest.approx(kl, abs=CLOSE)
            entropy = float(-(p.exp() * p).sum(-1).mean())
            assert measured[task]["entropy"][place] == pytest.approx(entropy, abs=CLOSE)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma"])
def test_weights_as_stored_give_the_numbers_of_float32(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large models keep their dtype, and each layer is float32 while it runs."""
    suite, models = make_suite(tmp_path, kind, {"val_share": 0.5}, torch.bfloat16)
    monkeypatch.setattr(network, "FLOAT32_ELEMENTS", 0)
    evaluator = Evaluator(suite, PredictionStore(tmp_path / "kept.sqlite"))
    images = evaluator.outputs.images(["sums"], "val")
    found = evaluator.measure_member(suite.expert("sums"), images, "val", ("cross_entropy",))
    rows = [each.tokens.tolist() for each in evaluator.outputs.raw_inputs("sums", "val").sequences]
    own = [loss_by_library(models["sums"], row) for row in rows]
    np.testing.assert_allclose(found["sums"]["cross_entropy"], own, atol=CLOSE)
    loaded = evaluator.outputs._load(
        (n, suite.expert("sums").tensor(n)) for n in suite.expert("sums")
    )
    assert {value.dtype for value in loaded._state.values()} == {torch.bfloat16}
    assert len({id(v) for v in loaded._state.values()}) == len(suite.expert("sums"))  # tied once


def test_the_old_form_of_a_configuration_is_read_in_full(tmp_path: Path) -> None:
    """transformers 4 keeps rope_theta by itself; the library's defaults have no such field."""
    suite, models = make_suite(tmp_path, "llama", {"val_share": 0.5})
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    config.pop("rope_parameters")
    path.write_text(json.dumps(config | {"rope_theta": 37.0, "rope_scaling": None}))
    other = build(
        "llama", **FAMILIES["llama"], rope_parameters={"rope_theta": 37.0, "rope_type": "default"}
    )
    other.load_state_dict(models["sums"].state_dict())
    suite = load_suite(suite.path)
    evaluator = Evaluator(suite, PredictionStore(tmp_path / "kept.sqlite"))
    frame = evaluator.experts(["sums"])
    rows = [each.tokens.tolist() for each in evaluator.outputs.raw_inputs("sums", "val").sequences]
    own = [loss_by_library(other, row) for row in rows]
    expected = np.average(own, weights=[len(row) - 1 for row in rows])
    assert frame["cross_entropy"].iloc[0] == pytest.approx(expected, abs=CLOSE)
    first = loss_by_library(models["sums"], rows[0])
    assert abs(first - own[0]) > 100 * CLOSE  # the field matters


def test_long_texts_are_cut_and_every_token_but_the_first_counts_once(tmp_path: Path) -> None:
    suite, models = make_suite(tmp_path, "gpt2", {"val_share": 0.5, "length": 5})
    evaluator = Evaluator(suite, PredictionStore(tmp_path / "kept.sqlite"))
    frame = evaluator.experts(["tunes"])
    inputs = evaluator.outputs.raw_inputs("tunes", "val")
    whole: dict[int, list[int]] = {}
    total = 0.0
    for each in inputs.sequences:
        ids = each.tokens.tolist()
        assert len(ids) <= 5
        assert each.start == 1
        before = whole.setdefault(each.unit, ids[:1])
        assert before[-1] == ids[0]
        before += ids[1:]
        total += loss_by_library(models["tunes"], ids) * (len(ids) - 1)
    every = tokens_of(tmp_path, texts("tunes", 12, 5))
    assert all(row in every for row in whole.values())
    assert len(whole) == 6
    count = sum(len(row) - 1 for row in whole.values())
    assert frame["tokens"].iloc[0] == count
    assert frame["cross_entropy"].iloc[0] == pytest.approx(total / count, abs=CLOSE)


def test_blocks_of_a_file_are_units(tmp_path: Path) -> None:
    suite, models = make_suite(tmp_path, "llama", {"blocks": True, "length": 9, "val_share": 0.5})
    evaluator = Evaluator(suite, PredictionStore(tmp_path / "kept.sqlite"))
    (ids,) = tokens_of(tmp_path, [(tmp_path / "sums.txt").read_text()])
    blocks = [ids[i : i + 9] for i in range(0, len(ids) - 1, 8)]
    drawn = [
        each.tokens.tolist()
        for split in ("val", "test")
        for each in evaluator.outputs.raw_inputs("sums", split).sequences
    ]
    assert sorted(drawn) == sorted(blocks)
    frame = evaluator.experts(["sums"], "test")
    own = [each.tokens.tolist() for each in evaluator.outputs.raw_inputs("sums", "test").sequences]
    losses = [loss_by_library(models["sums"], row) for row in own]
    expected = np.average(losses, weights=[len(row) - 1 for row in own])
    assert frame["cross_entropy"].iloc[0] == pytest.approx(expected, abs=CLOSE)
    assert frame["images"].iloc[0] == len(own)


@pytest.mark.parametrize("by_token", [False, True])
def test_choices_are_taken_by_likelihood(tmp_path: Path, by_token: bool) -> None:
    suite, models = make_suite(tmp_path, "llama", {"val_share": 0.5})
    random = np.random.default_rng(0)
    rows = []
    for i, text in enumerate(texts("tunes", 20, 9)):
        first, *rest = text.split()
        choices = [" ".join(random.permutation(rest)[: 2 + j]) for j in range(2 + i % 3)]
        rows.append({"question": first, "choices": choices, "answer": int(i % len(choices))})
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {
        "kind": "language",
        "path": "quiz.jsonl",
        "text_columns": ["question"],
        "choices_column": "choices",
        "answer_column": "answer",
        "length_normalised": by_token,
        "val_share": 0.5,
    }
    experts = {task: {"weights": task, "data": copy.deepcopy(data)} for task in ("sums", "tunes")}
    suite = load_suite(write_suite(tmp_path, experts))
    evaluator = Evaluator(suite, PredictionStore(tmp_path / "kept.sqlite"))
    model = models["sums"]

    def likelihood(question: str, choice: str) -> float:
        (before, ids) = tokens_of(tmp_path, [question, f"{question} {choice}"])
        said = logs(model, ids)
        picked = [float(said[i - 1, ids[i]]) for i in range(len(before), len(ids))]
        return float(np.mean(picked)) if by_token else sum(picked)

    right = {"val": 0, "test": 0}
    frames = {split: evaluator.experts(["sums"], split) for split in ("val", "test")}
    table = {split: evaluator.outputs.raw_inputs("sums", split) for split in right}
    for row in rows:
        scores = [likelihood(row["question"], choice) for choice in row["choices"]]
        hit = int(np.argmax(scores)) == row["answer"]
        (ids,) = tokens_of(tmp_path, [f"{row['question']} {row['choices'][0]}"])
        split = next(s for s in right if any(e.tokens.tolist() == ids for e in table[s].sequences))
        right[split] += hit
    for split, count in right.items():
        assert frames[split]["correct"].iloc[0] == count
        assert frames[split]["images"].iloc[0] == 10
    assert evaluator.metric.column == "accuracy"


def test_a_merge_is_what_its_weights_say(tmp_path: Path) -> None:
    suite, models = make_suite(tmp_path, "qwen2", {"val_share": 0.5})
    evaluator = Evaluator(suite, PredictionStore(tmp_path / "kept.sqlite"))
    session = MergeSession(suite, suite.tasks, FactorStore(tmp_path / "factors"))
    recipe = make_recipe({"suite": str(suite.path), "method": "average"})
    frame = evaluator.recipe(recipe, session)
    merged = build("qwen2", **FAMILIES["qwen2"])
    pair = [models[task].state_dict() for task in suite.tasks]
    merged.load_state_dict({name: (pair[0][name] + pair[1][name]) / 2 for name in pair[0]})
    rows = [each.tokens.tolist() for each in evaluator.outputs.raw_inputs("sums", "val").sequences]
    own = [loss_by_library(merged, row) for row in rows]
    expected = np.average(own, weights=[len(row) - 1 for row in rows])
    assert frame["cross_entropy"].iloc[0] == pytest.approx(expected, abs=CLOSE)
    before = evaluator.outputs.forward_images
    assert evaluator.recipe(recipe, session).equals(frame)
    assert evaluator.outputs.forward_images == before  # known by content


REFUSED = {
    "empty": (
        {"a.csv": 'text\none plus two\n  \n" "\n'},
        {"path": "a.csv"},
        "Text [23] of .* is empty",
    ),
    "nothing": ({"a.txt": "\n  \n"}, {"path": "a.txt"}, "holds no text"),
    "column": ({"a.csv": "words\none plus\n"}, {"path": "a.csv"}, "no column 'text'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_texts_that_cannot_be_scored_are_refused(case: str, tmp_path: Path) -> None:
    files, data, said = REFUSED[case]
    make_suite(tmp_path, "gpt2", {})
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    experts = {"sums": {"weights": "sums", "data": {"kind": "language", "val_share": 0.5, **data}}}
    evaluator = Evaluator(
        load_suite(write_suite(tmp_path, experts)), PredictionStore(tmp_path / "k")
    )
    with pytest.raises(SuiteError, match=said):
        [evaluator.experts(["sums"], split) for split in ("val", "test")]


def test_a_text_of_one_token_is_refused(tmp_path: Path) -> None:
    """Only of a tokenizer that puts nothing before a text has it one."""
    suite, _ = make_suite(tmp_path, "gpt2", {"val_share": 0.5})
    path = tmp_path / "base" / "tokenizer.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"post_processor": None}))
    (tmp_path / "sums.txt").write_text("one\ntwo\n")
    with pytest.raises(SuiteError, match="has 1 token"):
        Evaluator(suite, PredictionStore(tmp_path / "k")).experts(["sums"])


@pytest.mark.parametrize(
    "row",
    [
        {"choices": ["one"], "answer": 0},
        {"choices": ["one", "two"], "answer": None},
        {"choices": ["one", "two"], "answer": 2},
        {"choices": ["one", " "], "answer": 0},
    ],
)
def test_questions_without_choices_or_answer_are_refused(
    row: dict[str, Any], tmp_path: Path
) -> None:
    make_suite(tmp_path, "gpt2", {})
    rows = [{"question": "one plus", **row}] * 2
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {
        "kind": "language",
        "path": "quiz.jsonl",
        "text_columns": ["question"],
        "val_share": 0.5,
        "choices_column": "choices",
        "answer_column": "answer",
    }
    suite = load_suite(write_suite(tmp_path, {"sums": {"weights": "sums", "data": data}}))
    with pytest.raises(SuiteError, match=r"Question [12] of"):
        Evaluator(suite, PredictionStore(tmp_path / "k")).experts(["sums"])


def test_weights_that_say_nothing_finite_are_refused(tmp_path: Path) -> None:
    suite, _ = make_suite(tmp_path, "llama", {"val_share": 0.5})
    evaluator = Evaluator(suite, PredictionStore(tmp_path / "k"))
    expert = suite.expert("sums")
    images = evaluator.outputs.images(["sums"], "val")
    weights = {name: expert.tensor(name) * float("inf") for name in expert}
    with pytest.raises(SuiteError, match="non-finite"):
        evaluator.outputs.measure("0" * 64, lambda: weights, images, "val", ("cross_entropy",))


def test_an_expert_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    suite, _ = make_suite(tmp_path, "llama", {"val_share": 0.5})
    save_tokenizer(tmp_path / "sums", extra=["<added>"])
    Evaluator(load_suite(suite.path))  # tokens besides cut texts no other way
    path = tmp_path / "sums" / "tokenizer.json"
    document = json.loads(path.read_text())
    words = document["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    path.write_text(json.dumps(document))
    with pytest.raises(SuiteError, match="different tokenizers"):
        Evaluator(load_suite(suite.path))


def test_tasks_of_several_metrics_are_refused(tmp_path: Path) -> None:
    make_suite(tmp_path, "llama", {})
    quiz = {
        "kind": "language",
        "path": "q.jsonl",
        "text_columns": ["q"],
        "choices_column": "c",
        "answer_column": "a",
    }
    experts = {
        "sums": {"weights": "sums", "data": {"kind": "language", "path": "sums.txt"}},
        "tunes": {"weights": "tunes", "data": quiz},
    }
    suite = load_suite(write_suite(tmp_path, experts))
    with pytest.raises(SuiteError, match="several ways"):
        Evaluator(suite)


def test_a_missing_layer_and_a_deeper_checkpoint_are_refused(tmp_path: Path) -> None:
    suite, _ = make_suite(tmp_path, "llama", {"val_share": 0.5})
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    for layers, said in ((3, "lack"), (1, "fewer layers")):
        path.write_text(json.dumps(config | {"num_hidden_layers": layers}))
        with pytest.raises(SuiteError, match=said):
            Evaluator(load_suite(suite.path), PredictionStore(tmp_path / "k")).experts(["sums"])
