"""Tiny random configs for every causal language model family of the installed transformers.

A config is the family's own default with every size it knows by one of the names below made small, and with the few
corrections its own rules ask for. ``family#variant`` is the same family with other settings.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

LAYERS = 4
VOCABULARY = 96

# Registered as causal language models, but not decoder-only language models: encoders with a language-model head,
# encoder-decoders, models that need another modality's input, aliases of a config listed under another name.
NOT_DECODER_ONLY = frozenset(
    (
        "bart",
        "bert",
        "bert-generation",
        "big_bird",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "marian",
        "mbart",
        "megatron-bert",
        "mvp",
        "pegasus",
        "plbart",
        "prophetnet",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "trocr",
        "whisper",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlnet",
        "xmod",
        "reformer",
        "git",
        "got_ocr2",
        "musicgen",
        "musicgen_melody",
        "moshi",
        "fuyu",
        "mllama",
        "cpmant",
        "moss_transcribe_diarize",
        "emu3",
        "gemma4_assistant",
        "gemma4_unified_assistant",
        "gpt-sw3",
    )
)

# Set wherever a family's default config has an attribute of that name.
SMALL: dict[str, Any] = {
    # widths
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 96),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 32
    ),
    "expert_ffn_hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    # depth and length
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **dict.fromkeys(("sliding_window", "attention_window"), 8),
    "first_k_dense_replace": 1,
    "max_window_layers": 2,
    # attention
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group"), 1),
    "zero_expert_num": 2,
    # recurrent layers
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 16),
    "mamba_d_ssm": 128,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
    # special tokens, and nothing random
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    **dict.fromkeys(("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout"), 0.0),
    **dict.fromkeys(("dropout", "activation_dropout", "layerdrop"), 0.0),
}

_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_SLIDING_FIRST = ["sliding_attention"] * 2 + ["full_attention"] * 2
_LINEAR = ["linear_attention", "full_attention"] * 2
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MULTI_HEAD_LATENT = {"head_dim": 8, "num_key_value_heads": 4}
_KIMI = {**_MULTI_HEAD_LATENT, "num_experts_per_token": 2, "linear_head_dim": 16, "linear_num_heads": 4}

# What a family's own rules ask for, and variants of families with settings that change how they run.
CORRECTIONS: dict[str, dict[str, Any]] = {
    "axk1": _MULTI_HEAD_LATENT,
    "axk2": _MULTI_HEAD_LATENT,
    "bailing_hybrid": {**_KIMI, "num_expert_group": 1, "layer_types": _LINEAR},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere2": {"layer_types": _SLIDING_FIRST},
    "cohere_compass_text": {
        "layer_types": _ALTERNATING,
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**_MULTI_HEAD_LATENT, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**_MULTI_HEAD_LATENT, "n_group": 2, "topk_group": 1},
    "deepseek_v32": _MULTI_HEAD_LATENT,
    "falcon": {"alibi": False, "new_decoder_architecture": False, "multi_query": True},
    "falcon#alibi": {"alibi": True, "multi_query": False, "parallel_attn": False},
    "falcon#new": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma2#types": {"layer_types": _SLIDING_FIRST},
    "gemma3_text": {"layer_types": _ALTERNATING},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": _ALTERNATING,
        "intermediate_size": [96] * LAYERS,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 16,
        "num_key_value_heads": 2,
        "layer_types": _ALTERNATING,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    },
    "gemma4_text#per_layer_embeddings": {"hidden_size_per_layer_input": 16},
    "gemma4_text#shared_keys": {"num_kv_shared_layers": 2},
    "glm4_moe_lite": _MULTI_HEAD_LATENT,
    "glm_moe_dsa": _MULTI_HEAD_LATENT,
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8, "num_heads": 4},
    "gpt_neox": {"rotary_pct": 0.5},
    "granite#multipliers": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015625,
        "logits_scaling": 16.0,
    },
    "granitemoehybrid": {"layer_types": _LINEAR},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "kimi_linear": {**_KIMI, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "layer_types": _LINEAR},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "llama#dynamic_rope": {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    },
    "llama4_text": {"attention_chunk_size": 8, "intermediate_size_mlp": 96, "moe_layers": [1, 3]},
    "longcat_flash": _MULTI_HEAD_LATENT,
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1, "expand": 2},
    "minicpm3": _MULTI_HEAD_LATENT,
    "mpt": {"expansion_ratio": 2},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "n_groups": 1,
        "chunk_size": 8,
        "expand": 2,
    },
    "opt#350m": {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "phi3": {"rope_scaling": None, "sliding_window": None},
    "qwen2#sliding": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3_5_text": {"layer_types": _LINEAR},
    "qwen3_moe": {"mlp_only_layers": [1], "decoder_sparse_step": 1},
    "qwen3_next": {"layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "xlstm": {"num_heads": 4},
    "youtu": _MULTI_HEAD_LATENT,
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 4,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layer_types": ["linear_attention", "hybrid"] * 2,
        "num_mem_blocks": 1,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "mamba_headdim": 32,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "adapter_rank": 8,
        "use_long_context": False,
    },
    "zaya": {"num_experts_per_tok": 1},
}

# Small values above that a family's own checks refuse; its default or a correction stays instead.
LEAVE_ALONE: dict[str, tuple[str, ...]] = {
    "dots3_note_text": ("num_attention_heads",),
    "falcon": ("head_dim",),
    "gemma4_text": ("head_dim", "num_key_value_heads"),
    "gemma4_unified_text": ("head_dim", "num_key_value_heads"),
    "xlstm": ("v_head_dim",),
}

# One of each kind: rotary, alibi, learned positions, sliding windows, experts, latent attention, several streams,
# recurrent layers, results that go from layer to layer, embeddings of another width, index-dependent scaling.
REPRESENTATIVE = (
    "bloom",
    "deepseek_v3",
    "falcon#alibi",
    "gemma3_text",
    "gpt2",
    "hy_v4",
    "llama#dynamic_rope",
    "longcat_flash",
    "mixtral",
    "opt#350m",
    "qwen3_next",
    "zaya",
)


def names() -> list[str]:
    """All families and variants, in the order of the table in the documentation."""
    families = {config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING}
    variants = {name for name in CORRECTIONS if "#" in name and name.partition("#")[0] in families}
    return sorted((families - NOT_DECODER_ONLY) | variants)


def in_this_release(name: str) -> bool:
    """Whether the installed transformers has this family; the oldest that is supported lacks the newest."""
    return name.partition("#")[0] in CONFIG_MAPPING


def tiny_config(name: str) -> Any:
    """A config of this family (``family`` or ``family#variant``) with about 100,000 parameters."""
    family = name.partition("#")[0]
    corrections = {**CORRECTIONS.get(family, {}), **CORRECTIONS.get(name, {})}
    return _small(CONFIG_MAPPING[family], family, corrections)


def _small(config_class: Any, family: str, corrections: dict[str, Any]) -> Any:
    default = config_class()
    settings = {key: value for key, value in SMALL.items() if _has(default, key)}
    for key, value in settings.items():
        if value == 0.0 and type(getattr(default, key)) is int:  # mpt's own check wants an int there
            settings[key] = 0
    for key in LEAVE_ALONE.get(family, ()):
        settings.pop(key, None)
    for key in config_class.sub_configs:  # models of several modalities; only their language model is run
        part = getattr(default, key)
        if part is not None:
            settings[key] = _small(type(part), part.model_type, CORRECTIONS.get(part.model_type, {}))
    return config_class(**{**settings, **corrections})


def _has(config: Any, key: str) -> bool:
    try:
        return hasattr(config, key)
    except Exception:  # properties of a default config may fail in any way; then it has no such size
        return False
