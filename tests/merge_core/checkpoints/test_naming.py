"""Prefixes that some members lack, told from the names that transformers itself gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.naming import align_names, missing_prefix
from merge_core.merging.recipe import make_recipe
from merge_core.output.model_folder import merge_to_folder
from merge_core.suites.preflight import merge_notes
from merge_core.suites.suite import Suite, load_suite

SMALL = {"vocab_size": 30, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = transformers.BertConfig(hidden_size=8, intermediate_size=16, **SMALL)
ROBERTA = transformers.RobertaConfig(
    hidden_size=8, intermediate_size=16, max_position_embeddings=20, **SMALL
)
GPT2 = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=30, n_positions=8)
LLAMA = transformers.LlamaConfig(
    hidden_size=8, intermediate_size=16, max_position_embeddings=16, **SMALL
)
PAIRS = {
    "bert.": (transformers.BertModel, transformers.BertForSequenceClassification, BERT),
    "roberta.": (transformers.RobertaModel, transformers.RobertaForTokenClassification, ROBERTA),
    "transformer.": (transformers.GPT2Model, transformers.GPT2ForSequenceClassification, GPT2),
    "model.": (transformers.LlamaModel, transformers.LlamaForSequenceClassification, LLAMA),
}


def save(make: Any, config: Any, folder: Path, seed: int) -> Any:
    torch.manual_seed(seed)
    model = make(config).eval()
    with torch.no_grad():  # embeddings of padding begin as zeros, biases too
        for value in model.parameters():
            value.normal_()
    model.save_pretrained(folder)
    return model


def suite_at(folder: Path, base: str) -> Suite:
    experts = "{a: {weights: a}, b: {weights: b}}"
    (folder / "suite.yaml").write_text(f"{{name: s, base: {base}, experts: {experts}}}")
    return load_suite(folder)


@pytest.mark.parametrize("prefix", PAIRS)
def test_a_backbone_and_models_with_heads_merge_without_a_word_in_the_suite(
    tmp_path: Path, prefix: str
) -> None:
    bare, headed, config = PAIRS[prefix]
    for which in ("base", "experts"):
        folder = tmp_path / which
        base_class, expert_class = (bare, headed) if which == "base" else (headed, bare)
        save(base_class, config, folder / "start", 0)
        one = save(expert_class, config, folder / "a", 1)
        two = save(expert_class, config, folder / "b", 2)
        suite = suite_at(folder, "start")
        lacking = ("base",) if which == "base" else ("a", "b")
        assert suite.prefixes == dict.fromkeys(lacking, prefix)
        assert all(repr(prefix) in note for note in list(merge_notes(suite, suite.tasks))[:1])
        out = merge_to_folder(make_recipe({"method": "average"}), suite, folder / "out")
        # transformers reads the output as it reads the base, and finds the mean of the experts.
        merged = base_class.from_pretrained(out).state_dict()
        backbone = prefix.removesuffix(".")
        means = {
            name: (value + dict(two.named_parameters())[name]) / 2
            for name, value in one.named_parameters()
        }
        checked = 0
        for name, value in merged.items():
            plain = name.removeprefix(prefix)
            for candidate in (plain, f"{backbone}.{plain}"):
                if candidate in means and "classifier" not in name and "score" not in name:
                    torch.testing.assert_close(value, means[candidate])
                    checked += 1
        assert checked >= len(list(one.parameters())) - 4


def test_a_plain_prefix_only(suite_of: Callable[..., Suite]) -> None:
    """Two towers of one shape: nobody can say which of them the other model is."""
    layers = {f"layers.{i}.fc.weight": torch.randn(3, 3) for i in range(3)}
    towers = {f"{tower}.{n}": v for tower in ("text", "vision") for n, v in layers.items()}
    suite = suite_of({"a": towers, "b": towers}, layers)
    assert suite.prefixes == {}
    assert missing_prefix(Checkpoint(suite.root / "base.safetensors"), suite.expert("a")) == ""
    assert align_names({"a": suite.expert("a"), "b": suite.expert("b")}) == {}
    bigger = {n.replace("vision", "eye"): torch.randn(4, 4) for n in towers if "vision" in n}
    one = {n: v for n, v in towers.items() if "text" in n} | bigger
    assert suite_of({"a": one, "b": one}, layers).prefixes == {"base": "text."}


def test_a_prefix_in_the_suite_is_not_guessed_at(tmp_path: Path) -> None:
    for name, seed in (("start", 0), ("a", 1), ("b", 2)):
        save(
            transformers.BertModel if name == "start" else PAIRS["bert."][1],
            BERT,
            tmp_path / name,
            seed,
        )
    (tmp_path / "suite.yaml").write_text(
        "{name: s, base: start, base_prefix: bert., experts: {a: {weights: a}, b: {weights: b}}}"
    )
    suite = load_suite(tmp_path)
    assert suite.prefixes == {}
    out = merge_to_folder(make_recipe({"method": "average"}), suite, tmp_path / "out")
    names = load_file(out / "model.safetensors").keys()
    assert names == load_file(tmp_path / "start" / "model.safetensors").keys()
