"""Load the model as the recipe stores the weights below the frost line."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from toolkit.config.schema import PrefixConfig, RunConfig
from toolkit.inference.open_model import load_base
from toolkit.mask.layer_mask import build_mask
from toolkit.models.load import LoadedModel
from toolkit.planning.meta_model import meta_model
from toolkit.runtime.errors import ConfigError


def load_for_training(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
    """Load the model; with ``prefix.placement: disk``, all but the blocks below the frost line.

    Raises:
        UsageError: the model or the mask is at fault.
    """
    if config.prefix.placement != "disk":
        return load_base(config.model, tokenizer)
    anatomy = meta_model(config.model).anatomy  # which blocks are frozen is to be known before any is loaded
    return load_base(config.model, tokenizer, anatomy, build_mask(config.mask, anatomy).boundary)


def check_schedule_allowed(config: RunConfig, device: torch.device) -> None:
    """Refuse to store frozen weights otherwise where a later phase may train them.

    Raises:
        ConfigError: ``mask.schedule`` with ``prefix.precision``, with ``prefix.placement``, or with paged moments.
    """
    if config.mask.schedule and config.optim.name == "paged_adamw_8bit":
        raise ConfigError(
            [
                "optim.name is paged_adamw_8bit, but mask.schedule exchanges the optimizer, and bitsandbytes never "
                "frees memory that it paged; write optim.name: adamw_8bit, or leave out the schedule"
            ],
            "recipe",
        )
    prefix = effective_prefix(config.prefix, device)
    if config.mask.schedule and (prefix.precision, prefix.placement) != ("model", "device"):
        raise ConfigError(
            [
                f"prefix.precision is {prefix.precision} and prefix.placement is {prefix.placement}, but mask.schedule "
                "moves the frost line, so weights below it are to stay as they are; leave out both keys or the schedule"
            ],
            "recipe",
        )


def effective_prefix(config: PrefixConfig, device: torch.device) -> PrefixConfig:
    """Return the prefix section without the settings that change nothing where the run computes."""
    if config.placement == "cpu" and device.type == "cpu":
        return config.model_copy(update={"placement": "device"})
    return config
