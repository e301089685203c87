"""Whether a run caches its prefix, and the reason, which is always said."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from toolkit import __version__
from toolkit.config.schema import PrefixConfig
from toolkit.data.batches import collate
from toolkit.data.examples import Example
from toolkit.distributed import World
from toolkit.errors import ConfigError
from toolkit.files import replace_text
from toolkit.models.anatomy import Anatomy
from toolkit.models.bundled import cache_root
from toolkit.models.load import fingerprint_of
from toolkit.prefix.split import Prefix
from toolkit.prefix.store import ActivationStore, Namespace, sample_key

_SPARE = 2**30
"""Bytes of the disk that a cache leaves free."""

_NOTE = "split.json"


@dataclass(frozen=True)
class Request:
    """What a run would cache."""

    settings: PrefixConfig
    boundary: int
    examples: Sequence[Example]
    """Of training and validation."""
    passes: float
    """Over the training rows, as far as the run goes; 0.5 is half an epoch."""
    token_bytes: int
    """Of one token's hidden state."""


@dataclass(frozen=True)
class Decision:
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


def identity(model: PreTrainedModel, anatomy: Anatomy, boundary: int, device: torch.device) -> dict[str, str]:
    """Everything that ``hidden[b]`` of a sample depends on beside its token ids.

    Args:
        model: with its weights as they are when the prefix runs.
        anatomy: its parts.
        boundary: b.
        device: where the prefix runs.
    """
    above = {f"{anatomy.blocks}.{index}." for index in range(boundary, anatomy.block_count)}
    above |= {f"{module}." for module in (anatomy.norm, anatomy.head) if module}
    below = {
        name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if not name.startswith(tuple(above))
    }
    config = model.config.to_dict()
    for key in ("_name_or_path", "tie_word_embeddings", "use_cache"):  # they do not change what the prefix computes
        config.pop(key, None)
    return {
        "weights": fingerprint_of(below),
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "architecture": type(model).__name__,
        "boundary": str(boundary),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": str(model.config._attn_implementation),
        "device": device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "frostline": __version__,
    }


def open_store(settings: PrefixConfig, computed_by: dict[str, str]) -> ActivationStore:
    """The store of what ``identity`` describes."""
    limit = settings.cache_limit_gib
    return ActivationStore(cache_path(settings), Namespace(computed_by), None if limit is None else int(limit * 2**30))


def cache_path(settings: PrefixConfig) -> Path:
    """Where hidden states are kept: ``prefix.cache_dir``, else ``activations`` beside the converted models."""
    return Path(settings.cache_dir) if settings.cache_dir else cache_root() / "activations"


def note_split(store: ActivationStore, returned: Sequence[int | None]) -> None:
    """Remember beside the activations that the cut was found exact and repeatable, and what the blocks returned."""
    replace_text(store.directory / _NOTE, json.dumps({"returned": list(returned)}))


def noted_split(store: ActivationStore) -> list[int | None] | None:
    """What ``note_split`` remembered; none where nothing can be read."""
    try:
        returned = json.loads((store.directory / _NOTE).read_text(encoding="utf-8"))["returned"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return returned if isinstance(returned, list) else None


def repeats(prefix: Prefix, example: Example, device: torch.device) -> bool:
    """True if the prefix gives the same bits in training and in evaluation mode: no dropout, no router noise."""
    batch = collate([example], pad_id=0).to(device)
    state = torch.get_rng_state()
    prefix.train()
    training = [prefix(batch) for _ in range(2)]
    prefix.eval()
    evaluating = prefix(batch)
    prefix.train()
    torch.set_rng_state(state)
    return all(torch.equal(hidden, evaluating) for hidden in training)


def decide_together(request: Request, store: ActivationStore, world: World) -> Decision:
    """``decide`` on rank 0, for all, so that all ranks fill the cache or none.

    Raises:
        ConfigError: as ``decide``.
    """
    decision: Decision | ConfigError | None = None
    if world.is_main:
        try:
            decision = decide(request, store, shutil.disk_usage(store.directory).free)
        except ConfigError as error:
            decision = error
    decision = world.share(decision)
    if isinstance(decision, ConfigError):
        raise decision
    assert decision is not None
    return decision


def decide(request: Request, store: ActivationStore, free: int) -> Decision:
    """Whether caching pays and fits.

    Args:
        request: what is to be cached.
        store: what is there already.
        free: bytes of the disk that holds the store.

    Raises:
        ConfigError: ``prefix.cache`` is ``on`` and the samples exceed the limit or the disk.
    """
    distinct = {sample_key(example.token_ids): len(example.token_ids) for example in request.examples}
    missing = set(store.missing(list(distinct)))
    size = request.token_bytes * sum(distinct.values())
    new = request.token_bytes * sum(distinct[key] for key in missing)
    asked, limit = request.settings.cache == "on", request.settings.cache_limit_gib
    obstacle = None
    if limit is not None and size > limit * 2**30:
        obstacle = f"the samples need {format_size(size)}, prefix.cache_limit_gib allows {limit:g} GiB"
    elif new + _SPARE > free and missing:
        obstacle = (
            f"{format_size(new)} are to be written to {store.directory}, where {format_size(free)} are free and "
            f"{format_size(_SPARE)} are to stay free"
        )
    if obstacle:
        reason = refusal(request.settings, obstacle)
        return Decision(False, reason or "")
    if not asked and request.passes <= 1 and missing:
        return Decision(False, "off (auto: one pass over the rows reads nothing twice)")
    there = f"{len(distinct) - len(missing)} of {len(distinct)} samples are there"
    return Decision(
        True, f"{'on, as the recipe says' if asked else 'on (auto)'}: {format_size(size)}, {there}, {store.directory}"
    )


def format_size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
