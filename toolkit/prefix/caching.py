"""Whether a run caches its prefix, and the reason, which is always said."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import nn

from toolkit import __version__
from toolkit.config.schema import ModelConfig, PrefixConfig
from toolkit.data.batches import Batch, collate
from toolkit.data.examples import Example
from toolkit.distributed import World
from toolkit.errors import ConfigError
from toolkit.models.bundled import cache_root
from toolkit.models.load import fingerprint
from toolkit.prefix.cached import CachedPrefix
from toolkit.prefix.split import Prefix
from toolkit.prefix.store import ActivationStore, Namespace, bytes_of, sample_key

log = logging.getLogger("frostline")

_SPARE = 2**30
"""Bytes of the disk that a cache leaves free."""


@dataclass(frozen=True)
class Decision:
    """Whether to cache, and why."""

    use: bool
    reason: str
    """As a phrase for the log."""
    size: int = 0
    """Bytes of all samples together."""
    new: int = 0
    """Bytes that are to be written, the others being there already."""


@dataclass(frozen=True)
class Request:
    """What a run would cache."""

    settings: PrefixConfig
    model: ModelConfig
    boundary: int
    examples: Sequence[Example]
    """Of training and validation."""
    passes: float
    """Over the training rows, as far as the run goes; 0.5 is half an epoch."""
    unfit: str | None = None
    """Why the mask or the architecture allows no cache, if so."""


def refusal(request: Request) -> str | None:
    """Why nothing is cached whatever the disk holds, or none.

    Raises:
        ConfigError: ``prefix.cache`` is ``on`` and the run has nothing that could be cached.
    """
    if request.settings.cache == "off":
        return "off, as the recipe says"
    if request.unfit is None:
        return None
    if request.settings.cache == "on":
        raise ConfigError([f"prefix.cache is on, but {request.unfit}; set it to auto or off"], "recipe")
    return f"off (auto: {request.unfit})"


def identity(prefix: Prefix, request: Request, device: torch.device) -> dict[str, str]:
    """Everything that ``hidden[b]`` of a sample depends on beside its token ids."""
    config = prefix.skeleton.config.to_dict()
    for key in ("_name_or_path", "tie_word_embeddings", "use_cache"):  # they do not change what the prefix computes
        config.pop(key, None)
    text = json.dumps(config, sort_keys=True, default=str)
    return {
        "weights": fingerprint(prefix.skeleton),
        "buffers": _digest_of_buffers(prefix.skeleton),
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "architecture": type(prefix.skeleton).__name__,
        "boundary": str(request.boundary),
        "dtype": request.model.dtype,
        "attention": str(prefix.skeleton.config._attn_implementation),
        "device": device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "frostline": __version__,
    }


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


def decide(request: Request, store: ActivationStore, width: int, free: int) -> Decision:
    """Whether caching pays and fits.

    Args:
        request: what is to be cached.
        store: what is there already.
        width: bytes of one token's hidden state.
        free: bytes of the disk that holds the store.

    Raises:
        ConfigError: ``prefix.cache`` is ``on`` and the samples exceed the limit or the disk.
    """
    distinct = {sample_key(example.token_ids): len(example.token_ids) for example in request.examples}
    missing = set(store.missing(list(distinct)))
    size = width * sum(distinct.values())
    new = width * sum(distinct[key] for key in missing)
    asked, limit = request.settings.cache == "on", request.settings.cache_limit_gib
    obstacle = None
    if limit is not None and size > limit * 2**30:
        obstacle = f"all samples need {_size(size)}, prefix.cache_limit_gib allows {limit:g} GiB"
    elif new + _SPARE > free:
        obstacle = f"{_size(new)} are to be written, and {_size(free)} are free at prefix.cache_dir ({_size(_SPARE)} stay free)"
    if obstacle and asked:
        raise ConfigError([f"prefix.cache is on, but {obstacle}; make room, or set it to auto or off"], "recipe")
    if obstacle:
        return Decision(False, f"off (auto: {obstacle})", size, new)
    if not asked and request.passes <= 1 and missing:
        return Decision(False, "off (auto: one pass over the rows reads nothing twice)", size, new)
    there = len(distinct) - len(missing)
    return Decision(True, f"{'on' if asked else 'on (auto)'}, {there} of {len(distinct)} samples there, {_size(size)}", size, new)


def open_cached(
    prefix: Prefix, load: Callable[[], Prefix], request: Request, row_bytes: int, world: World
) -> Prefix | CachedPrefix:
    """``prefix`` behind a filled cache, or as it is where caching does not pay or fit; every rank calls it.

    Args:
        prefix: on its device.
        load: gives it again.
        request: what is to be cached.
        row_bytes: bytes of one token's hidden state.
        world: all ranks of the run.

    Raises:
        ConfigError: ``prefix.cache`` is ``on`` and that is not possible.
    """
    reason = refusal(request)
    if reason is None and not repeats(prefix, request.examples[0], world.device):
        reason = refusal(replace(request, unfit="the prefix gives other values each time (dropout or router noise)"))
    if reason is None:
        root = Path(request.settings.cache_dir or cache_root() / "activations")
        namespace = Namespace(world.share(identity(prefix, request, world.device) if world.is_main else None))
        limit = request.settings.cache_limit_gib
        store = ActivationStore(root, namespace, None if limit is None else int(limit * 2**30))
        decision = _decide_together(request, store, row_bytes, root, world)
        if decision.use:
            log.info("activation cache: %s, in %s", decision.reason, store.directory)
            cached = CachedPrefix(prefix, load, store, world)
            cached.fill(request.examples)
            return cached
        store.close()
        reason = decision.reason
    log.info("activation cache: %s", reason)
    return prefix


def _decide_together(
    request: Request, store: ActivationStore, row_bytes: int, root: Path, world: World
) -> Decision:
    """Rank 0 decides for all, so that all fill or none."""
    decision: Decision | ConfigError | None = None
    if world.is_main:
        try:
            decision = decide(request, store, row_bytes, shutil.disk_usage(root).free)
        except ConfigError as error:
            decision = error
    decision = world.share(decision)
    if isinstance(decision, ConfigError):
        raise decision
    assert decision is not None
    return decision


def _digest_of_buffers(module: nn.Module) -> str:
    """SHA-256 of what a checkpoint holds beside parameters."""
    names = dict(module.named_parameters(remove_duplicate=False))
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name not in names:
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
