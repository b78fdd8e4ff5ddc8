"""Which parameters are decomposed, on the names of real models."""

from __future__ import annotations

import pytest
import torch

from merge_core.checkpoint import TensorInfo
from merge_core.parameters import treatment

D = 64

DECOMPOSED = [
    # timm ViT
    ("blocks.0.attn.qkv.weight", (3 * D, D)),
    ("blocks.11.attn.proj.weight", (D, D)),
    ("blocks.0.mlp.fc1.weight", (4 * D, D)),
    ("blocks.0.mlp.fc2.weight", (D, 4 * D)),
    # open_clip, both towers
    ("visual.transformer.resblocks.0.attn.in_proj_weight", (3 * D, D)),
    ("visual.transformer.resblocks.0.attn.out_proj.weight", (D, D)),
    ("visual.transformer.resblocks.0.mlp.c_fc.weight", (4 * D, D)),
    ("transformer.resblocks.3.mlp.c_proj.weight", (D, 4 * D)),
    # Hugging Face CLIP, RoBERTa, GPT-2, LLaMA
    ("vision_model.encoder.layers.0.self_attn.q_proj.weight", (D, D)),
    ("roberta.encoder.layer.0.attention.self.query.weight", (D, D)),
    ("roberta.encoder.layer.0.intermediate.dense.weight", (4 * D, D)),
    ("transformer.h.0.attn.c_attn.weight", (D, 3 * D)),
    ("h.0.mlp.c_fc.weight", (D, 4 * D)),
    ("model.layers.0.mlp.gate_proj.weight", (4 * D, D)),
    # ResNet, ConvNeXt
    ("layer1.0.conv1.weight", (D, D, 3, 3)),
    ("layer2.0.downsample.0.weight", (2 * D, D, 1, 1)),
    ("stages.0.blocks.0.conv_dw.weight", (D, 1, 7, 7)),
]

AVERAGED = [
    ("cls_token", (1, 1, D)),
    ("pos_embed", (1, 197, D)),
    ("patch_embed.proj.weight", (D, 3, 16, 16)),
    ("patch_embed.proj.bias", (D,)),
    ("blocks.0.norm1.weight", (D,)),
    ("blocks.0.attn.qkv.bias", (3 * D,)),
    ("head.weight", (10, D)),
    ("model.head.fc.weight", (10, D)),
    ("visual.conv1.weight", (D, 3, 32, 32)),
    ("visual.class_embedding", (D,)),
    ("visual.positional_embedding", (50, D)),
    ("visual.ln_pre.weight", (D,)),
    ("visual.proj", (D, 32)),
    ("text_projection", (D, 32)),
    ("token_embedding.weight", (1000, D)),
    ("logit_scale", ()),
    ("roberta.embeddings.word_embeddings.weight", (1000, D)),
    ("roberta.embeddings.token_type_embeddings.weight", (2, D)),
    ("roberta.encoder.layer.0.output.LayerNorm.weight", (D,)),
    ("classifier.dense.weight", (D, D)),
    ("transformer.wte.weight", (1000, D)),
    ("wpe.weight", (1024, D)),
    ("transformer.ln_f.weight", (D,)),
    ("lm_head.weight", (1000, D)),
    ("model.embed_tokens.weight", (1000, D)),
    ("fc.weight", (10, D)),
    ("bn1.running_mean", (D,)),
    ("layers.0.attn.relative_position_bias_table", (169, 4)),
    ("vector.weight", (D, 1)),
    ("row.weight", (1, D)),
    ("nothing.weight", (0, D)),
]


@pytest.mark.parametrize(("name", "shape"), DECOMPOSED)
def test_weights_of_attention_mlp_and_convolutions_are_decomposed(
    name: str, shape: tuple[int, ...]
) -> None:
    rule = treatment(name, TensorInfo(shape, torch.float32))
    assert rule.decomposed, rule.reason


@pytest.mark.parametrize(("name", "shape"), AVERAGED)
def test_everything_else_is_averaged_and_says_why(name: str, shape: tuple[int, ...]) -> None:
    rule = treatment(name, TensorInfo(shape, torch.float32))
    assert not rule.decomposed
    assert rule.reason


def test_integer_buffers_are_kept_whatever_a_suite_says() -> None:
    info = TensorInfo((8, 8), torch.int64)
    assert not treatment("attn.index.weight", info).decomposed
    assert "integer" in treatment("w", info, decompose=["*"]).reason


def test_a_suites_patterns_win_over_the_table() -> None:
    info = TensorInfo((8, 8), torch.float32)
    assert not treatment("mlp.fc1.weight", info, average=["mlp.*"]).decomposed
    assert treatment("tok_embed.weight", info, decompose=["*embed*"]).decomposed
    assert treatment("visual.proj", info, decompose=["visual.proj"]).decomposed
    both = treatment("mlp.fc1.weight", info, decompose=["mlp.*"], average=["*"])
    assert both.decomposed
    assert treatment("MLP.fc1.weight", info, average=["mlp.*"]).decomposed  # case counts


def test_a_vector_cannot_be_forced_into_a_decomposition() -> None:
    for shape in ((8,), (), (1, 8), (8, 1)):
        assert not treatment("x", TensorInfo(shape, torch.float32), decompose=["*"]).decomposed
