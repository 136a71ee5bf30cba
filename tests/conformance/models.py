"""A tiny random model of every type that transformers maps to a causal LM, shrunk from its own config class."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_LARGEST = 100_000_000  # parameters of what still counts as tiny

# What a field is set to wherever a config has it.
_SIZES: dict[int, str] = {
    32: "hidden_size d_model n_embd dim model_dim embedding_size embed_dim hidden_dim word_embed_proj_dim "
    "projection_dim emb_dim backbone_hidden_size lru_width attention_hidden_size d_embed word_embedding_dim",
    48: "intermediate_size ffn_dim d_inner d_ff n_inner ffn_hidden_size moe_intermediate_size decoder_ffn_dim "
    "shared_expert_intermediate_size encoder_ffn_dim expert_ffn_hidden_size shared_intermediate_size mlp_dim "
    "mlp_intermediate_size moe_shared_expert_intermediate_size intermediate_size_mlp dim_ff ff_dim moe_ffn_hidden_size "
    "prefix_dense_intermediate_size",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_key_value_heads num_kv_heads num_key_value_groups num_experts_per_tok "
    "num_experts_per_token moe_topk top_k_experts moe_k num_selected_experts",
    4: "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads rotary_dim "
    "num_encoder_attention_heads num_decoder_attention_heads num_experts n_routed_experts num_local_experts "
    "moe_num_experts n_experts "
    # Windows, chunks and choices of keys: shorter than a row, or they cut nothing.
    "sliding_window_size attention_window_size window_size attention_chunk_size local_attn_chunk_length "
    "lsh_attn_chunk_length chunk_size mamba_chunk_size block_size index_block_size index_topk",
    8: "head_dim attention_head_dim kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim d_kv state_size "
    "mamba_d_state ssm_state_size d_state mamba_n_heads mamba_d_head mamba_headdim linear_key_head_dim "
    "linear_value_head_dim local_attention",
    1: "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts num_nextn_predict_layers "
    "mamba_n_groups index_topk_blocks",
    16: "q_lora_rank kv_lora_rank qk_head_dim",
    99: "vocab_size unpadded_vocab_size vocab_size_per_layer_input audio_vocab_size pronunciation_vocab_size "
    "shape_vocab_size",
    128: "max_position_embeddings n_positions max_seq_len max_sequence_length n_ctx max_target_positions "
    "max_source_positions max_seq_length",
}
_WINDOWS = ("sliding_window", "sliding_window_size", "window_size", "attention_chunk_size", "local_attention")
SMALL = {name: value for value, names in _SIZES.items() for name in names.split()}

# What one type needs besides, or instead: layers enough to have one of each kind, sizes that divide one another.
_INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}  # fmt: skip
# All layers of an assistant read the keys of the model it assists; transformers builds no layer that reads keys unless
# another makes them.
_NO_LAYERS = {
    "hidden_size": 32, "vocab_size": 99, "num_hidden_layers": 0, "layer_types": [],
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
}  # fmt: skip
_ALSO: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    # Its inner layers run twice.
    "dory": {
        "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1, "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    # Layers with a window have sizes of their own.
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
        "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config": _NO_LAYERS},
    "gemma4_unified_assistant": {"text_config": _NO_LAYERS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": ["full_attention", "sliding_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"]},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_n_heads": 2},
    "ministral": {"layer_types": ["full_attention", "sliding_attention"]},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"attn_layers": ("local", "local"), "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (16, 8)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 0, "attention_hidden_size": 64,
        "attention_head_dim": 16, "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64,
        "attention_head_dim": 16, "num_key_value_heads": 4,
    },
    # Rows that fill a chunk have no gradients in transformers.
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0, "chunk_size": 64},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"]},
}  # fmt: skip


def build(model_type: str, seed: int = 0, windows_cut: bool = True) -> PreTrainedModel:
    """A random model in float32 and eval mode, with weights large enough that a wrong position or mask shows.

    Raises:
        Exception: whatever transformers raises where the type cannot be built here.
    """
    model_class, config = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]], tiny_config(model_type)
    if not windows_cut:
        for part in [config, *(getattr(config, name, None) for name in config.sub_configs or {})]:
            for name in _WINDOWS:
                if isinstance(getattr(part, name, None), int):
                    setattr(part, name, 64)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"{size} parameters are not tiny: a size of its config is not shrunk")
    torch.manual_seed(seed)
    model = model_class(config).eval().float()
    for parameter in model.parameters():
        # What begins at 0 or 1 hides much: a pad that is read, a position, which of several keys is chosen.
        constant = (parameter.data == 0) | (parameter.data == 1)
        parameter.data[constant] += 0.3 * torch.randn(int(constant.sum()))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 1
    return model


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The type's config, shrunk, its parts too."""
    config_class = CONFIG_MAPPING[model_type]
    own = MODEL_FOR_CAUSAL_LM_MAPPING[config_class].config_class
    if own in (config_class.sub_configs or {}).values():
        # Of several parts, the class takes the language model's alone.
        config_class, model_type = own, own.model_type
    config = _shrunk(config_class, model_type)
    for part in [config, *(getattr(config, name, None) for name in config.sub_configs or {})]:
        if hasattr(part, "is_decoder"):
            part.is_decoder = True
        for name in ("initializer_range", "init_std"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.3)
    return config


def _shrunk(config_class: type[PreTrainedConfig], model_type: str) -> PreTrainedConfig:
    names, also = {field.name for field in dataclasses.fields(config_class)}, _ALSO.get(model_type, {})
    parts = config_class.sub_configs or {}
    values: dict[str, Any] = {name: SMALL[name] for name in names if name in SMALL}
    if "kv_lora_rank" in names:
        # Latent attention has as many keys as heads, and rotates a part of a head.
        values["num_key_value_heads"] = SMALL["num_attention_heads"]
        values.pop("head_dim", None)
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    values |= {name: value for name, value in windows.items() if name in names}
    default = config_class(**{name: (values | also)[name] for name in {*windows, *parts} & {*values, *also}})
    for name, part in parts.items():
        part_class = type(getattr(default, name, None)) if part.__name__ == "AutoConfig" else part
        if issubclass(part_class, PreTrainedConfig) and name not in also:
            values[name] = _shrunk(part_class, part_class.model_type)
    kinds = getattr(default, "layer_types", None)
    if kinds and {"layer_types", "num_hidden_layers"} <= names:
        # A layer of each kind.
        values["layer_types"] = list(dict.fromkeys(kinds)) if len(set(kinds)) > 1 else kinds[:1] * 2
        values["num_hidden_layers"] = len(values["layer_types"])
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    values |= {name: value for name, value in special.items() if name in names}
    return config_class(**(values | also))
