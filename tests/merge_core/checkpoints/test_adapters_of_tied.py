"""Adapters over bases whose head is their embedding: PEFT's logits, or a refusal."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.lora import AdaptedCheckpoint
from merge_core.checkpoints.tied import ties
from merge_core.errors import CheckpointError
from merge_core.merging.recipe import make_recipe
from merge_core.output.model_folder import merge_to_folder
from merge_core.suites.suite import Suite, load_suite

IDS = torch.arange(6)[None]
SMALL: dict[str, Any] = {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "qwen2": transformers.Qwen2Config(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True, **SMALL,
    ),
    "gpt2": transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=16, tie_word_embeddings=True, **SMALL
    ),
}  # fmt: skip
INSIDE = {"qwen2": "q_proj", "gpt2": "c_attn"}
EMBEDDING = {"qwen2": "embed_tokens", "gpt2": "wte"}


def base_model(kind: str) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()


def adapt(kind: str, folder: Path, seed: int, **options: Any) -> Any:
    """A trained adapter, saved, and the model as PEFT opens it again."""
    torch.manual_seed(seed)
    options = {"r": 2, "task_type": "CAUSAL_LM", "init_lora_weights": False} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base_model(kind), LoraConfig(**options))
        for name, value in model.named_parameters():
            if "modules_to_save" in name:
                value.data += torch.randn_like(value)
        model.save_pretrained(folder)
        return PeftModel.from_pretrained(base_model(kind), folder).eval()


def suite_at(folder: Path, *tasks: str) -> Suite:
    experts = ", ".join(f"{task}: {{weights: {task}}}" for task in tasks)
    (folder / "suite.yaml").write_text(f"{{name: tied, base: base, experts: {{{experts}}}}}")
    return load_suite(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "inside": ({}, False),
    "head": ({"target_modules": ["head"]}, True),
    "embedding and head": ({"target_modules": ["embedding", "head"]}, True),
    "embedding, tied": ({"target_modules": ["embedding"], "ensure_weight_tying": True}, True),
    "head whole": ({"modules_to_save": ["head"]}, True),
    "both whole": ({"modules_to_save": ["embedding", "head"]}, True),
    "embedding whole, tied": (
        {"modules_to_save": ["embedding"], "ensure_weight_tying": True},
        False,
    ),
}


def options_of(case: str, kind: str) -> dict[str, Any]:
    names = {"embedding": EMBEDDING[kind], "head": "lm_head"}
    options = {
        key: [names[each] for each in value] if isinstance(value, list) else value
        for key, value in CASES[case][0].items()
    }
    options["target_modules"] = [INSIDE[kind], *options.get("target_modules", ())]
    return options


ALL = [(kind, case, twice) for kind in CONFIGS for case in CASES for twice in (False, True)]
# PEFT ties what is called embed_tokens; GPT-2's wte alone leaves its head as it was.
APART = [("gpt2", case, twice) for case in CASES if "tied" in case for twice in (False, True)]


@pytest.mark.parametrize(("kind", "case", "twice"), [each for each in ALL if each not in APART])
def test_the_merged_model_has_pefts_logits(
    tmp_path: Path, kind: str, case: str, twice: bool
) -> None:
    """One expert averaged is that expert, head and embedding apart where PEFT has them apart."""
    base_model(kind).save_pretrained(tmp_path / "base")
    if twice:  # a pickle names both
        state = base_model(kind).state_dict()
        (tmp_path / "base" / "model.safetensors").unlink()
        torch.save(state, tmp_path / "base" / "pytorch_model.bin")
    expected = logits(adapt(kind, tmp_path / "a", 1, **options_of(case, kind)))
    suite = suite_at(tmp_path, "a")
    assert suite.manifest(suite.tasks).keeps_head_apart == CASES[case][1]
    out = merge_to_folder(make_recipe({"method": "average"}), suite, tmp_path / "out")
    merged = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_experts_that_change_the_head_and_others_are_merged_apart(tmp_path: Path) -> None:
    base_model("qwen2").save_pretrained(tmp_path / "base")
    one = adapt("qwen2", tmp_path / "one", 1, target_modules=["q_proj", "lm_head"])
    two = adapt("qwen2", tmp_path / "two", 2, target_modules=["q_proj"])
    suite = suite_at(tmp_path, "one", "two")
    out = merge_to_folder(make_recipe({"method": "average"}), suite, tmp_path / "out")
    merged = load_file(out / "model.safetensors")
    layer = one.base_model.model.lm_head
    head = layer.base_layer.weight + layer.get_delta_weight("default")
    embedding = two.base_model.model.model.embed_tokens.weight
    mean = (head.detach() + embedding.detach()) / 2
    torch.testing.assert_close(merged["lm_head.weight"], mean)
    torch.testing.assert_close(merged["model.embed_tokens.weight"], embedding.detach())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_an_embedding_changed_without_its_head_is_refused_where_no_file_names_the_head(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    base_model("qwen2").save_pretrained(tmp_path / "base")
    adapt("qwen2", tmp_path / "a", 1, **options)
    with pytest.raises(CheckpointError, match=r"embed_tokens.*tie_word_embeddings.*merge_and_unl"):
        AdaptedCheckpoint(tmp_path / "a", Checkpoint(tmp_path / "base"))


@pytest.mark.parametrize("case", ["embedding, tied", "embedding whole, tied"])
def test_an_embedding_changed_alone_is_apart_where_a_file_names_the_head(
    tmp_path: Path, case: str
) -> None:
    (tmp_path / "base").mkdir()
    base_model("gpt2").config.save_pretrained(tmp_path / "base")
    torch.save(base_model("gpt2").state_dict(), tmp_path / "base" / "pytorch_model.bin")
    expected = logits(adapt("gpt2", tmp_path / "a", 1, **options_of(case, "gpt2")))
    suite = suite_at(tmp_path, "a")
    assert suite.manifest(suite.tasks).keeps_head_apart
    out = merge_to_folder(make_recipe({"method": "average"}), suite, tmp_path / "out")
    merged = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_a_classifiers_embedding_may_be_changed(tmp_path: Path) -> None:
    """A model that is used without its language head has nothing that is tied."""
    config = transformers.Qwen2Config(**{**CONFIGS["qwen2"].to_dict(), "num_labels": 3})
    torch.manual_seed(0)
    base = transformers.Qwen2ForSequenceClassification(config)
    base.save_pretrained(tmp_path / "base")
    options = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["embed_tokens"])
    get_peft_model(base, options).save_pretrained(tmp_path / "a")
    adapted = AdaptedCheckpoint(tmp_path / "a", Checkpoint(tmp_path / "base"))
    assert "model.embed_tokens.weight" in adapted.updates


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    """T5 scales its outputs by whether the head is tied: apart, it would be another model."""
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=30
    )
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    options = LoraConfig(r=2, task_type="SEQ_2_SEQ_LM", target_modules=["q", "lm_head"])
    get_peft_model(model, options).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        AdaptedCheckpoint(tmp_path / "a", Checkpoint(tmp_path / "base"))


def test_a_whole_embedding_in_the_bases_place_is_its_head_as_well(tmp_path: Path) -> None:
    """Saved because the vocabulary grew, it is loaded into the base's own, tied parameter."""
    base_model("gpt2").save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    model = get_peft_model(base_model("gpt2"), LoraConfig(r=2, target_modules=["c_attn"]))
    model.base_model.model.transformer.wte.weight.data += 1
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    opened = PeftModel.from_pretrained(base_model("gpt2"), tmp_path / "a").eval()
    suite = suite_at(tmp_path, "a")
    out = merge_to_folder(make_recipe({"method": "average"}), suite, tmp_path / "out")
    merged = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(logits(merged), logits(opened), rtol=1e-4, atol=1e-4)
    assert all(len(names) == 2 for names in ties(suite.expert("a")))
