"""EXAONE 3.x without remote code: the same network as Llama under other names (arXiv 2412.04862)."""

from __future__ import annotations

import re
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

_TO_LLAMA = {
    r"^transformer\.wte\.": "model.embed_tokens.",
    r"^transformer\.ln_f\.": "model.norm.",
    r"^transformer\.h\.(\d+)\.ln_1\.": r"model.layers.\1.input_layernorm.",
    r"^transformer\.h\.(\d+)\.ln_2\.": r"model.layers.\1.post_attention_layernorm.",
    r"^transformer\.h\.(\d+)\.attn\.attention\.q_proj\.": r"model.layers.\1.self_attn.q_proj.",
    r"^transformer\.h\.(\d+)\.attn\.attention\.k_proj\.": r"model.layers.\1.self_attn.k_proj.",
    r"^transformer\.h\.(\d+)\.attn\.attention\.v_proj\.": r"model.layers.\1.self_attn.v_proj.",
    r"^transformer\.h\.(\d+)\.attn\.attention\.out_proj\.": r"model.layers.\1.self_attn.o_proj.",
    r"^transformer\.h\.(\d+)\.mlp\.c_fc_0\.": r"model.layers.\1.mlp.gate_proj.",
    r"^transformer\.h\.(\d+)\.mlp\.c_fc_1\.": r"model.layers.\1.mlp.up_proj.",
    r"^transformer\.h\.(\d+)\.mlp\.c_proj\.": r"model.layers.\1.mlp.down_proj.",
}

_SAME_KEY = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "initializer_range", "tie_word_embeddings", "attention_dropout", "bos_token_id",
    "eos_token_id", "pad_token_id", "rope_theta", "rope_scaling", "rope_parameters",
)  # fmt: skip


def llama_name(name: str) -> str:
    """The name that a tensor of an EXAONE 3.x checkpoint has in the equivalent Llama."""
    for pattern, replacement in _TO_LLAMA.items():
        renamed, found = re.subn(pattern, replacement, name)
        if found:
            return renamed
    return name


def is_exaone(source: str, revision: str | None) -> bool:
    """True for a checkpoint whose config says ``model_type: exaone`` (3.0, 3.5 and Deep; EXAONE 4 is in transformers).

    Raises:
        OSError: the config cannot be found.
    """
    values, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    return bool(values.get("model_type") == "exaone")


def read_exaone_config(source: str, revision: str | None) -> LlamaConfig:
    """The Llama configuration that computes what an EXAONE 3.x configuration describes.

    Raises:
        OSError: the config cannot be found.
        KeyError: it lacks a key that EXAONE 3.x defines.
    """
    exaone, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    values = {key: exaone[key] for key in _SAME_KEY if exaone.get(key) is not None}
    return LlamaConfig(
        num_hidden_layers=exaone["num_layers"],
        rms_norm_eps=exaone["layer_norm_epsilon"],
        hidden_act=exaone.get("activation_function", "silu"),
        architectures=["LlamaForCausalLM"],
        **values,
    )


def load_exaone(source: str, revision: str | None, options: dict[str, Any]) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Load an EXAONE 3.x checkpoint as the equivalent ``LlamaForCausalLM``.

    Returns:
        The model and transformers' loading information.

    Raises:
        OSError: the checkpoint cannot be found.
        KeyError: its config lacks a key that EXAONE 3.x defines.
    """
    model, info = LlamaForCausalLM.from_pretrained(
        source, revision=revision, config=read_exaone_config(source, revision), key_mapping=_TO_LLAMA, **options
    )
    # The mapping renamed on the way in; save_pretrained would undo it with wrong names (out_proj as o_proj), and what
    # is saved is to be a plain Llama.
    for attribute in ("_weight_conversions", "_checkpoint_conversion_mapping"):
        if attribute in vars(model):
            delattr(model, attribute)
    return model, info
