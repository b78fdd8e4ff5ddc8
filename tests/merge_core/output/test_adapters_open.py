"""Adapters describe themselves, and PEFT's logits are the merged model's: ties and heads included.

The merged model is made by hand: transformers' own average of the experts' state dicts.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.merging.recipe import make_recipe
from merge_core.output import base_class
from merge_core.output.adapter_draft import AdapterRank, AdapterReport
from merge_core.output.lora import merge_to_adapter
from merge_core.suites.suite import Suite, load_suite

ALL = AdapterRank.parse("1.0")
SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
Make = Callable[[], Any]


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def qwen2() -> Any:
    config = transformers.Qwen2Config(
        **SMALL, intermediate_size=32, num_key_value_heads=2, tie_word_embeddings=True
    )
    return transformers.Qwen2ForCausalLM(config)


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 20}
    config = transformers.BartConfig(
        vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1, **sizes
    )
    return transformers.BartForConditionalGeneration(config)


def bert(kind: str, **more: Any) -> Any:
    config = transformers.BertConfig(
        **SMALL, intermediate_size=32, max_position_embeddings=16, **more
    )
    return getattr(transformers, f"Bert{kind}")(config)


def roberta() -> Any:
    config = transformers.RobertaConfig(
        **SMALL, intermediate_size=32, max_position_embeddings=16, num_labels=3
    )
    return transformers.RobertaForSequenceClassification(config)


def vision(kind: str) -> Any:
    """Networks whose modules transformers 5 calls otherwise than the files."""
    sizes: dict[str, Any] = {"image_size": 8, "patch_size": 4, "num_labels": 3}
    if kind == "Swin":
        sizes |= {"patch_size": 2, "embed_dim": 16, "depths": [1], "num_heads": [2]}
        sizes |= {"window_size": 2}
    else:
        sizes |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    return getattr(transformers, f"{kind}ForImageClassification")(config)


@torch.no_grad()
def output_of(model: Any) -> Tensor:
    """What a model gives for fixed inputs."""
    if hasattr(model.config, "image_size"):
        given = {"pixel_values": torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)}
    else:
        given = {"input_ids": torch.arange(2, 8)[None]}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.arange(2, 7)[None]
    found = model.eval()(**given)
    out: Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return out


def suite_of(folder: Path, make: Make) -> tuple[Suite, Any, Any]:
    """Two full fine-tunes of a model and their base as transformers saves them; base, average."""
    torch.manual_seed(0)
    start = make().eval()
    start.save_pretrained(folder / "base")
    average = copy.deepcopy(start)
    tuned = []
    for seed, name in enumerate("ab"):
        model = copy.deepcopy(start)
        source = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=source)
        model.save_pretrained(folder / name)
        tuned.append(model)
    with torch.no_grad():
        for target, one, other in zip(
            average.parameters(), *(model.parameters() for model in tuned), strict=True
        ):
            target.copy_((one + other) / 2)
    document = {
        "name": "s",
        "base": "base",
        "experts": {name: {"weights": name} for name in "ab"},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(document))
    return load_suite(folder), start, average


def write(suite: Suite, out: Path) -> AdapterReport:
    """Average as an adapter."""
    recipe = make_recipe({"suite": str(suite.path), "method": "average"})
    return merge_to_adapter(recipe, suite, out, ALL)


def assert_same_output(model: Any, adapter: Path, expected: Tensor, again: Path) -> None:
    """PEFT's output with the adapter, merged into the base, and saved and opened again."""
    assert float((output_of(model) - expected).abs().max()) > 1e-3  # the test can fail
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(adapter))
    assert not [w for w in told if "adapter keys" in str(w.message)]
    torch.testing.assert_close(output_of(adapted), expected, rtol=1e-4, atol=1e-5)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(output_of(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(again)
    opened = type(model).from_pretrained(again)
    torch.testing.assert_close(output_of(opened), expected, rtol=1e-4, atol=1e-5)


KINDS: list[tuple[Make, str | None, str]] = [
    (gpt2, "CAUSAL_LM", "AutoPeftModelForCausalLM"),
    (qwen2, "CAUSAL_LM", "AutoPeftModelForCausalLM"),
    (t5, "SEQ_2_SEQ_LM", "AutoPeftModelForSeq2SeqLM"),
    (bart, "SEQ_2_SEQ_LM", "AutoPeftModelForSeq2SeqLM"),
    (lambda: bert("ForMaskedLM"), None, "AutoPeftModel"),
    (lambda: bert("Model"), None, "AutoPeftModel"),
    (
        lambda: bert("ForSequenceClassification", num_labels=3),
        "SEQ_CLS",
        "AutoPeftModelForSequenceClassification",
    ),
    (roberta, "SEQ_CLS", "AutoPeftModelForSequenceClassification"),
    (
        lambda: bert("ForTokenClassification", num_labels=3),
        "TOKEN_CLS",
        "AutoPeftModelForTokenClassification",
    ),
    (lambda: vision("ViT"), None, "AutoPeftModel"),
    (lambda: vision("Dinov2"), None, "AutoPeftModel"),
    (lambda: vision("Swin"), None, "AutoPeftModel"),
]


@pytest.mark.parametrize(
    ("make", "task", "auto"),
    KINDS,
    ids=[
        "gpt2",
        "qwen2",
        "t5",
        "bart",
        "mlm",
        "bert",
        "cls",
        "roberta",
        "tokens",
        "vit",
        "dino",
        "swin",
    ],
)
def test_full_fine_tunes_as_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make, task: str | None, auto: str
) -> None:
    suite, start, average = suite_of(tmp_path, make)
    report = write(suite, tmp_path / "thin")
    config = json.loads((tmp_path / "thin" / "adapter_config.json").read_text())
    expected = output_of(average)
    assert_same_output(start, tmp_path / "thin", expected, tmp_path / "again")
    assert (config["task_type"], config["base_model_name_or_path"]) == (task, "base")
    assert (config["auto_mapping"] is None) == (task is not None)
    # What the class is known to tie is stored under each name, and nothing of it in the base.
    tokens = ("wte.weight", "embed_tokens.weight", "shared.weight", "word_embeddings.weight")
    assert not any(name.endswith(tokens) for name in report.in_base)
    # A folder is named, not its place: it opens from where the folder lies.
    monkeypatch.chdir(tmp_path)
    options = {"num_labels": 3} if task in ("SEQ_CLS", "TOKEN_CLS") else {}
    opened = getattr(peft, auto).from_pretrained("thin", **options)
    torch.testing.assert_close(output_of(opened), expected, rtol=1e-4, atol=1e-5)
    for file in (tmp_path / "thin").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


def test_a_base_that_was_saved_as_a_bare_backbone(tmp_path: Path) -> None:
    """As GPT-2 on the hub: the class's own names have a prefix that the files lack."""
    suite, start, average = suite_of(tmp_path, gpt2)
    for name in ("base", "a", "b"):
        path = tmp_path / name / "model.safetensors"
        state = {n.removeprefix("transformer."): v for n, v in load_file(path).items()}
        save_file(state, path, {"format": "pt"})
    write(load_suite(suite.path), tmp_path / "thin")
    assert_same_output(start, tmp_path / "thin", output_of(average), tmp_path / "again")


@pytest.mark.parametrize("known", ["pickled with both names", "no configuration", "no library"])
def test_ties_by_other_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: str) -> None:
    suite, start, average = suite_of(tmp_path, gpt2)
    base = tmp_path / "base"
    if known == "pickled with both names":
        (base / "model.safetensors").unlink()
        torch.save(start.state_dict(), base / "pytorch_model.bin")
    elif known == "no configuration":
        (base / "config.json").unlink()
    else:
        monkeypatch.setattr(base_class, "_build", lambda *_: None)
    write(load_suite(suite.path), tmp_path / "thin")
    if known == "pickled with both names":
        assert_same_output(start, tmp_path / "thin", output_of(average), tmp_path / "again")
        return
    # PEFT writes it into the base, where it changes under all of its names.
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(start), str(tmp_path / "thin"))
    torch.testing.assert_close(output_of(adapted), output_of(average), rtol=1e-4, atol=1e-5)


def test_a_class_that_is_none_of_the_library_s(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    base = Checkpoint(tmp_path)

    def described(**fields: Any) -> base_class.BaseClass:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **fields}))
        return base_class.base_class(base)

    for named in (None, [], "x", [3], ["os.system"], [""]):
        assert described(architectures=named) == base_class.UNKNOWN
    for named in ("__import__", "BertTokenizer", "Nothing"):
        assert described(architectures=[named]) == base_class.UNKNOWN
    known = base_class.BaseClass(task="CAUSAL_LM")
    assert described(architectures=["OwnForCausalLM"]) == known
    # It would take hours to build what a stranger's configuration asks for.
    endless = {"architectures": ["BertLMHeadModel"], "num_hidden_layers": 10**9}
    assert described(**endless) == known
    # What is built from another place is not built.
    small = {"num_hidden_layers": 1, "_name_or_path": "org/name"}
    assert described(architectures=["BertLMHeadModel"], **small).names == {"w": "w"}
    for fetched in ({"backbone": "org/name"}, {"part": {"use_pretrained_backbone": True}}):
        assert described(architectures=["BertLMHeadModel"], **small, **fetched) == known
