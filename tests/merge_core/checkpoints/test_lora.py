"""LoRA adapters read beside their base, against PEFT's own merge_and_unload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.lora import AdaptedCheckpoint, is_stored_transposed
from merge_core.errors import CheckpointError
from merge_core.factors.low_rank import as_matrix
from tests.merge_core.adapted_models import (
    Mixed,
    State,
    adapter,
    gpt2,
    open_adapter,
    rewrite,
    state_of,
)

LAYERS = ["embed", "conv", "point", "square", "wide"]


def assert_same(checkpoint: Checkpoint, expected: State) -> None:
    """Every tensor to float32 rounding, and headers that tell the truth."""
    assert set(checkpoint) == set(expected)
    for name in checkpoint:
        value, info = checkpoint.tensor(name), checkpoint.info(name)
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)
        assert (info.shape, info.dtype.torch) == (tuple(value.shape), value.dtype)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "r": 3,
        "lora_alpha": 5,
        "rank_pattern": {"wide": 2, "^conv": 4, r"(square|point)": 1},
        "alpha_pattern": {"square": 7, "wi.*": 0.5},
    },
    "rslora with patterns": {
        "r": 3,
        "lora_alpha": 5,
        "use_rslora": True,
        "rank_pattern": {"wide": 2},
        "alpha_pattern": {"square": 7},
    },
    "biases of adapted layers": {"r": 2, "bias": "lora_only"},
    "all biases": {"r": 2, "bias": "all"},
    "bias in B": {"r": 2, "lora_bias": True, "target_modules": ["conv", "square", "wide"]},
    "whole layers": {"r": 2, "target_modules": ["wide"], "modules_to_save": ["norm", "head"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_kind_of_layer_as_peft_merges_it(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    checkpoint, merged = open_adapter(tmp_path, Mixed(), **{"target_modules": LAYERS, **options})
    assert_same(checkpoint, merged)
    base = checkpoint.base
    changed = {n for n in base if not torch.equal(base.tensor(n), merged[n])}
    assert changed == {n for n in checkpoint if checkpoint.may_differ(n)}


def test_the_update_as_a_product_of_thin_matrices(tmp_path: Path) -> None:
    checkpoint, merged = open_adapter(
        tmp_path, Mixed(), r=2, target_modules=["conv", "square", "wide"]
    )
    base = state_of(Mixed())
    for name in ("conv.weight", "square.weight", "wide.weight", "head.weight"):
        product = checkpoint.low_rank(name)
        assert product is not None
        left, right = product
        assert left.shape[1] == right.shape[0] == (0 if name == "head.weight" else 2)
        base = checkpoint.base.tensor(name)
        update = as_matrix(merged[name].double() - base.double())
        torch.testing.assert_close(left @ right, update, rtol=1e-5, atol=1e-6)
    assert checkpoint.low_rank("norm.weight") is None
    assert Checkpoint(tmp_path / "base.safetensors").low_rank("conv.weight") is None


def test_layers_of_gpt2_are_stored_transposed(tmp_path: Path) -> None:
    # attn.c_proj is square: its shape does not tell.
    checkpoint, merged = open_adapter(
        tmp_path,
        gpt2(),
        r=2,
        target_modules=["c_attn", "c_proj", "c_fc", "wte"],
        fan_in_fan_out=True,
    )
    assert_same(checkpoint, merged)
    # PEFT leaves the flag at whatever layer it met last, so the layers beside it count more.
    path = tmp_path / "lora" / "adapter_config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "fan_in_fan_out": False}))
    assert_same(AdaptedCheckpoint(tmp_path / "lora", checkpoint.base), merged)
    assert is_stored_transposed(checkpoint.base, "transformer.h.0.attn.c_proj.weight")
    assert is_stored_transposed(checkpoint.base, "transformer.wte.weight") is None


def test_a_layer_stored_whole_with_an_update_besides(tmp_path: Path) -> None:
    # PEFT does so for adapted heads and embeddings, whose vocabulary may have grown.
    checkpoint, merged = open_adapter(tmp_path, gpt2(), r=2, target_modules=["lm_head"])
    assert_same(checkpoint, merged)
    key, head = "base_model.model.lm_head.base_layer.weight", torch.randn(13, 8)
    rewrite(tmp_path / "lora", lambda s: s.update({key: head}))
    update = merged["lm_head.weight"] - checkpoint.base.tensor("lm_head.weight")
    again = AdaptedCheckpoint(tmp_path / "lora", checkpoint.base)
    torch.testing.assert_close(again.tensor("lm_head.weight"), head + update)
    assert again.low_rank("lm_head.weight") is None


@pytest.mark.parametrize("prefix", ["dropped", "added"])
def test_prefixes_that_only_one_side_has(tmp_path: Path, prefix: str) -> None:
    merged = adapter(gpt2(), tmp_path / "lora", r=2, target_modules=["c_attn"], fan_in_fan_out=True)

    def renamed(name: str) -> str:
        if prefix == "added":
            return f"model.{name}"
        return name.removeprefix("transformer.")

    save_file({renamed(n): v for n, v in state_of(gpt2()).items()}, tmp_path / "b.safetensors")
    checkpoint = AdaptedCheckpoint(tmp_path / "lora", Checkpoint(tmp_path / "b.safetensors"))
    assert_same(checkpoint, {renamed(name): value for name, value in merged.items()})
    assert len(checkpoint.updates) == 2


def test_a_new_head_is_one_more_tensor(tmp_path: Path) -> None:
    model = Mixed()
    model.head = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))  # type: ignore[assignment]
    merged = adapter(model, tmp_path / "lora", target_modules=["wide"], modules_to_save=["head"])
    base = {n: v for n, v in state_of(model).items() if not n.startswith("head")}
    save_file(base, tmp_path / "b.safetensors")
    checkpoint = AdaptedCheckpoint(tmp_path / "lora", Checkpoint(tmp_path / "b.safetensors"))
    assert_same(checkpoint, merged)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x)[0]


def test_attention_of_torch_is_refused(tmp_path: Path) -> None:
    model = Attention()
    save_file(state_of(model), tmp_path / "b.safetensors")
    merged = adapter(model, tmp_path / "lora", r=2, target_modules=["attn"])
    # Why: PEFT's own output layer is not its base plus s·B·A.
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    A, B = (stored[f"base_model.model.attn.base_layer.out_proj.lora_{x}.weight"] for x in "AB")
    update = merged["attn.out_proj.weight"] - state_of(model)["attn.out_proj.weight"]
    torch.testing.assert_close(update, 2 * (8 / 2 * B @ A))
    with pytest.raises(CheckpointError, match="MultiheadAttention"):
        AdaptedCheckpoint(tmp_path / "lora", Checkpoint(tmp_path / "b.safetensors"))


def test_timm_model_and_pickled_weights(tmp_path: Path) -> None:
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=1, num_heads=2, num_classes=3
    )
    checkpoint, merged = open_adapter(tmp_path, model, r=2, target_modules=["qkv", "proj", "fc1"])
    assert_same(checkpoint, merged)
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert_same(AdaptedCheckpoint(tmp_path / "lora", checkpoint.base), merged)


def test_half_precision_bases_keep_the_whole_update(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 9))
    adapter(model, tmp_path / "lora", r=2, target_modules=["0"])
    half = {n: v.bfloat16() for n, v in state_of(model).items()}
    save_file(half, tmp_path / "b.safetensors")
    checkpoint = AdaptedCheckpoint(tmp_path / "lora", Checkpoint(tmp_path / "b.safetensors"))
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    A, B = (stored[f"base_model.model.0.lora_{part}.weight"].double() for part in "AB")
    exact = half["0.weight"].double() + 8 / 2 * B @ A
    torch.testing.assert_close(checkpoint.tensor("0.weight").double(), exact, rtol=1e-6, atol=1e-7)
    assert checkpoint.info("0.bias").dtype.torch == torch.float32
    assert torch.equal(checkpoint.tensor("0.bias"), half["0.bias"].float())


def test_names_that_fit_several_parts_of_the_base(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 9))
    adapter(model, tmp_path / "lora", r=2, target_modules=["0"])
    state = {f"{tower}.{n}": v for tower in ("text", "image") for n, v in state_of(model).items()}
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="may be several parameters"):
        AdaptedCheckpoint(tmp_path / "lora", Checkpoint(tmp_path / "b.safetensors"))


def test_one_of_two_tied_tensors_is_changed_alone(tmp_path: Path) -> None:
    model = gpt2()
    state = state_of(model)
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"tie_word_embeddings": true}')
    base = Checkpoint(tmp_path / "base")
    adapter(model, tmp_path / "inner", r=2, target_modules=["c_attn"])
    assert AdaptedCheckpoint(tmp_path / "inner", base).ties == (
        ("lm_head.weight", "transformer.wte.weight"),
    )
    adapter(model, tmp_path / "head", r=2, target_modules=["lm_head"])
    changed = AdaptedCheckpoint(tmp_path / "head", base)
    assert changed.ties == ()
    kept = changed.tensor("transformer.wte.weight")
    # What is stored whole is read into the base's own parameter, whose two names are one.
    stored = load_file(tmp_path / "head" / "adapter_model.safetensors")
    assert torch.equal(kept, stored["base_model.model.lm_head.base_layer.weight"])
    assert not torch.equal(kept, changed.tensor("lm_head.weight"))
    adapter(model, tmp_path / "both", target_modules=["c_attn"], modules_to_save=["wte", "lm_head"])
    assert AdaptedCheckpoint(tmp_path / "both", base).ties == ()


def test_what_it_is_in_words(tmp_path: Path) -> None:
    checkpoint, _ = open_adapter(
        tmp_path,
        Mixed(),
        r=3,
        lora_alpha=5,
        use_rslora=True,
        rank_pattern={"wide": 2},
        target_modules=LAYERS,
        modules_to_save=["norm"],
    )
    assert checkpoint.summary.startswith(
        "rank-stabilised LoRA adapter of rank 2 to 3, alpha 5, on 5 matrices"
    )
