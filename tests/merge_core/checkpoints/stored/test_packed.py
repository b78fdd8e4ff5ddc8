"""Packed, scaled and flattened weights, and lone factors: refused by their format's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import CheckpointError
from tests.merge_core.adapted_models import Mixed, adapter, state_of

State = dict[str, Tensor]
FP8 = torch.float8_e4m3fn
LAYER = "model.layers.0.self_attn.q_proj"


def of(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.ones(shape).to(dtype)


U8, I8, I32, F16, F32 = torch.uint8, torch.int8, torch.int32, torch.float16, torch.float32
# What each library writes for one layer of 16 x 32, in its own names and dtypes.
PACKED: dict[str, tuple[str, State]] = {
    "bitsandbytes int8": (
        "bitsandbytes int8",
        {
            f"{LAYER}.weight": of(I8, 16, 32),
            f"{LAYER}.SCB": of(F32, 16),
            f"{LAYER}.weight_format": torch.tensor(0, dtype=U8),
        },
    ),
    "bitsandbytes NF4": (
        "bitsandbytes NF4",
        {
            f"{LAYER}.weight": of(U8, 256, 1),
            f"{LAYER}.weight.absmax": of(U8, 8),
            f"{LAYER}.weight.nested_absmax": of(F32, 1),
            f"{LAYER}.weight.nested_quant_map": of(F32, 256),
            f"{LAYER}.weight.quant_map": of(F32, 16),
            f"{LAYER}.weight.quant_state.bitsandbytes__nf4": of(U8, 90),
        },
    ),
    "bitsandbytes FP4": (
        "bitsandbytes FP4",
        {
            f"{LAYER}.weight": of(U8, 256, 1),
            f"{LAYER}.weight.quant_state.bitsandbytes__fp4": of(U8, 90),
        },
    ),
    "GPTQ": (
        "GPTQ",
        {
            f"{LAYER}.qweight": of(I32, 4, 16),
            f"{LAYER}.qzeros": of(I32, 1, 2),
            f"{LAYER}.scales": of(F16, 1, 16),
            f"{LAYER}.g_idx": of(I32, 32),
        },
    ),
    "AWQ": (
        "AWQ",
        {
            f"{LAYER}.qweight": of(I32, 32, 2),
            f"{LAYER}.qzeros": of(I32, 1, 2),
            f"{LAYER}.scales": of(F16, 1, 16),
        },
    ),
    "fp8 per tensor": (
        "fp8 with scales",
        {
            f"{LAYER}.weight": of(FP8, 16, 32),
            f"{LAYER}.weight_scale": of(F32, 1),
            f"{LAYER}.input_scale": of(F32, 1),
        },
    ),
    "fp8 in blocks": (
        "fp8 with scales",
        {f"{LAYER}.weight": of(FP8, 16, 32), f"{LAYER}.weight_scale_inv": of(F32, 1, 1)},
    ),
    "fp8 of ComfyUI": (
        "fp8 with scales",
        {f"{LAYER}.weight": of(FP8, 16, 32), f"{LAYER}.scale_weight": of(F32, 1)},
    ),
    "fp8 of joined experts": (
        "fp8 with scales",
        {"mlp.experts.down_proj": of(FP8, 2, 16, 32), "mlp.experts.down_proj_scale": of(F32, 2)},
    ),
    "compressed-tensors": (
        "compressed-tensors",
        {
            f"{LAYER}.weight_packed": of(I32, 16, 4),
            f"{LAYER}.weight_scale": of(F16, 16, 1),
            f"{LAYER}.weight_shape": torch.tensor([16, 32]),
        },
    ),
    "int8 of compressed-tensors": (
        "int8 with scales",
        {f"{LAYER}.weight": of(I8, 16, 32), f"{LAYER}.weight_scale": of(F16, 16, 1)},
    ),
    "HQQ": (
        "HQQ",
        {
            f"{LAYER}.W_q": of(U8, 8, 32),
            f"{LAYER}.scale": of(F16, 16, 1),
            f"{LAYER}.zero": of(F16, 16, 1),
        },
    ),
    "MXFP4": (
        "MXFP4",
        {
            "mlp.experts.gate_up_proj_blocks": of(U8, 2, 16, 1, 16),
            "mlp.experts.gate_up_proj_scales": of(U8, 2, 16, 1),
        },
    ),
    "Quanto": (
        "Quanto",
        {f"{LAYER}.weight._data": of(I8, 16, 32), f"{LAYER}.weight._scale": of(F32, 16, 1)},
    ),
    "torchao": (
        "torchao",
        {f"{LAYER}._weight_qdata": of(I8, 16, 32), f"{LAYER}._weight_scale": of(F32, 16)},
    ),
    "VPTQ": (
        "VPTQ",
        {f"{LAYER}.indices": of(I32, 4, 4), f"{LAYER}.centroids.weight": of(F16, 1, 8)},
    ),
    "AQLM": ("AQLM", {f"{LAYER}.codes": of(I8, 2, 4, 1), f"{LAYER}.codebooks": of(F16, 1, 256)}),
    "BitNet": (
        "uint8 with scales",
        {f"{LAYER}.weight": of(U8, 4, 32), f"{LAYER}.weight_scale": of(F32, 1)},
    ),
    "FSDP, flattened": ("FSDP", {"_fsdp_wrapped_module._flat_param": of(F32, 512)}),
}


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize(("kind", "state"), PACKED.values(), ids=PACKED.keys())
def test_packed_weights_are_refused_by_the_name_of_their_format(
    tmp_path: Path, kind: str, state: State, suffix: str
) -> None:
    state = {"model.norm.weight": torch.ones(4), **state}
    path = tmp_path / f"model{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    message = refusal(path)
    assert kind in message
    assert path.name in message
    assert any(repr(name) in message for name in state if "norm" not in name)
    assert "dequantise" in message or "FSDP" in message


def test_packed_shards_are_refused(tmp_path: Path) -> None:
    weight, scb = f"{LAYER}.weight", f"{LAYER}.SCB"
    save_file({weight: of(I8, 16, 32)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({scb: of(F32, 16)}, tmp_path / "model-00002-of-00002.safetensors")
    files = {weight: "model-00001-of-00002.safetensors", scb: "model-00002-of-00002.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert "bitsandbytes int8" in refusal(tmp_path)


def test_the_configuration_tells_how_they_are_packed(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fbgemm_fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({f"{LAYER}.weight": of(FP8, 4, 4)}, tmp_path / "model.safetensors")
    assert "fbgemm_fp8" in refusal(tmp_path)
    # A configuration that was left over from the base of a QLoRA says nothing of plain weights.
    save_file({f"{LAYER}.weight": of(F16, 4, 4)}, tmp_path / "model.safetensors")
    assert list(Checkpoint(tmp_path)) == [f"{LAYER}.weight"]


UNET = "lora_unet_down_blocks_0_attentions_0_proj_in"
FACTORS: dict[str, tuple[str, list[str]]] = {
    "PEFT": ("LoRA", ["base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight"]),
    "PEFT, named": ("LoRA", ["layer.lora_A.default.weight", "layer.lora_B.default.weight"]),
    "PEFT, embedding": ("LoRA", ["embed.lora_embedding_A", "embed.lora_embedding_B"]),
    "kohya": ("LoRA", [f"{UNET}.lora_down.weight", f"{UNET}.lora_up.weight", f"{UNET}.alpha"]),
    "diffusers": ("LoRA", ["unet.to_q.lora.down.weight", "unet.to_q.lora.up.weight"]),
    "old diffusers": ("LoRA", ["processor.to_q_lora.down.weight", "processor.to_q_lora.up.weight"]),
    "text encoder": ("LoRA", ["q.lora_linear_layer.down.weight", "q.lora_linear_layer.up.weight"]),
    "DoRA": ("DoRA", ["layer.lora_magnitude_vector", "layer.other"]),
    "LoHa": ("LoHa", [f"{UNET}.hada_w1_a", f"{UNET}.hada_w1_b", f"{UNET}.hada_w2_a"]),
    "LoKr": ("LoKr", [f"{UNET}.lokr_w1", f"{UNET}.lokr_w2_a", f"{UNET}.lokr_w2_b"]),
    "IA3": ("IA3", ["base_model.model.layer.ia3_l"]),
    "OFT": ("OFT", ["base_model.model.layer.oft_R.weight"]),
    "VeRA": ("VeRA", ["base_model.model.a.vera_lambda_b", "base_model.model.a.vera_lambda_d"]),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(("kind", "names"), FACTORS.values(), ids=FACTORS.keys())
def test_lone_factors_are_refused(tmp_path: Path, kind: str, names: list[str], suffix: str) -> None:
    path = tmp_path / f"adapter_model{suffix}"
    state = {name: torch.ones(2, 3) for name in names}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    message = refusal(path)
    assert f"{kind} adapter" in message
    assert "adapter_config.json" in message
    assert any(repr(name) in message for name in names)


def test_a_model_with_factors_that_are_not_merged_into_it(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Mixed(), LoraConfig(target_modules=["square"]))  # type: ignore[arg-type]
    torch.save(model.state_dict(), tmp_path / "m.pt")
    message = refusal(tmp_path / "m.pt")
    assert "merge_and_unload" in message
    merged = model.merge_and_unload()  # type: ignore[operator]
    torch.save(merged.state_dict(), tmp_path / "m.pt")
    assert sorted(Checkpoint(tmp_path / "m.pt")) == sorted(Mixed().state_dict())


def test_an_adapter_without_its_configuration_is_refused(tmp_path: Path) -> None:
    adapter(Mixed(), tmp_path / "lora", 0, r=1, target_modules=["square"])
    (tmp_path / "lora" / "adapter_config.json").unlink()
    for place in (tmp_path / "lora", tmp_path / "lora" / "adapter_model.safetensors"):
        assert "adapter_config.json" in refusal(place)


PLAIN: dict[str, State] = {
    "plain fp8": {"blocks.0.mlp.fc1.weight": of(FP8, 4, 4), "blocks.0.mlp.fc1.bias": of(FP8, 4)},
    "masks of GPT-2": {"h.0.attn.bias": of(U8, 1, 1, 4, 4), "h.0.attn.c.weight": of(F32, 4, 12)},
    "Swin v2": {
        "layers.0.attn.logit_scale": of(F32, 3, 1, 1),
        "layers.0.attn.relative_position_index": torch.ones(4, 4, dtype=torch.int64),
    },
    "SAM": {"prompt_encoder.point_embeddings.0.weight": of(F32, 1, 4)},
    "RWKV-7": {
        "attn.w_lora.lora.0.weight": of(F32, 2, 4),
        "attn.w_lora.lora.2.weight": of(F32, 4, 2),
    },
    "DeepSeek": {"attn.q_a_proj.weight": of(F32, 2, 4), "attn.kv_b_proj.weight": of(F32, 4, 2)},
    "layers with a scale": {"layer.weight": of(F32, 4, 4), "layer.weight_scale": of(F32, 1)},
    "blocks and scales": {"attn_blocks": of(F32, 4), "layer_scale": of(F32, 4)},
    "batch norm": {"bn.weight": of(F32, 4), "bn.num_batches_tracked": torch.tensor(3)},
    "whole": state_of(Mixed()),
}  # fmt: skip


@pytest.mark.parametrize("state", PLAIN.values(), ids=PLAIN.keys())
def test_plain_weights_are_not_taken_for_packed_ones(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "m.pt")
    assert sorted(Checkpoint(tmp_path / "m.pt")) == sorted(state)
