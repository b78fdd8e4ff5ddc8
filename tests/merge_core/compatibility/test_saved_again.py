"""Configurations as older libraries wrote them against what transformers makes of them now.

transformers reads an old file and writes it anew: the same network, whatever fields it renames,
adds or leaves out.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from merge_core.compatibility.configs import compare_documents

transformers = pytest.importorskip("transformers")

# As published with these models (fields that are names or labels left out here and there).
PUBLISHED: dict[str, dict[str, Any]] = {
    "bert-base-uncased": {
        "architectures": ["BertForMaskedLM"],
        "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "transformers_version": "4.6.0.dev0",
        "type_vocab_size": 2,
        "use_cache": True,
        "vocab_size": 30522,
    },
    "llama-2": {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "llama-3.1": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    },
    "qwen2": {
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "mistral": {
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 32000,
    },
    "gemma": {
        "head_dim": 256,
        "hidden_act": "gelu",
        "hidden_activation": None,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "max_position_embeddings": 8192,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "vocab_size": 256000,
    },
    "gpt2": {
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
    "flan-t5": {
        "d_ff": 1024,
        "d_kv": 64,
        "d_model": 512,
        "dropout_rate": 0.1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "n_positions": 512,
        "num_decoder_layers": 8,
        "num_heads": 6,
        "num_layers": 8,
        "output_past": True,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "vocab_size": 32128,
    },
    "pythia": {
        "hidden_act": "gelu",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "layer_norm_eps": 1e-05,
        "model_type": "gpt_neox",
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "clip-vit-b-32": {
        "model_type": "clip",
        "projection_dim": 512,
        "logit_scale_init_value": 2.6592,
        "text_config": {"hidden_act": "quick_gelu", "num_attention_heads": 8, "eos_token_id": 2},
        "text_config_dict": None,
        "vision_config": {"hidden_act": "quick_gelu", "patch_size": 32, "num_attention_heads": 12},
        "vision_config_dict": None,
    },
    "vit": {
        "hidden_act": "gelu",
        "hidden_size": 768,
        "image_size": 224,
        "layer_norm_eps": 1e-12,
        "model_type": "vit",
        "num_attention_heads": 12,
        "num_channels": 3,
        "num_hidden_layers": 12,
        "patch_size": 16,
        "qkv_bias": True,
    },
    "qwen2-vl": {  # text fields beside the vision part, which are a part of their own now
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2_vl",
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "patch_size": 14},
        "vocab_size": 151936,
    },
    "modernbert": {
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "hidden_activation": "gelu",
        "hidden_size": 768,
        "local_attention": 128,
        "local_rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "model_type": "modernbert",
        "norm_eps": 1e-05,
        "num_attention_heads": 12,
        "num_hidden_layers": 22,
    },
}


KINDS = """
    albert bart bert blip clip cohere convnext deberta-v2 deit dinov2 distilbert electra falcon
    gemma2 gemma3 gpt2 gpt_neox gptj llama mbart mistral mixtral mpnet mt5 olmo2 opt phi phi3 qwen2
    qwen3 resnet roberta siglip swin t5 vit vit_mae wav2vec2 whisper xlm-roberta
"""


def saved_again(config: dict[str, Any], whole: bool) -> dict[str, Any]:
    """What transformers writes after reading a configuration: all of it, or what it must."""
    read = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    written = read.to_dict() if whole else read.to_diff_dict()
    plain: dict[str, Any] = json.loads(json.dumps(written, default=str))
    return plain


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_that_was_read_and_written_is_the_same_network(name: str, whole: bool) -> None:
    old = PUBLISHED[name]
    documents = {"base": old, "a": saved_again(old, whole)}
    found = compare_documents("config.json", documents)
    assert [f.sentence for f in found if f.level != "noted"] == []


@pytest.mark.parametrize(
    "kind",
    KINDS.split(),
)
def test_defaults_are_the_same_said_or_not(kind: str) -> None:
    whole = saved_again({"model_type": kind}, True)
    found = compare_documents("config.json", {"base": whole, "a": {"model_type": kind}})
    assert [f.sentence for f in found if f.level != "noted"] == []


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llama-2", "rope_theta", 20000.0),
        ("llama-3.1", "rope_scaling", PUBLISHED["llama-3.1"]["rope_scaling"] | {"factor": 32.0}),
        ("qwen2", "rope_theta", 10000.0),
        ("mistral", "sliding_window", None),
        ("gemma", "hidden_activation", "relu"),
        ("flan-t5", "feed_forward_proj", "relu"),
        ("pythia", "rotary_pct", 0.5),
        ("pythia", "use_parallel_residual", False),
        ("bert-base-uncased", "hidden_act", "gelu_new"),
        ("bert-base-uncased", "is_decoder", True),
        ("modernbert", "local_rope_theta", 20000.0),
        ("qwen2-vl", "rope_theta", 10000.0),
        ("qwen2-vl", "hidden_act", "gelu"),
        ("clip-vit-b-32", "vision_config", {"hidden_act": "gelu", "patch_size": 32}),
    ],
)
def test_one_field_changed_is_found_in_what_was_saved_again(
    name: str, field: str, value: object
) -> None:
    changed = saved_again(PUBLISHED[name] | {field: value}, True)
    found = compare_documents("config.json", {"base": PUBLISHED[name], "a": changed})
    assert "refused" in {f.level for f in found}
