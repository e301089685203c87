"""An export's config.json: the source's own, true to the weights, in the keys of transformers 4 and of 5."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

QUANTISATION_KEYS = ("quantization_config", "compression_config")
"""Config keys that describe how weights are quantised."""

_BASE_KEY = {"gpt_neox": "rotary_emb_base", "gpt_neox_japanese": "rotary_emb_base"}
_ROTATED_FRACTION_KEY = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}
_SLIDING_AND_FULL_KEYS = {
    "modernbert": ("local_rope_theta", "global_rope_theta"),
    "modernbert-decoder": ("local_rope_theta", "global_rope_theta"),
}
"""Keys of transformers 4 in the model types that do not use the common ones: the rotary base, the rotated fraction of
a head, and the bases of sliding and full attention."""


def config_to_write(config: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Return the object ``config`` of the source's config.json as an export of ``model`` has it.

    ``tie_word_embeddings`` and the precision are those of the weights. Rotary settings are in both forms:
    ``rope_parameters`` (transformers 5) and ``rope_theta``, ``rope_scaling`` and their kin (transformers 4, vLLM,
    llama.cpp). A quantisation config that the model was loaded without is left out. Everything else stays.
    """
    text: PretrainedConfig = model.config.get_text_config()
    export_config = dict(config)
    levels = [export_config]
    for key, nested in config.items():
        if isinstance(nested, dict) and (key == "text_config" or nested.get("model_type") == text.model_type):
            export_config[key] = dict(nested)
            levels.append(export_config[key])
    quantised = any(hasattr(level, key) for level in (model.config, text) for key in QUANTISATION_KEYS)
    for level in levels:
        level["tie_word_embeddings"] = is_tied(model)
        if not quantised:
            for key in QUANTISATION_KEYS:
                level.pop(key, None)
        if level is export_config or "dtype" in level or "torch_dtype" in level:
            level["torch_dtype"] = level["dtype"] = str(model.dtype).removeprefix("torch.")
    if isinstance(rotary := text.to_dict().get("rope_parameters"), dict) and rotary:
        level = levels[-1]
        level.setdefault("rope_parameters", rotary)
        old_keys = _rotary_keys_of_transformers_4(text.model_type, level["rope_parameters"])
        if _parse_old_keys(text, old_keys) == rotary:
            level |= {**old_keys, **level}
    for old_key, key in text.attribute_map.items():  # such as num_experts, which is num_local_experts in 5
        if "expert" in key and key in levels[-1]:
            levels[-1].setdefault(old_key, levels[-1][key])
    set_vocabulary(levels[-1], text)
    if not export_config.get("architectures"):
        export_config["architectures"] = [type(model).__name__]
    return export_config


def set_vocabulary(level: dict[str, Any], config: PretrainedConfig) -> None:
    """Set ``vocab_size`` of a config.json if the tables of the model with this ``config`` became longer."""
    length = getattr(config, "vocab_size", None)
    if length != level.get("vocab_size", length) or (
        "vocab_size" not in level and "vocab_size" in config.to_diff_dict()
    ):
        level["vocab_size"] = length


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether the head and the input embeddings are one tensor."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return getattr(head, "weight", None) is getattr(embeddings, "weight", head)


def _parse_old_keys(text: PretrainedConfig, old_keys: dict[str, Any]) -> object:
    """Return the ``rope_parameters`` that transformers 5 makes of the old keys; None if it rejects them."""
    try:
        rotary = type(text).from_dict(copy.deepcopy(text.to_dict() | old_keys)).to_dict()["rope_parameters"]
        return {key: value for key, value in rotary.items() if key != "type"}  # Phi-3's old word for rope_type
    except Exception:  # a config class checks its values as it likes
        return None


def _rotary_keys_of_transformers_4(model_type: str, rotary: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary settings under the keys of transformers 4.

    Those hold one setting for full attention and one base for sliding attention; layers of any other type have no key.
    """
    nested = {key: value for key, value in rotary.items() if isinstance(value, dict)}
    if not nested:
        return _old_keys_of_one_layer_type(model_type, rotary)
    full, sliding = nested.get("full_attention"), nested.get("sliding_attention")
    if full is None:
        return {}
    sliding_key, full_key = _SLIDING_AND_FULL_KEYS.get(model_type, ("rope_local_base_freq", "rope_theta"))
    keys = _old_keys_of_one_layer_type(model_type, full)
    keys[full_key] = keys.pop("rope_theta", None)
    if sliding is not None:
        keys[sliding_key] = sliding.get("rope_theta")
    return {key: value for key, value in keys.items() if value is not None or key == "rope_scaling"}


def _old_keys_of_one_layer_type(model_type: str, rotary: dict[str, Any]) -> dict[str, Any]:
    """Return one set of rotary settings, as of one layer type, under the keys of transformers 4."""
    keys: dict[str, Any] = {}
    if (base := rotary.get("rope_theta")) is not None:
        keys |= {"rope_theta": base} | ({_BASE_KEY[model_type]: base} if model_type in _BASE_KEY else {})
    if (share := rotary.get("partial_rotary_factor")) is not None:
        keys[_ROTATED_FRACTION_KEY.get(model_type, "partial_rotary_factor")] = share
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    scaling = {key: value for key, value in rotary.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if kind == "default":
        keys["rope_scaling"] = None
    elif model_type == "phi3":  # it takes these three keys and no other
        keys["rope_scaling"] = {"type": kind} | {key: rotary[key] for key in ("short_factor", "long_factor")}
        keys["original_max_position_embeddings"] = rotary.get("original_max_position_embeddings")
    else:
        keys["rope_scaling"] = {**scaling, "rope_type": kind}
    return keys
