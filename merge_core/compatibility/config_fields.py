"""What the fields of configuration files mean for a merge: the table.

Names are those of transformers' configurations and image processors, timm's ``config.json`` and
open_clip's ``open_clip_config.json``. What the table does not name is noted where it differs.
"""

from __future__ import annotations

from dataclasses import dataclass

from merge_core.compatibility.findings import Level


@dataclass(frozen=True)
class Rule:
    """What a difference in a field means."""

    level: Level
    meaning: str


def _table(level: Level, text: str) -> dict[str, Rule]:
    """Parse lines of a meaning, a colon and fields; lines without a colon continue the last."""
    rules: dict[str, Rule] = {}
    meaning = ""
    for line in text.strip().splitlines():
        told, colon, fields = line.strip().rpartition(":")
        meaning = told if colon else meaning
        rules |= dict.fromkeys(fields.split(), Rule(level, meaning))
    return rules


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The same tensors, another function.
_REFUSED = _table(
    "refused",
    """
    positions are turned by other angles: rope_theta rope_type rope_factor rope_attention_factor
        rope_beta_fast rope_beta_slow rope_short_factor rope_long_factor rope_low_freq_factor
        rope_high_freq_factor rope_mscale rope_mscale_all_dim rope_mrope_section rope_alpha
        rope_original_max_position_embeddings partial_rotary_factor rotary_dim rope_interleaved
        use_rope rotary no_rope_layers nope_layer_interval rotary_emb_interleaved
    positions are told otherwise: position_embedding_type alibi use_alibi attn_pdrop_alibi
        relative_attention_num_buckets relative_attention_max_distance position_buckets
        max_relative_positions relative_attention pos_att_type share_att_key position_biased_input
        use_absolute_position_embeddings use_absolute_embeddings
        use_relative_position_bias use_shared_relative_position_bias
    another nonlinearity: hidden_act activation_function hidden_activation activation act_layer
        act_fn dense_act_fn feed_forward_proj is_gated_act projection_hidden_act
        encoder_activation_function decoder_activation_function ff_activation quick_gelu
        mlp_hidden_act swiglu use_swiglu_ffn embedding_hidden_act feat_extract_activation
    the same rows belong to other heads: num_attention_heads n_head n_heads num_heads heads
        encoder_attention_heads decoder_attention_heads num_key_value_heads head_dim d_kv
        n_head_kv num_kv_heads multi_query head_width qk_rope_head_dim qk_nope_head_dim v_head_dim
        attention_head_dim conv_pos_groups num_conv_pos_embedding_groups groups
        hidden_channels_per_group conv_groups linear_num_key_heads linear_num_value_heads
    norms divide by another number: layer_norm_eps layer_norm_epsilon rms_norm_eps norm_eps
        norm_epsilon layernorm_epsilon rms_norm_epsilon batch_norm_eps embed_layer_norm_eps
        ln_eps group_norm_eps
    activations are scaled otherwise: scale_attn_weights scale_attn_by_inverse_layer_idx
        attention_multiplier query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping
        logits_scaling residual_multiplier embedding_multiplier scale_embedding logit_scale
        scale_depth scale_emb dim_model_base scale_decoder_outputs attn_scale qk_layernorm
        use_qk_norm normalize_embedding embedding_scale layer_scale_init_value ls_init_value
    attention sees other tokens: is_decoder add_cross_attention sliding_window use_sliding_window
        max_window_layers layer_types sliding_window_pattern attention_types attention_window
        window_size attention_chunk_size local_attention global_attn_every_n_layers is_causal
        use_bidirectional_attention causal_attention attention_type block_size no_causal_mask
        is_encoder_decoder unidirectional
    layers are connected otherwise: num_hidden_layers n_layer num_layers n_layers encoder_layers
        decoder_layers num_decoder_layers depth depths parallel_attn use_parallel_residual
        new_decoder_architecture apply_residual_connection_post_layernorm
        do_layer_norm_before normalize_before norm_first pre_norm post_norm hidden_stride
        do_stable_layer_norm hidden_sizes_strides downsample_in_first_stage downsample_in_bottleneck
        layer_type strides encoder_stride output_stride use_post_layernorm
    images are cut into other patches: patch_size tubelet_size num_frames patch_stride
        patch_padding spatial_merge_size temporal_patch_size shift_size
    tokens go to other experts: num_experts_per_tok num_experts_per_token moe_top_k norm_topk_prob
        routed_scaling_factor scoring_func topk_method n_group topk_group decoder_sparse_step
        router_scoring_func first_k_dense_replace mlp_only_layers
    """,
)
# The same function, fed or read otherwise: the output carries the files of one member.
_WARNED = _table(
    "warned",
    """
    texts begin, end or are filled with other tokens: bos_token_id eos_token_id pad_token_id
        sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id
        forced_bos_token_id forced_eos_token_id eod_token_id image_token_id image_token_index
        video_token_id vision_start_token_id vision_end_token_id suppress_tokens
        begin_suppress_tokens forced_decoder_ids pad_token bos_token eos_token sep_token cls_token
        mask_token unk_token additional_special_tokens extra_special_tokens add_bos_token
        add_eos_token
    inputs are normalised otherwise: mean std image_mean image_std do_normalize do_rescale
        rescale_factor rescale_offset offset do_convert_rgb input_range
    inputs are cut to another size or shape: image_size img_size size crop_size input_size
        do_resize do_center_crop resample crop_pct crop_mode interpolation resize_mode
        test_input_size test_crop_pct fixed_input_size do_pad pad_size max_pixels min_pixels
        sampling_rate feature_size hop_length n_fft chunk_length num_mel_bins n_samples
    features are pooled otherwise: global_pool pool_type pooling pooler_act summary_type
        classifier_pooling vision_use_head pooling_mode_mean_tokens pooling_mode_cls_token
        use_mean_pooling vision_feature_layer vision_feature_select_strategy
    texts are cut otherwise: do_lower_case strip_accents tokenize_chinese_chars add_prefix_space
        lowercase do_basic_tokenize
    """,
)
RULES = _REFUSED | _WARNED

# What says nothing of a model: where it came from and how a library holds or trains it.
SILENT = _names(
    """
    _name_or_path name_or_path transformers_version _commit_hash _from_model_config use_cache
    output_attentions output_hidden_states return_dict return_dict_in_generate torchscript
    gradient_checkpointing _attn_implementation attn_implementation _attn_implementation_autoset
    _attn_implementation_internal pruned_heads use_bfloat16 tf_legacy_loss initializer_range
    initializer_factor initializer_cutoff_factor unsloth_version unsloth_fixed pretraining_tp
    deterministic_flash_attn reference_compile repad_logits_with_grad chunk_size_feed_forward
    use_flash_attn model_name image_processor_type feature_extractor_type processor_class
    image_processor_class tag url file hf_hub_id hf_hub_filename source custom_load license
    origin_url paper_ids paper_name notes state_dict num_gpus use_auth_token device_map
    custom_pipelines auto_map text_config_dict vision_config_dict _sliding_window_pattern
    """
)
# Whose values follow from others, or which older files lack: absent here means the same as there.
DERIVED = _names(
    """
    num_key_value_heads head_dim n_inner dense_act_fn is_gated_act layer_types max_window_layers
    sliding_window_pattern num_layers hidden_size encoder_stride encoder_layers num_hidden_layers
    layer_norm_eps_cross rope_attention_factor rope_original_max_position_embeddings
    rope_mscale rope_mscale_all_dim rope_beta_fast rope_beta_slow rope_factor rope_mrope_section
    rope_short_factor rope_long_factor rope_low_freq_factor rope_high_freq_factor rope_alpha
    num_decoder_layers d_kv is_causal scale_decoder_outputs
    """
)
# What an absent field means where the library's class does not say.
DEFAULTS: dict[str, object] = {
    "rope_theta": 10000.0,
    "rope_type": "default",
    "partial_rotary_factor": 1.0,
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "quick_gelu": False,
    "act_layer": None,
    "alibi": False,
    "use_alibi": False,
    "use_bidirectional_attention": False,
}
# Of these, what classes differ in, so that they are asked first (which takes a second).
CLASS_DECIDES = frozenset({"rope_theta", "sliding_window", "partial_rotary_factor"})
# Under which names libraries know the same function.
ACTIVATIONS = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quickgelu": "quick_gelu",
}
ACTIVATION_FIELDS = frozenset(
    name for name, rule in _REFUSED.items() if rule.meaning == "another nonlinearity"
)
EPS_FIELDS = frozenset(
    name for name, rule in _REFUSED.items() if rule.meaning == "norms divide by another number"
)
# Types of models that are one network: what else differs stands in other fields.
MODEL_TYPES = {
    "vit_mae": "vit",
    "vit_msn": "vit",
    "xlm-roberta": "roberta",
    "camembert": "roberta",
    "mistral": "llama",
    "mt5": "t5",
    "gpt-sw3": "gpt2",
}
# Objects within a configuration whose fields count like its own.
PARTS = ("_config", "_cfg")
PART_NAMES = _names(
    """
    encoder decoder question_encoder generator model_args image_processor feature_extractor
    video_processor
    """
)
