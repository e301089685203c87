"""EXAONE 3.x without remote code: the same network as Llama under other names (arXiv 2412.04862)."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

from toolkit.models.config_json import is_tied, set_vocabulary
from toolkit.models.directory import check_sizes
from toolkit.models.storage_format import StorageFormat
from toolkit.models.weight_files import StoredTensors

_LLAMA_MODULES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "transformer.h.{}.ln_1": "model.layers.{}.input_layernorm",
    "transformer.h.{}.ln_2": "model.layers.{}.post_attention_layernorm",
    "transformer.h.{}.attn.attention.q_proj": "model.layers.{}.self_attn.q_proj",
    "transformer.h.{}.attn.attention.k_proj": "model.layers.{}.self_attn.k_proj",
    "transformer.h.{}.attn.attention.v_proj": "model.layers.{}.self_attn.v_proj",
    "transformer.h.{}.attn.attention.out_proj": "model.layers.{}.self_attn.o_proj",
    "transformer.h.{}.mlp.c_fc_0": "model.layers.{}.mlp.gate_proj",
    "transformer.h.{}.mlp.c_fc_1": "model.layers.{}.mlp.up_proj",
    "transformer.h.{}.mlp.c_proj": "model.layers.{}.mlp.down_proj",
}
"""EXAONE's name of each module to Llama's; {} is the index of the block. The head is called lm_head in both."""


def _renaming_patterns(names: dict[str, str]) -> dict[str, str]:
    """Return a regular expression for each module name, with its replacement.

    Each has one group at most: transformers' ``key_mapping`` drops the second of two.
    """
    return {
        "^" + re.escape(f"{old}.").replace(re.escape("{}"), r"(\d+)"): f"{new}.".replace("{}", r"\1")
        for old, new in names.items()
    }


_EXAONE_TO_LLAMA = _renaming_patterns(_LLAMA_MODULES)
_LLAMA_TO_EXAONE = _renaming_patterns({llama: exaone for exaone, llama in _LLAMA_MODULES.items()})

_REQUIRED_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_attention_heads", "max_position_embeddings",
    "layer_norm_epsilon",
)  # fmt: skip
"""Keys of an EXAONE config that have no default."""

_SHARED_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "initializer_range", "tie_word_embeddings", "attention_dropout", "bos_token_id",
    "eos_token_id", "pad_token_id", "rope_theta", "rope_scaling", "rope_parameters",
)  # fmt: skip
"""Keys that mean the same in Llama's config."""

_DEFAULTS = {"tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 2}
"""Defaults of EXAONE's config that differ from Llama's, for keys that a config leaves out."""


def llama_name(name: str) -> str:
    """Return the name that a tensor of an EXAONE 3.x checkpoint has in the equivalent Llama."""
    return _rename(name, _EXAONE_TO_LLAMA)


def exaone_name(name: str) -> str:
    """Return the name that a tensor of the equivalent Llama has in an EXAONE 3.x checkpoint."""
    return _rename(name, _LLAMA_TO_EXAONE)


def _rename(name: str, patterns: dict[str, str]) -> str:
    """Replace the first pattern that matches ``name``."""
    for pattern, replacement in patterns.items():
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def is_exaone(source: str, revision: str | None) -> bool:
    """Return whether a config says ``model_type: exaone`` (3.0, 3.5 and Deep; EXAONE 4 is in transformers).

    Raises:
        OSError: the config cannot be found.
        ModelError: it names sizes that no model has.
    """
    values, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    check_sizes(values, source)
    return bool(values.get("model_type") == "exaone")


def read_exaone_config(source: str, revision: str | None) -> LlamaConfig:
    """Return the Llama configuration that computes what an EXAONE 3.x configuration describes.

    Raises:
        OSError: the config cannot be found.
        ValueError: it lacks a key without a default, or sets a dropout that Llama does not have.
    """
    values, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    exaone = _DEFAULTS | {key: value for key, value in values.items() if value is not None}
    if missing := [key for key in _REQUIRED_KEYS if key not in exaone]:
        raise ValueError(f"Its config.json lacks {', '.join(missing)}; expected the one EXAONE 3.x came with.")
    if exaone.get("embed_dropout"):
        raise ValueError(f"Its embed_dropout is {exaone['embed_dropout']}; expected 0, as in every EXAONE 3.x.")
    return LlamaConfig(
        num_hidden_layers=exaone["num_layers"],
        rms_norm_eps=exaone["layer_norm_epsilon"],
        hidden_act=exaone.get("activation_function", "silu"),
        architectures=["LlamaForCausalLM"],
        **{key: exaone[key] for key in _SHARED_KEYS if key in exaone},
    )


class ExaoneFormat(StorageFormat):
    """Reads EXAONE 3.x as the equivalent Llama, and writes it back under its own names with its own config.

    What is written is what EXAONE's own code and other loaders of EXAONE 3.x read. That code is copied, never run. The
    tokenizer's files are copied, not saved anew: transformers 4, which the code was made for, reads them.
    """

    def read(self, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Read the equivalent ``LlamaForCausalLM``; see ``StorageFormat.read``."""
        config = read_exaone_config(self.source, self.revision)
        model, info = LlamaForCausalLM.from_pretrained(
            self.source, revision=self.revision, config=config, key_mapping=_EXAONE_TO_LLAMA, **options
        )
        # The mapping renamed on the way in; save_pretrained would undo it with wrong names (out_proj as o_proj).
        for attribute in ("_weight_conversions", "_checkpoint_conversion_mapping"):
            vars(model).pop(attribute, None)
        return model, info

    def tokenizer_options(self) -> dict[str, Any]:
        """Return revision and Llama config: without one, transformers would ask for the remote code's."""
        return super().tokenizer_options() | {"config": read_exaone_config(self.source, self.revision)}

    def model_names(self, model: PreTrainedModel, stored: StoredTensors) -> dict[str, str]:
        """Map stored names to the Llama's."""
        return {name: llama_name(name) for name in stored.entries}

    def _to_stored_layout(self, model: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {exaone_name(name): tensor for name, tensor in state.items()}

    def _config_to_write(self, config: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
        """Return EXAONE's config with nothing new but tying, precision and the length of the tables."""
        tied = is_tied(model)
        if config.get("tie_word_embeddings", _DEFAULTS["tie_word_embeddings"]) != tied:
            config["tie_word_embeddings"] = tied
        set_vocabulary(config, model.config)
        for key in [key for key in ("torch_dtype", "dtype") if key in config] or ["torch_dtype"]:
            config[key] = str(model.dtype).removeprefix("torch.")
        return config
