"""What commands say of members that do not belong together, on models that transformers saves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mergescope import cli

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(25))]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {**SIZES, "intermediate_size": 24, "vocab_size": 30, "max_position_embeddings": 12}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command; gives its exit code, output and errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["mergescope", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def save_bert(folder: Path, seed: int, classes: int = 0, **fields: Any) -> None:
    """A tiny BERT: with classes a classifier tuned from seed 0's, else the bare model."""
    torch.manual_seed(0)
    base = transformers.BertModel(transformers.BertConfig(**BERT)).state_dict()
    config = transformers.BertConfig(**BERT, num_labels=classes or 2)
    whole = transformers.BertForSequenceClassification if classes else transformers.BertModel
    torch.manual_seed(seed)
    model = whole(config)
    start = {f"bert.{n}": v for n, v in base.items()} if classes else base
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name in start:
                value.copy_(start[name] + 0.1 * start[name].std().nan_to_num() * value)
    model.save_pretrained(folder)
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | fields))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")


def write_suite(root: Path, *experts: str) -> Path:
    """A suite and a recipe of the experts in these folders about the base."""
    members = "\n".join(f"  {name}: {{weights: {name}}}" for name in experts)
    (root / "suite.yaml").write_text(
        f"name: s\nbase: base\nbase_prefix: bert.\nexperts:\n{members}\n"
    )
    (root / "recipe.yaml").write_text("suite: suite.yaml\nmethod: task_arithmetic\n")
    return root / "suite.yaml"


@pytest.fixture
def berts(tmp_path: Path) -> Path:
    save_bert(tmp_path / "base", 0, architectures=None)
    save_bert(tmp_path / "mood", 1, 3, problem_type="single_label_classification")
    save_bert(tmp_path / "news", 2, 5, finetuning_task="news", use_cache=False)
    write_suite(tmp_path, "mood", "news")
    return tmp_path


def test_classifiers_of_one_bert_merge_without_a_word(run: Any, berts: Path) -> None:
    code, _, err = run("merge", berts / "recipe.yaml", "-o", berts / "out")
    assert (code, err) == (0, "")
    code, out, _ = run("inspect", berts)
    assert code == 0
    assert out.count("fine-tune") >= 2
    assert "noted" in out
    assert "warned" not in out


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_act", "relu"), ("num_attention_heads", 4), ("layer_norm_eps", 0.01)],
)
def test_another_network_is_refused_whatever_the_order(
    run: Any, berts: Path, field: str, value: object
) -> None:
    save_bert(berts / "odd", 3, 2, **{field: value})
    sentences = set()
    for order in (("odd", "mood", "news"), ("news", "odd", "mood")):
        write_suite(berts, *order)
        code, _, err = run("merge", berts / "recipe.yaml", "-o", berts / "out")
        assert code == 2
        sentences.add(err)
    (sentence,) = sentences
    assert sentence.count("\n") == 1
    assert field in sentence
    assert "odd" in sentence
    assert not (berts / "out").exists()
    code, out, err = run("inspect", berts, "--headers-only")
    assert code == 2
    assert "refused" in out
    assert "A merge is impossible" in err
    _, out, _ = run("suite", "init", berts, "--base", berts / "base", "--overwrite")
    assert "refused" in out
    assert field in out


def test_a_permuted_vocabulary_is_refused(run: Any, berts: Path) -> None:
    turned = [*WORDS[:5], *WORDS[:4:-1]]
    (berts / "news" / "vocab.txt").write_text("\n".join(turned) + "\n")
    code, _, err = run("merge", berts / "recipe.yaml", "-o", berts / "out")
    assert code == 2
    assert "row 5 is 'w0' in base, mood, 'w24' in news" in err


def test_a_stranger_is_warned_of_and_merged(run: Any, berts: Path) -> None:
    torch.manual_seed(7)
    config = transformers.BertConfig(**BERT, num_labels=2)
    transformers.BertForSequenceClassification(config).save_pretrained(berts / "odd")
    write_suite(berts, "mood", "odd", "news")
    code, _, err = run("merge", berts / "recipe.yaml", "-o", berts / "out")
    assert code == 0
    assert err.startswith("warning: odd is no fine-tune of the base")
    assert err.count("\n") == 1
    code, out, _ = run("inspect", berts)
    assert code == 0
    assert "stranger" in out
    assert "warning: odd is no fine-tune" in out
    code, out, _ = run("suite", "init", berts, "--base", berts / "base", "--overwrite")
    assert code == 0
    assert "stranger" in out


def test_templates_and_tokens_are_warned_of_before_the_merge(run: Any, berts: Path) -> None:
    save_bert(berts / "news", 2, 5, pad_token_id=3)
    (berts / "news" / "chat_template.jinja").write_text("{{ messages }}")
    code, _, err = run("merge", berts / "recipe.yaml", "-o", berts / "out")
    assert code == 0
    assert [line.split()[1] for line in err.splitlines()] == ["chat_template", "pad_token_id"]
