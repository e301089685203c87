"""A tiny model of any causal type of the installed transformers: one table of sizes for all, a few words for some."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from zoo import ALL_HEADS, DELTA_NET, EXPERTS, HEADS, LATENT, MAMBA2, ROUTED, SMALL

SIZES = {
    **SMALL, **EXPERTS, **ROUTED, **LATENT, **DELTA_NET, **MAMBA2,
    "n_shared_experts": 1, "shared_expert_intermediate_size": 16, "sliding_window": 6, "num_local_experts": 4,
    "decoder_layers": 4, "encoder_layers": 1, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "d_model": 32, "ffn_dim": 48, "type_vocab_size": 2,
    "embedding_size": 32, "hidden_size_global": 32, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 16,
}  # fmt: skip
"""What a config gets of this is what it knows."""

SLIDING = ["sliding_attention", "full_attention"] * 2
ROTARY = {"rope_type": "default", "rope_theta": 1e4}
SOME: dict[str, dict[str, Any]] = {
    "axk1": ALL_HEADS, "axk2": ALL_HEADS, "deepseek_v32": ALL_HEADS, "glm4_moe_lite": ALL_HEADS,
    "glm_moe_dsa": ALL_HEADS, "minicpm3": ALL_HEADS, "youtu": ALL_HEADS, "bailing_hybrid": {**ALL_HEADS, **HEADS},
    "blt": {"encoder_hash_byte_group_vocab": 20},
    "cohere_compass_text": {"layer_types": SLIDING, "rope_parameters": dict.fromkeys(SLIDING, ROTARY)},
    "dbrx": {"n_layers": 4, "n_heads": 4, "max_seq_len": 64,
             "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
             "ffn_config": {"ffn_hidden_size": 48, "hidden_size": 32}},
    "deepseek_v4": {"num_key_value_heads": 1, "head_dim": 16, "o_groups": 2, "o_lora_rank": 8, "hc_mult": 2},
    "gemma4": {"text_config": {**SMALL, **HEADS, "layer_types": SLIDING, "global_head_dim": 8,
                               "hidden_size_per_layer_input": 0}},
    "hunyuan_v1_dense": HEADS, "hunyuan_v1_moe": HEADS, "ministral": HEADS,
    "kimi_linear": {**ALL_HEADS, "linear_head_dim": 8, "linear_num_heads": 4,
                    "layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {**ALL_HEADS, "num_layers": 4, "num_hidden_layers": 8, "head_dim": 8, "qk_head_dim": 16,
                      "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "zero_expert_num": 2, "moe_topk": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8, "layer_types": None},
    "prophetnet": {"num_hidden_layers": None, "num_decoder_layers": 4},
    "qwen4_exp_text": {**HEADS, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
                       "indexer_compress_ratio": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local"] * 4, "attention_head_size": 8,
                 "local_attn_chunk_length": 8, "feed_forward_size": 48, "num_hidden_layers": None},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8, "pronunciation_embed_dim": 8,
                 "shape_embed_dim": 8},
    "xlnet": {"max_position_embeddings": None, "d_head": 8},
    "xmod": {"is_decoder": True, "languages": ["en_XX"], "default_language": "en_XX"},
    "xlstm": {"num_heads": 4, "v_head_dim": None, "mode": "inference"},
    "zamba": {**ALL_HEADS, "n_mamba_heads": 2, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1,
              "num_hidden_layers": 6, "layer_types": ["mamba", "mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
    **{name: {"is_decoder": True} for name in (
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
        "rembert", "roberta", "roberta-prelayernorm", "roformer", "xlm-roberta-xl",
    )},
}  # fmt: skip
"""What a type needs beside ``SIZES``; none takes one of these away."""

MOST_PARAMETERS = 7_000_000


def make_any(name: str) -> Any:
    """A model of that type with random weights.

    Raises:
        Exception: whatever the type raises at these sizes; ValueError if it stays too large.
    """
    plain = AutoConfig.for_model(name)
    sizes = _fitting(plain, SOME.get(name, {}))
    for part in type(plain).sub_configs:
        nested = getattr(plain, part, None)
        if isinstance(nested, PretrainedConfig) and part not in sizes:
            sizes[part] = _fitting(nested, {})
    config = AutoConfig.for_model(name, **sizes)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"{parameters:,} parameters at the smallest")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def _fitting(config: PretrainedConfig, more: dict[str, Any]) -> dict[str, Any]:
    known = {key: value for key, value in SIZES.items() if hasattr(config, key) or key in config.attribute_map}
    types = getattr(config, "layer_types", None)
    if types:
        known["layer_types"] = list(types)[-4:]
    return {key: value for key, value in {**known, **more}.items() if value is not None}
