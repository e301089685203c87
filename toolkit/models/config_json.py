"""An export's config.json: the source's own, true to the weights, in the keys of transformers 4 and of 5."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

QUANTISATION = ("quantization_config", "compression_config")
"""Keys that tell how weights are quantised."""

_BASE = {"gpt_neox": "rotary_emb_base", "gpt_neox_japanese": "rotary_emb_base"}
_SHARE = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}
_LOCAL_AND_GLOBAL = {
    "modernbert": ("local_rope_theta", "global_rope_theta"),
    "modernbert-decoder": ("local_rope_theta", "global_rope_theta"),
}
"""What transformers 4 calls the base, the rotated share of a head, and the bases of sliding and full attention in the
types that have names of their own for them."""


def config_to_write(config: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Return the source's config.json as an export has it.

    ``tie_word_embeddings`` and the precision are those of the weights. Rotary settings are in both forms:
    ``rope_parameters`` (transformers 5) and ``rope_theta``, ``rope_scaling`` and their kin (transformers 4, vLLM,
    llama.cpp). A quantisation config that the model was loaded without is left out. Everything else stays.

    Args:
        config: the object in the source's config.json; is not changed.
        model: whose weights are written.
    """
    text: PretrainedConfig = model.config.get_text_config()
    written = dict(config)
    for key, nested in config.items():
        if isinstance(nested, dict) and (key == "text_config" or nested.get("model_type") == text.model_type):
            written[key] = dict(nested)
    levels = [written, *(value for key, value in written.items() if value is not config[key])]
    quantised = any(hasattr(level, key) for level in (model.config, text) for key in QUANTISATION)
    for level in levels:
        level["tie_word_embeddings"] = is_tied(model)
        if not quantised:
            for key in QUANTISATION:
                level.pop(key, None)
        if level is written or "dtype" in level or "torch_dtype" in level:
            level["torch_dtype"] = level["dtype"] = str(model.dtype).removeprefix("torch.")
    if isinstance(rotary := text.to_dict().get("rope_parameters"), dict) and rotary:
        level = levels[-1]
        level.setdefault("rope_parameters", rotary)
        older = _rotary_keys_of_transformers_4(text.model_type, level["rope_parameters"])
        if _read_again(text, older) == rotary:
            level |= {**older, **level}
    for older_key, key in text.attribute_map.items():  # such as num_experts, which is num_local_experts in 5
        if "expert" in key and key in levels[-1]:
            levels[-1].setdefault(older_key, levels[-1][key])
    if not written.get("architectures"):
        written["architectures"] = [type(model).__name__]
    return written


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether the head and the input embeddings are one tensor."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    return getattr(head, "weight", None) is getattr(table, "weight", head)


def _read_again(text: PretrainedConfig, older: dict[str, Any]) -> object:
    """Return what transformers 5 makes of the older keys; some types take one ``rope_scaling`` for all layers."""
    try:
        read = type(text).from_dict(copy.deepcopy(text.to_dict() | older)).to_dict()["rope_parameters"]
        return {key: value for key, value in read.items() if key != "type"}  # Phi-3's old word for rope_type
    except Exception:  # a config class checks its values as it likes
        return None


def _rotary_keys_of_transformers_4(model_type: str, rotary: dict[str, Any]) -> dict[str, Any]:
    """Return the settings under the older keys; layers of other types than full and sliding have none there."""
    nested = {key: value for key, value in rotary.items() if isinstance(value, dict)}
    if not nested:
        return _flat(model_type, rotary)
    full, sliding = nested.get("full_attention"), nested.get("sliding_attention")
    if full is None:
        return {}
    local, everywhere = _LOCAL_AND_GLOBAL.get(model_type, ("rope_local_base_freq", "rope_theta"))
    keys = _flat(model_type, full)
    keys[everywhere] = keys.pop("rope_theta", None)
    if sliding is not None:
        keys[local] = sliding.get("rope_theta")
    return {key: value for key, value in keys.items() if value is not None or key == "rope_scaling"}


def _flat(model_type: str, rotary: dict[str, Any]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if (base := rotary.get("rope_theta")) is not None:
        keys |= {"rope_theta": base} | ({_BASE[model_type]: base} if model_type in _BASE else {})
    if (share := rotary.get("partial_rotary_factor")) is not None:
        keys[_SHARE.get(model_type, "partial_rotary_factor")] = share
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
