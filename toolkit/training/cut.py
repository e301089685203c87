"""Cut the model at the frost line: the frozen weights stored and placed as the recipe asks, what they give cached."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from toolkit.activation_cache.cached_prefix import CachedPrefix, HiddenStates
from toolkit.activation_cache.namespace import sample_key
from toolkit.activation_cache.policy import (
    CacheRequest,
    decide_on_all_ranks,
    mask_obstacle,
    note_split,
    noted_split,
    open_store,
    prefix_fingerprints,
    unfit,
)
from toolkit.activation_cache.store import ActivationStore
from toolkit.checkpoint.delta import Base
from toolkit.config.policy import Decision, refuse_cache
from toolkit.config.schema import PrefixConfig, RunConfig
from toolkit.data.batches import collate
from toolkit.data.dataset import Dataset
from toolkit.data.examples import Example, shortest
from toolkit.frozen.weight_offload import FrozenWeights
from toolkit.inference.open_model import load_base
from toolkit.mask.apply import apply_mask
from toolkit.mask.layer_mask import LayerMask, build_mask
from toolkit.models.load import LoadedModel, fingerprint
from toolkit.planning.meta_model import meta_model
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import ConfigError, ModelError
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import Suffix, split, split_is_exact

log = logging.getLogger("frostline")


@dataclass(frozen=True)
class CutJob:
    """What the cut of one mask serves."""

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    mask: LayerMask
    base: Base
    dataset: Dataset
    passes: float
    """Over the training rows while this mask holds."""
    world: World
    changes: bool = False
    """The mask changes during the run: what lies below the line may have trained before, or may train later."""

    @property
    def examples(self) -> tuple[Example, ...]:
        """All samples of the run."""
        return (*self.dataset.train, *self.dataset.validation)


def load_for(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
    """Load the model; with ``prefix.placement: disk``, all but the blocks below the frost line.

    Raises:
        UsageError: the model or the mask is at fault.
    """
    if config.prefix.placement != "disk":
        return load_base(config.model, tokenizer)
    anatomy = meta_model(config.model).anatomy  # which blocks are frozen is to be known before any is loaded
    return load_base(config.model, tokenizer, anatomy, build_mask(config.mask, anatomy).boundary)


def refuse_with_schedule(config: RunConfig, device: torch.device) -> None:
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
    wanted = effective(config.prefix, device)
    if config.mask.schedule and (wanted.precision, wanted.placement) != ("model", "device"):
        raise ConfigError(
            [
                f"prefix.precision is {wanted.precision} and prefix.placement is {wanted.placement}, but mask.schedule "
                "moves the frost line, so weights below it are to stay as they are; leave out both keys or the schedule"
            ],
            "recipe",
        )


def effective(config: PrefixConfig, device: torch.device) -> PrefixConfig:
    """What of the recipe's wishes makes a difference where the run computes."""
    if config.placement == "cpu" and device.type == "cpu":
        return config.model_copy(update={"placement": "device"})
    return config


def cut(loaded: LoadedModel, job: CutJob) -> tuple[HiddenStates | None, Suffix]:
    """The two halves of ``loaded`` on their device, the prefix behind its cache where that pays.

    An architecture that cannot be cut exactly stays whole, in a suffix without a prefix, and the log says so. If the
    cache holds all samples, no block of the prefix runs and none of its weights goes to the device.

    Raises:
        ConfigError: the recipe quantises, places or caches a prefix, and the mask leaves none that allows it.
        ModelError: the recipe quantises or places a prefix, and this architecture cannot be cut, or not quantised.
    """
    settings = job.config.prefix
    loaded.model.train()
    refused = refuse_cache(settings, mask_obstacle(job.mask))
    store = _open(loaded, job) if refused is None else None
    if store is not None and (returned := _complete(store, job)) is not None:
        log.info("activation cache: all samples are in %s; the prefix is not needed", store.directory)
        suffix = Suffix(loaded.model, loaded.anatomy, job.mask.boundary, returned)
        return CachedPrefix(None, *_loaders(loaded, job), store, job.world), _detach_from_file(suffix, job)
    prefix, suffix = _halve(loaded, job)
    if store is not None:
        cached, refused = _fill(prefix, store, loaded, job)
        if cached is not None:
            if not job.changes and cached.release(job.examples):
                suffix = _detach_from_file(suffix, job)
            return cached, suffix
        store.close()
    log.info("activation cache: %s", refused.reason if refused else "")
    return prefix, suffix


def _open(loaded: LoadedModel, job: CutJob) -> ActivationStore:
    settings, device = job.config.prefix, job.world.device
    computed_by = prefix_fingerprints(loaded, job.mask.boundary, settings, device) if job.world.is_main else None
    return open_store(settings, job.world.broadcast_object(computed_by), loaded.model, job.world)


def _complete(store: ActivationStore, job: CutJob) -> list[int | None] | None:
    """What the blocks return, if every rank finds every sample in the store."""
    returned = noted_split(store)
    lacking = returned is None or bool(store.missing([sample_key(example.token_ids) for example in job.examples]))
    return None if job.world.max(float(lacking)) else returned


def _fill(
    prefix: Prefix | None, store: ActivationStore, loaded: LoadedModel, job: CutJob
) -> tuple[CachedPrefix | None, Decision | None]:
    """The prefix behind a cache that all ranks have filled; or none, and why not."""
    settings, world = job.config.prefix, job.world
    obstacle = "this architecture cannot be cut" if prefix is None else unfit(prefix, job.examples[0], store, world)
    if world.max(float(obstacle is not None)) and obstacle is None:
        obstacle = "another rank found that it cannot be"
    if prefix is None or obstacle:
        return None, refuse_cache(settings, obstacle)
    decision = decide_on_all_ranks(CacheRequest(settings, job.examples, job.passes), store, world)
    if not decision.on:
        return None, decision
    log.info("activation cache: %s; filling it", decision.reason)
    cached = CachedPrefix(prefix, *_loaders(loaded, job), store, world)
    cached.fill(job.examples)
    if world.local_rank == 0:  # each node may have a disk of its own
        note_split(store, prefix.returned())
    return cached, None


def _loaders(loaded: LoadedModel, job: CutJob) -> tuple[Callable[[], Prefix], Callable[[], Prefix]]:
    """Two that give the prefix anew: as the recipe keeps it, and to generate with, its weights left in their files.

    It comes from where the model came from, or from the model where that has changed since.
    """
    model, anatomy = (loaded.model, loaded.anatomy) if job.changes else (None, None)
    settings = job.config.prefix.model_copy(update={"placement": "disk"})
    on_disk = replace(job, config=job.config.model_copy(update={"prefix": settings}))

    def again() -> Prefix:
        if model is not None and anatomy is not None:
            return Prefix(model, anatomy, job.mask.boundary).to(job.world.device)
        prefix, _ = _halve(_afresh(job), job)
        assert prefix is not None  # it was cut before
        return prefix

    def lent() -> Prefix:
        if model is not None or not job.mask.boundary:
            return again()
        fresh = _afresh(on_disk)
        frozen = _take_out(fresh, job.mask, settings, job.world)
        assert frozen is not None  # a placement was asked for
        prefix = Prefix(fresh.model, fresh.anatomy, job.mask.boundary, frozen)
        _move(prefix, job.world.device)
        with torch.no_grad():
            frozen.place_weights(prefix.skeleton, settings.precision, "disk")
        return prefix

    return again, lent


def _afresh(job: CutJob) -> LoadedModel:
    """The model once more, as the recipe names it, with the job's mask.

    Raises:
        ModelError: its weights have changed since the run began.
    """
    fresh = load_for(job.config, job.tokenizer)
    if fingerprint(fresh.model, fresh.on_disk) != job.base.sha256:
        raise ModelError(
            f"the weights of {job.config.model.name_or_path} changed while the run read them; "
            "restore them and start the same command again"
        )
    apply_mask(fresh.model, job.mask, fresh.anatomy)
    fresh.model.train()
    return fresh


def _detach_from_file(suffix: Suffix, job: CutJob) -> Suffix:
    """The suffix on the device, in memory of its own: on a CPU its tensors would keep the whole checkpoint mapped."""
    suffix = suffix.to(job.world.device)
    if job.world.device.type == "cpu":
        for tensor in (*suffix.parameters(), *suffix.buffers()):
            tensor.data = tensor.data.clone()
    return suffix


def _halve(loaded: LoadedModel, job: CutJob) -> tuple[Prefix | None, Suffix]:
    """Split at the frost line if that is exact for this architecture; else keep the model whole, and say so."""
    model, mask, config, world = loaded.model, job.mask, job.config.prefix, job.world
    frozen = _take_out(loaded, mask, config, world)
    _move(model, world.device)
    prefix, suffix = split(model, loaded.anatomy, mask.boundary if mask.has_prefix else None, frozen)
    if prefix is None:
        return None, suffix
    exact = split_is_exact(model, prefix, suffix, collate([shortest(job.dataset.train)], pad_id=0).to(world.device))
    name, effect = type(model).__name__, "does not give the same logits when cut at block"
    if frozen is not None:
        if not exact:
            raise ModelError(
                f"{name} {effect} {mask.boundary}, so it has no prefix of its own to store otherwise; "
                "leave out prefix.precision and prefix.placement"
            )
        with torch.no_grad():
            frozen.place_weights(prefix.skeleton, config.precision, effective(config, world.device).placement)
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


def _move(module: nn.Module, device: torch.device) -> None:
    """Bring what has content to the device."""
    module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))  # type: ignore[no-untyped-call]


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
