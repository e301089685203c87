"""Tiny random models of many architectures: what each type's configuration needs, and what it calls its parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DELTA_NET = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
HEADS = {"head_dim": 8}
GEMMA4 = {**HEADS, "layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 8}
ALL_HEADS = {"num_key_value_heads": 4}


@dataclass(frozen=True)
class Kind:
    """A model type: what its configuration adds to ``SMALL``, and what it calls its parts."""

    config: dict[str, Any] = field(default_factory=dict)
    blocks: str = "model.layers"
    head: str = "lm_head"
    unreached: tuple[str, ...] = ()
    """Ends of names that no gradient reaches: routing biases, which other training code sets by counting."""


def gpt(**config: Any) -> Kind:
    return Kind({"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, **config}, "transformer.h")


CUT = {
    "afmoe": Kind({**EXPERTS, "num_dense_layers": 1, "sliding_window": 6, **HEADS}, unreached=(".expert_bias",)),
    "apertus": Kind(),
    "arcee": Kind(),
    "bamba": Kind({"attn_layer_indices": [1, 3], **MAMBA2}),
    "biogpt": Kind(blocks="biogpt.layers", head="output_projection"),
    "bitnet": Kind(),
    "bloom": Kind({"n_layer": 4, "n_head": 4}, "transformer.h"),
    "codegen": gpt(rotary_dim=4),
    "cohere": Kind(),
    "cohere2": Kind({"sliding_window": 6, **HEADS}),
    "ctrl": Kind({"n_embd": 32, "n_layer": 4, "n_head": 4, "dff": 48}, "transformer.h"),
    "deepseek_v2": Kind({**ROUTED, **LATENT, **ALL_HEADS}),
    "deepseek_v3": Kind({**ROUTED, **LATENT, **ALL_HEADS, "n_shared_experts": 1}),
    "dots1": Kind({**ROUTED, "n_shared_experts": 1, **HEADS}),
    "ernie4_5": Kind(HEADS),
    "ernie4_5_moe": Kind(
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1},
        unreached=(".e_score_correction_bias",),
    ),
    "exaone4": Kind({"sliding_window": 6, "sliding_window_pattern": 2}),
    "exaone_moe": Kind({**EXPERTS, "n_group": 1, "topk_group": 1, "sliding_window": 6}),
    "falcon": Kind({"ffn_hidden_size": 48}, "transformer.h"),
    "falcon_h1": Kind({**MAMBA2, "mamba_d_ssm": 64, "mamba_n_groups": 1, **HEADS}),
    "falcon_mamba": Kind({"state_size": 8, "time_step_rank": 4}, "backbone.layers"),
    "gemma": Kind(HEADS),
    "gemma2": Kind({"sliding_window": 6, **HEADS}),
    "gemma3_text": Kind({"sliding_window": 6, "sliding_window_pattern": 2, **HEADS}),
    "gemma4_text": Kind({**GEMMA4, "hidden_size_per_layer_input": 0}),
    "glm": Kind(HEADS),
    "glm4": Kind(HEADS),
    "glm4_moe": Kind({**ROUTED, "n_shared_experts": 1, **HEADS}),
    "gpt2": gpt(),
    "gpt_bigcode": gpt(),
    "gpt_neo": Kind(
        {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 6},
        "transformer.h",
    ),
    "gpt_neox": Kind(blocks="gpt_neox.layers"),
    "gpt_oss": Kind({"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6, **HEADS}),
    "gptj": gpt(rotary_dim=4),
    "granite": Kind({"tie_word_embeddings": True}),
    "granitemoe": Kind({"num_local_experts": 4, "num_experts_per_tok": 2}),
    "helium": Kind(HEADS),
    "hyperclovax": Kind(),
    "jamba": Kind(
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4}
    ),
    "lfm2": Kind({"layer_types": ["conv", "full_attention"] * 2}),
    "llama": Kind(),
    "llama4_text": Kind({"num_local_experts": 4, "intermediate_size_mlp": 48, "attention_chunk_size": 8, **HEADS}),
    "mamba": Kind({"state_size": 8, "time_step_rank": 4}, "backbone.layers"),
    "minimax": Kind({"num_local_experts": 4, "num_experts_per_tok": 2, **HEADS}),
    "mistral": Kind({"sliding_window": 6}),
    "mixtral": Kind({"num_local_experts": 4}),
    "mpt": Kind({"d_model": 32, "n_layers": 4, "n_heads": 4, "expansion_ratio": 2}, "transformer.blocks"),
    "nanochat": Kind(HEADS),
    "nemotron": Kind(HEADS),
    "olmo": Kind(),
    "olmo2": Kind(),
    "olmoe": Kind(EXPERTS),
    "openai-gpt": gpt(),
    "opt": Kind({"ffn_dim": 48, "word_embed_proj_dim": 16}, "model.decoder.layers"),
    "phi": Kind(),
    "phi3": Kind(),
    "phimoe": Kind({"num_local_experts": 4}),
    "qwen2": Kind({"tie_word_embeddings": True}),
    "qwen2_moe": Kind({**EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3": Kind(HEADS),
    "qwen3_moe": Kind({**EXPERTS, **HEADS}),
    "qwen3_next": Kind({**EXPERTS, **DELTA_NET, **HEADS, "shared_expert_intermediate_size": 16}),
    "recurrent_gemma": Kind({"attention_window_size": 6, "lru_width": 32}),
    "seed_oss": Kind(HEADS),
    "smollm3": Kind(),
    "solar_open": Kind({**ROUTED, **HEADS}),
    "stablelm": Kind(),
    "starcoder2": Kind({"sliding_window": 6}),
    "xglm": Kind({"d_model": 32, "num_layers": 4, "ffn_dim": 48, "attention_heads": 4}),
}
"""Types that give the whole model's logits wherever they are cut (Gemma 4 where it has no inputs per layer)."""

UNCUT = {
    # puts a prompt of its own before the token ids
    "cpmant": Kind({"dim_head": 8, "dim_ff": 48, "prompt_types": 4, "prompt_length": 4, "segment_types": 4},
                   "cpmant.encoder.layers"),
    # carries four streams, and its upper blocks read the keys and values of lower ones
    "gemma3n_text": Kind(
        {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2, "laurel_rank": 8,
         "activation_sparsity_pattern": [0.0] * 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64,
         "sliding_window": 6, **HEADS}
    ),
    # every block looks the token ids up in a table
    "gemma4_text:per layer": Kind({**GEMMA4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64}),
    # runs through the same blocks several times
    "hrm_text": Kind({"H_cycles": 1, "L_cycles": 2}, "model.L_module.layers"),
}  # fmt: skip
"""Types that cannot be cut, each with the reason."""

OTHER = {
    "rwkv": Kind({"context_length": 64, "rescale_every": 2}, "rwkv.blocks", "head"),
    "xlm-roberta": Kind({"is_decoder": True, "tie_word_embeddings": True}, "roberta.encoder.layer", "lm_head.decoder"),
    "zamba2": Kind(
        {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 4, "mamba_d_state": 8,
         "chunk_size": 8, "adapter_rank": 4, **ALL_HEADS}
    ),
}  # fmt: skip
"""Types with a test of their own."""


def make(name: str, **more: Any) -> Any:
    """A model of the type ``name``, random in the same way each time."""
    torch.manual_seed(0)
    kind = {**CUT, **UNCUT, **OTHER}[name]
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name.partition(":")[0], **{**SMALL, **kind.config, **more})
    )
