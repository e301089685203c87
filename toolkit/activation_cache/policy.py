"""Decide whether a run caches its prefix, name what makes that impossible, and open the store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

import toolkit
from toolkit.activation_cache.eviction import cache_writer
from toolkit.activation_cache.namespace import Namespace, bytes_of, sample_key
from toolkit.activation_cache.store import ActivationStore
from toolkit.config.policy import Decision, decide_cache
from toolkit.config.schema import PrefixConfig
from toolkit.data.batches import collate
from toolkit.data.examples import Example
from toolkit.mask.layer_mask import LayerMask
from toolkit.models.bundled import cache_root
from toolkit.models.load import LoadedModel, fingerprint_of
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import ConfigError
from toolkit.runtime.paths import replace_text, sources_hash
from toolkit.split.prefix import Prefix

_NOTE = "split.json"

_COMPUTE = ("data/batches.py", "models", "split", "frozen", "activation_cache")
"""Sources of this package that have a say in what a prefix computes."""


@dataclass(frozen=True)
class CacheRequest:
    """Hold the samples that a run would cache."""

    settings: PrefixConfig
    examples: Sequence[Example]
    """Of training and validation."""
    passes: float
    """Over the training rows while the mask holds; see ``BatchPlan.passes``."""


def mask_obstacle(mask: LayerMask) -> str | None:
    """Return why this mask's prefix is no function of the data alone; None if it is."""
    if not mask.has_prefix:
        return "nothing below the trained tensors is frozen"
    if mask.tied == "head_only":
        return "mask.tied is head_only: the embeddings move with every step"
    return None


def limit_obstacle(settings: PrefixConfig, size: int) -> str | None:
    """Return why ``size`` bytes of samples exceed ``prefix.cache_limit_gib``; None if they do not."""
    limit = settings.cache_limit_gib
    if limit is None or size <= limit * 2**30:
        return None
    return f"the samples need {format_size(size)}, prefix.cache_limit_gib allows {limit:g} GiB"


def has_dropout(model: nn.Module) -> bool:
    """Return True if a module has a dropout of its own: a guess for plans, which run nothing (see ``unfit``)."""
    rates = [value for module in model.modules() for name, value in vars(module).items() if "dropout" in name]
    rates += [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def prefix_fingerprints(
    loaded: LoadedModel, boundary: int, settings: PrefixConfig, device: torch.device
) -> dict[str, str]:
    """Return everything that ``hidden[b]`` of a sample depends on beside its token ids, by name.

    Args:
        loaded: with its weights as they are when the prefix runs.
        boundary: b.
        settings: of the prefix.
        device: where it runs.
    """
    model, anatomy = loaded.model, loaded.anatomy
    above = {f"{anatomy.blocks}.{index}." for index in range(boundary, anatomy.block_count)}
    above |= {f"{module}." for module in (anatomy.norm, anatomy.head) if module}
    below = {
        name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if not name.startswith(tuple(above))
    }
    config = model.config.to_dict()
    for key in ("_name_or_path", "tie_word_embeddings", "use_cache"):  # they do not change what the prefix computes
        config.pop(key, None)
    sources = sources_hash(Path(toolkit.__file__).parent, *_COMPUTE)
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "frostline": f"{toolkit.__version__} (sources {sources})",
    }
    if settings.precision != "model":
        versions["bitsandbytes"] = metadata.version("bitsandbytes")
    return {
        "weights": fingerprint_of(below, loaded.on_disk),
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "architecture": type(model).__name__,
        "boundary": str(boundary),
        "attention": str(model.config._attn_implementation),
        "precision": settings.precision,
        "device": device.type,
        **versions,
    }


def open_store(
    settings: PrefixConfig, computed_by: Mapping[str, str], model: PreTrainedModel, world: World
) -> ActivationStore:
    """Open the store of hidden states of ``model``'s width and precision; every rank calls it.

    Args:
        settings: the recipe's prefix section.
        computed_by: as ``prefix_fingerprints`` returns it.
        model: whose prefix it is.
        world: all ranks.
    """
    limit = settings.cache_limit_gib
    namespace = Namespace(computed_by, int(model.config.get_text_config().hidden_size), model.dtype)
    limit_bytes = None if limit is None else int(limit * 2**30)
    return ActivationStore(cache_path(settings), namespace, limit_bytes, writer=cache_writer(world))


def cache_path(settings: PrefixConfig) -> Path:
    """Return where hidden states are kept: ``prefix.cache_dir``, else ``activations`` beside the converted models."""
    return Path(settings.cache_dir) if settings.cache_dir else cache_root() / "activations"


def note_split(store: ActivationStore, returned: Sequence[int | None]) -> None:
    """Save beside the activations that the cut was found exact and repeatable, and what the blocks returned.

    Where that cannot be written, the next run finds out anew.
    """
    with suppress(OSError):
        replace_text(store.directory / _NOTE, json.dumps({"returned": list(returned)}))


def noted_split(store: ActivationStore) -> list[int | None] | None:
    """Read what ``note_split`` saved; None where nothing can be read."""
    try:
        returned = json.loads((store.directory / _NOTE).read_text(encoding="utf-8"))["returned"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return returned if isinstance(returned, list) else None


def unfit(prefix: Prefix, example: Example, store: ActivationStore, world: World) -> str | None:
    """Return why this prefix's hidden states cannot be stored, or stored ones not be used; None if they can."""
    batch = collate([example], pad_id=0).to(world.device)
    state = torch.get_rng_state()
    prefix.train()
    training = [prefix(batch) for _ in range(2)]
    prefix.eval()
    evaluating = prefix(batch)
    prefix.train()
    torch.set_rng_state(state)
    if not all(torch.equal(hidden, evaluating) for hidden in training):
        return "the prefix gives other values each time (dropout or router noise)"
    form = (evaluating.shape[-1], evaluating.dtype)
    if form != (store.namespace.width, store.namespace.dtype):
        return f"the prefix gives {form[0]} values of {form[1]} a token, which its config does not say"
    return None


def decide_on_all_ranks(request: CacheRequest, store: ActivationStore, world: World) -> Decision:
    """Call ``decide`` on rank 0, for all, so that all ranks fill the cache or none.

    Raises:
        ConfigError: as ``decide``.
    """
    decision: Decision | ConfigError | None = None
    if world.is_main:
        try:
            decision = decide(request, store)
        except ConfigError as error:
            decision = error
    decision = world.broadcast_object(decision)
    if isinstance(decision, ConfigError):
        raise decision
    assert decision is not None
    return decision


def decide(request: CacheRequest, store: ActivationStore) -> Decision:
    """Decide whether caching pays and fits; ``toolkit.config.policy.decide_cache`` with what the store holds.

    Args:
        request: what is to be cached.
        store: what is there already.

    Raises:
        ConfigError: ``prefix.cache`` is ``on`` and the samples exceed the limit or the disk.
    """
    distinct = {sample_key(example.token_ids): len(example.token_ids) for example in request.examples}
    missing = [distinct[key] for key in store.missing(list(distinct))]
    width, dtype = store.namespace.width, store.namespace.dtype
    size = bytes_of(sum(distinct.values()), len(distinct), width, dtype)
    new = bytes_of(sum(missing), len(missing), width, dtype)
    obstacle, room = limit_obstacle(request.settings, size), store.available_bytes()
    if obstacle is None and new > room:
        obstacle = f"{format_size(new)} are to be written to {store.directory}, which has room for {format_size(room)}"
    decision = decide_cache(request.settings, obstacle, request.passes, is_complete=not missing)
    if not decision.on:
        return decision
    there = f"{len(distinct) - len(missing)} of {len(distinct)} samples are there"
    return Decision(True, f"{decision.reason}: {format_size(size)}, {there}, {store.directory}")


def format_size(count: float) -> str:
    """Return a number of bytes as people read it."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
