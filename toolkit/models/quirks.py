"""Handle what some models do in training alone: LayerDrop, and balancing losses of a router."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig

_ROUTER_LOSS = re.compile(r"(router_)?(aux|z)_loss_(coef|alpha|weight)|moe_(aux_)?loss_(coef|weight)")
"""Config keys that are the coefficient of a router's balancing loss."""
_EXPERTS = re.compile(r"(moe_)?num_(local_)?experts|n_routed_experts")


def turn_off_layerdrop(model: nn.Module) -> None:
    """Let every pass run all blocks (LayerDrop, arXiv 1909.11556, skips some at random in training).

    A cut model cannot skip the block that it is cut at, and ranks or a checkpointed backward would skip others. The
    config keeps its rate.
    """
    for module in model.modules():
        if getattr(module, "layerdrop", 0):
            setattr(module, "layerdrop", 0.0)  # noqa: B010 (an nn.Module is typed to hold tensors and modules)


def training_notes(config: PretrainedConfig) -> Iterator[str]:
    """Yield a log line for each thing that this model's original training does and this one leaves out."""
    values = dict(_numeric_settings(config.to_dict()))
    for name in ("layerdrop", "decoder_layerdrop"):
        if rate := values.get(name):
            yield f"{name} is {rate:g} in the model's config; it is off here: every block runs in every step"
            break
    coefficients = ", ".join(
        f"{key} {value:g}" for key, value in values.items() if value and _ROUTER_LOSS.fullmatch(key)
    )
    if coefficients and (has_experts(config) or values.get("output_router_logits")):
        transformers_does = (
            "the config has output_router_logits: true, so transformers' own loss would add it"
            if values.get("output_router_logits")
            else "so does transformers' own, as the config has output_router_logits: false"
        )
        yield (
            f"the router's balancing loss is left out ({coefficients}): the loss is the answers' cross entropy alone; "
            f"{transformers_does}"
        )


def has_experts(config: PretrainedConfig) -> bool:
    """Return whether the model is a mixture of experts, whose products round by what else is in a batch."""
    return any(value > 1 for key, value in _numeric_settings(config.to_dict()) if _EXPERTS.fullmatch(key))


def _numeric_settings(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield name and value of each number and switch in a config, nested configs included."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numeric_settings(value)
        elif isinstance(value, (bool, int, float)):
            yield key, float(value)
