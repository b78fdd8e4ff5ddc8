"""Which parameters are decomposed, on the names of real models."""

from __future__ import annotations

import pytest

from merge_core.checkpoints.dtypes import DTYPES
from merge_core.checkpoints.parameter_roles import block_of, describe, query_key_value, treatment
from merge_core.checkpoints.shards import TensorInfo

D = 64
FLOAT32 = DTYPES["float32"]

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
    # SigLIP pools by attention in a module called head
    ("vision_model.head.attention.in_proj_weight", (3 * D, D)),
    ("vision_model.head.mlp.fc1.weight", (4 * D, D)),
    # adaptive norms hold a linear layer, CLIP's ResNet a first convolution
    ("blocks.0.norm1.linear.weight", (6 * D, D)),
    ("visual.conv1.weight", (D, 3, 3, 3)),
    # a name alone does not make a head of what lies in a block
    ("layers.0.fc.weight", (D, D)),
    ("blocks.3.head.weight", (D, D)),
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
    ("bert.pooler.dense.weight", (D, D)),
    ("cls.predictions.transform.dense.weight", (D, D)),
    ("score.weight", (3, D)),
    ("model.fc.weight", (10, D)),
    ("head_dist.weight", (10, D)),
    ("heads.head.weight", (10, D)),
    ("classifier.6.weight", (10, D)),
    ("visual_projection.weight", (32, D)),
    ("stem.0.weight", (D, 3, 4, 4)),
    ("shared.weight", (1000, D)),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 4)),
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
    rule = treatment(name, TensorInfo(shape, FLOAT32))
    assert rule.decomposed, rule.reason


@pytest.mark.parametrize(("name", "shape"), AVERAGED)
def test_everything_else_is_averaged_and_says_why(name: str, shape: tuple[int, ...]) -> None:
    rule = treatment(name, TensorInfo(shape, FLOAT32))
    assert not rule.decomposed
    assert rule.reason


@pytest.mark.parametrize(
    ("name", "shape", "parts"),
    [
        ("blocks.0.attn.qkv.weight", (3 * D, D), True),
        ("blocks.0.attn.qkv.weight", (3 * D, 2 * D), True),  # narrow heads
        ("h.0.attn.c_attn.weight", (D, 3 * D), True),
        ("transformer.h.0.attn.c_attn.weight", (3 * D, D), True),  # nanoGPT's linear layer
        ("transformer.h.0.attn.c_attn.weight", (D + 12, D), False),  # one key for all queries
        ("model.layers.0.self_attn.qkv_proj.weight", (3 * D, D), True),
        ("model.layers.0.self_attn.qkv_proj.weight", (3 * D // 2, D), False),
        ("gpt_neox.layers.0.attention.query_key_value.weight", (3 * D, D), False),
        ("stages.2.blocks.0.attn_grid.attn.qkv.weight", (3 * D, D), False),
        ("layers.0.self_attn.q_proj.weight", (3 * D, D), False),
    ],
)
def test_thirds_are_shown_only_where_they_are_queries_keys_and_values(
    name: str, shape: tuple[int, ...], parts: bool
) -> None:
    role = describe(name, TensorInfo(shape, FLOAT32))
    assert role.parts == (("q", "k", "v") if parts else ())
    assert role.is_matrix


def test_the_shape_tells_a_linear_layer_from_gpt2s_where_it_can() -> None:
    def is_transposed(name: str, *shape: int) -> bool:
        return describe(name, TensorInfo(shape, FLOAT32)).stored_transposed

    assert is_transposed("transformer.h.0.attn.c_attn.weight", D, 3 * D)
    assert not is_transposed("transformer.h.0.attn.c_attn.weight", 3 * D, D)
    assert is_transposed("h.11.mlp.c_proj.weight", 4 * D, D)
    assert not is_transposed("h.11.mlp.c_proj.weight", D, 4 * D)
    assert is_transposed("h.0.attn.c_proj.weight", D, D)
    # CLIP's layers have the same names elsewhere.
    assert not is_transposed("visual.transformer.resblocks.0.mlp.c_proj.weight", 4 * D, D)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("layers.0.blocks.1.attn.qkv.weight", (0, 1)),
        ("layer1.0.conv2.weight", (1, 0)),
        ("encoder.layers.encoder_layer_3.mlp.0.weight", (3,)),
        ("visual.transformer.resblocks.11.ln_1.bias", (11,)),
        ("downsample.0.weight", ()),
        ("head.weight", ()),
    ],
)
def test_blocks(name: str, block: tuple[int, ...]) -> None:
    assert block_of(name) == block
    assert describe(name, TensorInfo((D, D), FLOAT32)).block == block


def test_separate_queries_name_their_keys_and_values() -> None:
    for q, k, v in (
        ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"),
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        ("layer.0.attention.q_lin", "layer.0.attention.k_lin", "layer.0.attention.v_lin"),
        ("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"),
    ):  # fmt: skip
        assert query_key_value(f"{q}.weight") == (f"{q}.weight", f"{k}.weight", f"{v}.weight")
        assert query_key_value(f"{k}.weight") is None
    assert query_key_value("layers.0.self_attn.q_proj.bias") is None
    assert query_key_value("blocks.0.attn.qkv.weight") is None


def test_integer_buffers_are_kept_whatever_a_suite_says() -> None:
    info = TensorInfo((8, 8), DTYPES["int64"])
    assert not treatment("attn.index.weight", info).decomposed
    assert "integer" in treatment("w", info, decompose=["*"]).reason


def test_a_suites_patterns_win_over_the_table() -> None:
    info = TensorInfo((8, 8), FLOAT32)
    assert not treatment("mlp.fc1.weight", info, average=["mlp.*"]).decomposed
    assert treatment("tok_embed.weight", info, decompose=["*embed*"]).decomposed
    assert treatment("visual.proj", info, decompose=["visual.proj"]).decomposed
    both = treatment("mlp.fc1.weight", info, decompose=["mlp.*"], average=["*"])
    assert both.decomposed
    assert treatment("MLP.fc1.weight", info, average=["mlp.*"]).decomposed  # case counts


def test_a_vector_cannot_be_forced_into_a_decomposition() -> None:
    for shape in ((8,), (), (1, 8), (8, 1)):
        assert not treatment("x", TensorInfo(shape, FLOAT32), decompose=["*"]).decomposed
