"""Whether a run caches its prefix, and the reason, which is always said."""

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
    """What a run would cache."""

    settings: PrefixConfig
    examples: Sequence[Example]
    """Of training and validation."""
    passes: float
    """Over the training rows, as far as the run goes; 0.5 is half an epoch."""


@dataclass(frozen=True)
class CacheDecision:
    """Whether to cache, and why."""

    use: bool
    reason: str
    """As a phrase for the log."""


def refusal(settings: PrefixConfig, obstacle: str | None) -> str | None:
    """Why nothing is cached, as a phrase for the log; none if nothing stands against it.

    Args:
        settings: the recipe's prefix section.
        obstacle: what makes a cache impossible, if anything does.

    Raises:
        ConfigError: ``prefix.cache`` is ``on`` and there is an obstacle.
    """
    if settings.cache == "off":
        return "off, as the recipe says"
    if obstacle is None:
        return None
    if settings.cache == "on":
        raise ConfigError([f"prefix.cache is on, but {obstacle}; set it to auto or off"], "recipe")
    return f"off (auto: {obstacle})"


def mask_obstacle(mask: LayerMask) -> str | None:
    """Why this mask's prefix is no function of the data alone, if so."""
    if not mask.has_prefix:
        return "nothing below the trained tensors is frozen"
    if mask.tied == "head_only":
        return "mask.tied is head_only: the embeddings move with every step"
    return None


def drops_out(model: nn.Module) -> bool:
    """True if a module has a dropout of its own; a guess for plans, where nothing can be run (see ``unfit``)."""
    rates = [value for module in model.modules() for name, value in vars(module).items() if "dropout" in name]
    rates += [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def prefix_fingerprints(
    loaded: LoadedModel, boundary: int, settings: PrefixConfig, device: torch.device
) -> dict[str, str]:
    """Everything that ``hidden[b]`` of a sample depends on beside its token ids.

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
    """Where hidden states are kept: ``prefix.cache_dir``, else ``activations`` beside the converted models."""
    return Path(settings.cache_dir) if settings.cache_dir else cache_root() / "activations"


def note_split(store: ActivationStore, returned: Sequence[int | None]) -> None:
    """Remember beside the activations that the cut was found exact and repeatable, and what the blocks returned.

    Where that cannot be written, the next run finds out anew.
    """
    with suppress(OSError):
        replace_text(store.directory / _NOTE, json.dumps({"returned": list(returned)}))


def noted_split(store: ActivationStore) -> list[int | None] | None:
    """What ``note_split`` remembered; none where nothing can be read."""
    try:
        returned = json.loads((store.directory / _NOTE).read_text(encoding="utf-8"))["returned"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return returned if isinstance(returned, list) else None


def unfit(prefix: Prefix, example: Example, store: ActivationStore, world: World) -> str | None:
    """Why this prefix's hidden states cannot be stored, or stored ones not be used; none if they can."""
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


def decide_on_all_ranks(request: CacheRequest, store: ActivationStore, world: World) -> CacheDecision:
    """``decide`` on rank 0, for all, so that all ranks fill the cache or none.

    Raises:
        ConfigError: as ``decide``.
    """
    decision: CacheDecision | ConfigError | None = None
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


def decide(request: CacheRequest, store: ActivationStore) -> CacheDecision:
    """Whether caching pays and fits.

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
    asked, limit, room = request.settings.cache == "on", request.settings.cache_limit_gib, store.available_bytes()
    obstacle = None
    if limit is not None and size > limit * 2**30:
        obstacle = f"the samples need {format_size(size)}, prefix.cache_limit_gib allows {limit:g} GiB"
    elif new > room:
        obstacle = f"{format_size(new)} are to be written to {store.directory}, which has room for {format_size(room)}"
    if obstacle:
        reason = refusal(request.settings, obstacle)
        return CacheDecision(False, reason or "")
    if not asked and request.passes <= 1 and missing:
        return CacheDecision(False, "off (auto: one pass over the rows reads nothing twice)")
    there = f"{len(distinct) - len(missing)} of {len(distinct)} samples are there"
    return CacheDecision(
        True, f"{'on, as the recipe says' if asked else 'on (auto)'}: {format_size(size)}, {there}, {store.directory}"
    )


def format_size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
