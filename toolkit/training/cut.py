"""Cut the model at the frost line; quantise, offload and cache the prefix as the recipe asks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import nn

from toolkit.activation_cache.cached_prefix import FILL_TOKENS, CachedPrefix, HiddenStates
from toolkit.activation_cache.lower_line import Line, best_lower_line, cached_lines_below
from toolkit.activation_cache.policy import (
    decide,
    mask_obstacle,
    open_store,
    prefix_fingerprints,
    read_split_check,
    save_split_check,
    uncacheable_reason,
)
from toolkit.activation_cache.store import ActivationStore
from toolkit.checkpoint.base_identity import TO_COMPUTE, computing_parts, differences
from toolkit.config.policy import Decision, refuse_cache
from toolkit.config.schema import PrefixConfig
from toolkit.data.batches import collate
from toolkit.frozen.weight_offload import FrozenWeights
from toolkit.mask.apply import apply_mask
from toolkit.mask.layer_mask import LayerMask
from toolkit.mask.schedule import Phase
from toolkit.models.load import LoadedModel
from toolkit.models.weight_fingerprint import fingerprint
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import ConfigError, ModelError, PlanError
from toolkit.split.exactness import split_is_exact
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import Suffix, split
from toolkit.training.context import RunContext
from toolkit.training.gradient_choice import apply_choice
from toolkit.training.loading import effective_prefix, load_for_training

log = logging.getLogger("frostline")


def cut(context: RunContext, loaded: LoadedModel, phase: Phase) -> tuple[HiddenStates | None, Suffix]:
    """Cut the model at the frost line of ``phase``; return prefix, cached if that pays, and suffix on their device.

    An architecture that cannot be cut exactly stays whole, with a warning: the prefix is None, the suffix the whole
    model. If the cache holds all samples, the prefix never runs and its weights are not moved to the device.

    Raises:
        ConfigError: the recipe quantises, offloads or caches a prefix, and the mask leaves none that allows it.
        ModelError: the recipe quantises or offloads a prefix, and this architecture cannot be cut or quantised.
    """
    settings = context.config.prefix
    loaded.model.train()
    decision = refuse_cache(settings, mask_obstacle(phase.mask))
    store = _open_cache(context, loaded, phase) if decision is None else None
    if store is not None and (output_counts := _cached_output_counts(store, context)) is not None:
        log.info("activation cache: all samples are in %s; the prefix is not needed", store.directory)
        suffix = Suffix(loaded.model, loaded.anatomy, phase.mask.boundary, output_counts)
        cached = CachedPrefix(None, *_prefix_loaders(context, loaded, phase), store, context.world)
        suffix = _detach_from_file(suffix, context.world.device)
        if context.schedule.rotation is not None:
            _free_prefix_weights(loaded, phase.mask.boundary, suffix)
        return cached, suffix
    lines: list[Line] = []
    if store is not None:
        lines = cached_lines_below(loaded, phase.mask.boundary, settings, store, context.world)
    prefix, suffix = _split(context, loaded, phase)
    if prefix is not None and context.schedule.rotation is not None:
        _free_prefix_weights(loaded, phase.mask.boundary, suffix)
    if store is not None:
        filled, decision = _fill_cache(context, loaded, phase, prefix, store, lines)
        if filled is not None:
            if not context.schedule.moves_line and filled.release(context.examples):
                suffix = _detach_from_file(suffix, context.world.device)
            return filled, suffix
        store.close()
    log.info("activation cache: %s", decision.reason if decision else "")
    return prefix, suffix


def _open_cache(context: RunContext, loaded: LoadedModel, phase: Phase) -> ActivationStore:
    """Open the activation cache of this prefix, keyed by fingerprints that rank 0 computes; every rank calls it."""
    settings, world = context.config.prefix, context.world
    fingerprints = world.on_main(lambda: prefix_fingerprints(loaded, phase.mask.boundary, settings, world.device))
    return open_store(settings, fingerprints, loaded.model, world)


def _cached_output_counts(store: ActivationStore, context: RunContext) -> list[int | None] | None:
    """Return ``Prefix.block_output_counts`` from the store, if it holds all samples on every rank.

    None if some rank lacks a sample or the counts; every rank calls it.
    """
    output_counts = read_split_check(store)
    is_incomplete = output_counts is None or bool(store.lacking(context.examples.keys).any())
    return None if context.world.max(float(is_incomplete)) else output_counts


def _fill_cache(
    context: RunContext, loaded: LoadedModel, phase: Phase, prefix: Prefix | None, store: ActivationStore,
    lines: Sequence[Line],
) -> tuple[CachedPrefix | None, Decision | None]:  # fmt: skip
    """Fill the cache on all ranks and return the cached prefix; or return None and the decision against it.

    ``lines`` are the ``cached_lines_below``.
    """
    settings, world = context.config.prefix, context.world
    obstacle = (
        "this architecture cannot be cut"
        if prefix is None
        else uncacheable_reason(prefix, context.examples[0], store, world)
    )
    if world.max(float(obstacle is not None)) and obstacle is None:
        obstacle = "another rank found that it cannot be"
    if prefix is None or obstacle:
        return None, refuse_cache(settings, obstacle)
    passes = context.passes(phase)
    passes *= (context.config.data.folds or 1) * context.shared_by  # folds, and other runs, read the same cache
    decision = world.on_main(lambda: decide(settings, context.examples, passes, store))
    if not decision.on:
        return None, decision
    log.info("activation cache: %s; filling it", decision.reason)
    cached = CachedPrefix(prefix, *_prefix_loaders(context, loaded, phase), store, world)
    with best_lower_line(lines, settings, loaded.model, prefix, store, context.examples, world) as lower:
        cached.fill(context.examples, _fill_tokens(context, phase), lower)
    if world.local_rank == 0:  # nodes may have separate disks
        save_split_check(store, prefix.block_output_counts())
    return cached, None


def _fill_tokens(context: RunContext, phase: Phase) -> int:
    """Return the tokens of a batch of the first pass, as the plan has them."""
    if context.planners:
        planner = context.planners[context.planned_as(phase)]
        with suppress(PlanError):
            return planner.fill_tokens(planner.variant(context.engine_spec, checkpointing=False))
    return FILL_TOKENS


def _prefix_loaders(
    context: RunContext, loaded: LoadedModel, phase: Phase
) -> tuple[Callable[[], Prefix], Callable[[], Prefix]]:
    """Return two functions that load a freed prefix again: as the recipe places it, and offloaded to disk to generate.

    Both read the base model's files; under a mask schedule, where training may have changed the prefix, they use the
    model in memory instead.
    """
    model, anatomy = (loaded.model, loaded.anatomy) if context.schedule.moves_line else (None, None)
    settings = context.config.prefix.model_copy(update={"placement": "disk"})
    on_disk = replace(context, config=context.config.model_copy(update={"prefix": settings}))

    def load() -> Prefix:
        if model is not None and anatomy is not None:
            return Prefix(model, anatomy, phase.mask.boundary).to(context.world.device)
        prefix, _ = _split(context, _reload_base(context, phase), phase)
        assert prefix is not None  # it was cut before
        return prefix

    def load_offloaded() -> Prefix:
        if model is not None or not phase.mask.boundary:
            return load()
        fresh = _reload_base(on_disk, phase)
        frozen = _frozen_weights(fresh, phase.mask, settings, context.world)
        assert frozen is not None  # a placement was asked for
        prefix = Prefix(fresh.model, fresh.anatomy, phase.mask.boundary, frozen)
        _move_to_device(prefix, context.world.device)
        with torch.no_grad():
            frozen.place_weights(prefix.model, settings.precision, "disk")
        return prefix

    return load, load_offloaded


def _reload_base(context: RunContext, phase: Phase) -> LoadedModel:
    """Load the base model again, with the mask of ``phase``.

    Raises:
        ModelError: its weights have changed since the run began.
    """
    fresh = load_for_training(context.config, context.tokenizer)
    is_other = fingerprint(fresh.model, fresh.on_disk) != context.base.sha256
    if is_other or differences(context.base.identity, computing_parts(fresh.model), TO_COMPUTE):
        raise ModelError(
            f"weights, config.json or code of {context.config.model.name_or_path} changed while the run read them; "
            "restore them and start the same command again"
        )
    apply_choice(fresh.model, context.gradients)
    apply_mask(fresh.model, phase.mask, fresh.anatomy, context.config.train.seed)
    fresh.model.train()
    return fresh


def _detach_from_file(suffix: Suffix, device: torch.device) -> Suffix:
    """Move the suffix to the device; on a CPU clone its tensors, which would keep the whole weight file mapped.

    Tensors stay the same objects: the model's other copies share them, and buffers may be large (quantised layers).
    """
    for tensor in (*suffix.parameters(), *suffix.buffers()):
        tensor.data = tensor.data.clone() if device.type == "cpu" else tensor.data.to(device)
    return suffix


def _free_prefix_weights(loaded: LoadedModel, boundary: int, suffix: Suffix) -> None:
    """Take the weights below the frost line out of a model that is kept to be cut again.

    A prefix has parameters of its own on the same storage, and ``suffix`` may share some.
    """
    above = {id(parameter) for parameter in suffix.parameters()}
    anatomy = loaded.anatomy
    for name in (*anatomy.embeddings, *(f"{anatomy.blocks}.{index}" for index in range(boundary))):
        for module in loaded.model.get_submodule(name).modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in above:
                    module._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _split(context: RunContext, loaded: LoadedModel, phase: Phase) -> tuple[Prefix | None, Suffix]:
    """Split at the frost line if that is exact for this architecture; else keep the model whole, and warn.

    With a quantised or offloaded prefix, an inexact split is a ModelError.
    """
    model, mask, config, world = loaded.model, phase.mask, context.config.prefix, context.world
    frozen = _frozen_weights(loaded, mask, config, world)
    _move_to_device(model, world.device)
    prefix, suffix = split(model, loaded.anatomy, mask.boundary if mask.has_prefix else None, frozen)
    if prefix is None:
        return None, suffix
    row = collate([context.dataset.train.shortest()], pad_id=0).to(world.device)
    exact = split_is_exact(model, prefix, suffix, row)
    name, effect = type(model).__name__, "does not give the same logits when cut at block"
    if frozen is not None:
        if not exact:
            raise ModelError(
                f"{name} {effect} {mask.boundary}, so it has no prefix of its own to store otherwise; "
                "leave out prefix.precision and prefix.placement"
            )
        with torch.no_grad():
            frozen.place_weights(prefix.model, config.precision, effective_prefix(config, world.device).placement)
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
        suffix.detach_embeddings()
    return None, suffix


def _move_to_device(module: nn.Module, device: torch.device) -> None:
    """Move all tensors to the device except meta tensors, which ``nn.Module.to`` refuses."""
    module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))  # type: ignore[no-untyped-call]


def _frozen_weights(loaded: LoadedModel, mask: LayerMask, config: PrefixConfig, world: World) -> FrozenWeights | None:
    """Return the handle of the weights below the frost line if the recipe quantises or offloads them, else None."""
    effective = effective_prefix(config, world.device)
    if effective != config:
        log.info("prefix.placement: cpu changes nothing here: the run computes on the CPU, where the weights are")
    if (effective.precision, effective.placement) == ("model", "device"):
        return None
    if mask.boundary == 0:
        raise ConfigError(
            [
                f"prefix.{key} is {value!r}, but the mask leaves no block frozen below what trains (the frost line is "
                "at block 0); leave the key out, or let mask.train begin higher"
                for key, value in (("precision", config.precision), ("placement", config.placement))
                if value not in ("model", "device")
            ],
            "recipe, read against the mask",
        )
    anatomy = loaded.anatomy
    blocks = [f"{anatomy.blocks}.{index}" for index in range(mask.boundary)]
    embeddings = anatomy.embeddings if effective.placement != "device" else ()
    return FrozenWeights(loaded.model, blocks, embeddings, world.device, loaded.on_disk)
