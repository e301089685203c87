"""Cut the model at the frost line, with the frozen weights stored and placed as the recipe asks."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedTokenizerBase

from toolkit.config.schema import PrefixConfig, RunConfig
from toolkit.data.batches import collate
from toolkit.data.dataset import Dataset
from toolkit.distributed import World
from toolkit.errors import ConfigError, ModelError
from toolkit.mask.layer_mask import LayerMask, build_mask
from toolkit.models.load import LoadedModel, load
from toolkit.plan.skeleton import skeleton
from toolkit.prefix.placement import FrozenWeights
from toolkit.prefix.split import Prefix, Suffix, split, split_is_exact

log = logging.getLogger("frostline")


def load_for(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
    """Load the model; with ``prefix.placement: disk``, all but the blocks below the frost line.

    Raises:
        UsageError: the model or the mask is at fault.
    """
    if config.prefix.placement != "disk":
        return load(config.model, tokenizer)
    anatomy = skeleton(config.model).anatomy  # which blocks are frozen is to be known before any is loaded
    return load(config.model, tokenizer, anatomy, build_mask(config.mask, anatomy).boundary)


def effective(config: PrefixConfig, device: torch.device) -> PrefixConfig:
    """What of the recipe's wishes makes a difference where the run computes."""
    if config.placement == "cpu" and device.type == "cpu":
        return config.model_copy(update={"placement": "device"})
    return config


def cut(
    loaded: LoadedModel, mask: LayerMask, dataset: Dataset, config: PrefixConfig, world: World
) -> tuple[Prefix | None, Suffix]:
    """Split at the frost line if that is exact for this architecture; else keep the model whole, and say so.

    Raises:
        ConfigError: the recipe quantises or places a prefix, and the mask leaves none.
        ModelError: the recipe quantises or places a prefix, and this architecture cannot be cut, or not quantised.
    """
    model = loaded.model
    frozen = _take_out(loaded, mask, config, world)
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(world.device))
    model.train()
    prefix, suffix = split(model, loaded.anatomy, mask.boundary if mask.has_prefix else None, frozen)
    if prefix is None:
        return None, suffix
    shortest = min(dataset.train, key=lambda example: len(example.token_ids))
    exact = split_is_exact(model, prefix, suffix, collate([shortest], pad_id=0).to(world.device))
    name, effect = type(model).__name__, "does not give the same logits when cut at block"
    if frozen is not None:
        if not exact:
            raise ModelError(
                f"{name} {effect} {mask.boundary}, so it has no prefix of its own to store otherwise; "
                "leave out prefix.precision and prefix.placement"
            )
        with torch.no_grad():
            frozen.settle(prefix.skeleton, config.precision, effective(config, world.device).placement)
        return prefix, suffix
    if exact:
        return prefix, suffix
    log.warning(
        "%s %s %d; training goes on with the whole model: "
        "the same result, but the frozen blocks run inside it",
        name, effect, mask.boundary,
    )  # fmt: skip
    _, suffix = split(model, loaded.anatomy, None)
    if mask.tied == "head_only":
        suffix.detach_embeddings(loaded.anatomy)
    return None, suffix


def _take_out(loaded: LoadedModel, mask: LayerMask, config: PrefixConfig, world: World) -> FrozenWeights | None:
    """The weights below the frost line, if they are to be kept otherwise than as they are on the device."""
    wanted = effective(config, world.device)
    if wanted != config:
        log.info("prefix.placement: cpu changes nothing here: the run computes on the CPU, where the weights are")
    if (wanted.precision, wanted.placement) == ("model", "device"):
        return None
    if mask.boundary == 0:
        asked = {key: value for key, value in config.model_dump().items() if key in ("precision", "placement")}
        raise ConfigError(
            [
                f"prefix.{key} is {value!r}, but the mask leaves no block frozen below what trains (the frost line is "
                "at block 0); leave the key out, or let mask.train begin higher"
                for key, value in asked.items()
                if value not in ("model", "device")
            ],
            "recipe, read against the mask",
        )
    anatomy = loaded.anatomy
    blocks = [f"{anatomy.blocks}.{index}" for index in range(mask.boundary)]
    tables = anatomy.embeddings if wanted.placement != "device" else ()
    return FrozenWeights(loaded.model, blocks, tables, world.device, loaded.on_disk)
