"""Cut a loaded model at the frost line and put the prefix behind its cache."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from toolkit.config.schema import RunConfig
from toolkit.data.batches import collate
from toolkit.data.dataset import Dataset
from toolkit.data.examples import Example
from toolkit.delta import Base
from toolkit.distributed import World
from toolkit.errors import ModelError
from toolkit.mask.layer_mask import LayerMask
from toolkit.models.load import LoadedModel, fingerprint, load
from toolkit.prefix.cached import CachedPrefix
from toolkit.prefix.caching import (
    Request,
    decide_together,
    identity,
    note_split,
    noted_split,
    open_store,
    refusal,
    repeats,
)
from toolkit.prefix.split import Prefix, Suffix, split, split_is_exact
from toolkit.prefix.store import ActivationStore, sample_key

log = logging.getLogger("frostline")

HiddenStates = Prefix | CachedPrefix
"""What gives ``hidden[b]`` of a batch."""


@dataclass(frozen=True)
class Job:
    """What the cut of one mask serves."""

    config: RunConfig
    mask: LayerMask
    base: Base
    dataset: Dataset
    passes: float
    """Over the training rows while this mask holds."""
    world: World
    weights_change: bool = False
    """The mask changes during the run: the prefix is not always that of the base model, and may be cut again."""

    @property
    def examples(self) -> tuple[Example, ...]:
        """All samples of the run."""
        return (*self.dataset.train, *self.dataset.validation)


def cut(loaded: LoadedModel, job: Job) -> tuple[HiddenStates | None, Suffix]:
    """The two halves of ``loaded`` on their device, the prefix behind its cache where that pays.

    An architecture that cannot be cut exactly stays whole, in a suffix without a prefix, and the log says so. If the
    cache holds all samples, no block of the prefix runs, and no tensor of it goes to the device.

    Raises:
        ConfigError: ``prefix.cache`` is ``on`` and the run cannot have one.
    """
    settings = job.config.prefix
    loaded.model.train()
    reason = refusal(settings, _obstacle(job.mask))
    store = _open(loaded, job) if reason is None else None
    if store is not None and (returned := _complete(store, job)) is not None:
        log.info("activation cache: all samples are in %s; the prefix is not needed", store.directory)
        suffix = Suffix(loaded.model, loaded.anatomy, job.mask.boundary, returned)
        return CachedPrefix(None, _loader(job), store, job.world), _detach_from_file(suffix, job)
    prefix, suffix = _halve(loaded, job)
    if store is not None:
        cached, reason = _fill(prefix, store, job)
        if cached is not None:
            if not job.weights_change and cached.release(job.examples):
                suffix = _detach_from_file(suffix, job)
            return cached, suffix
        store.close()
    log.info("activation cache: %s", reason)
    return prefix, suffix


def _halve(loaded: LoadedModel, job: Job) -> tuple[Prefix | None, Suffix]:
    """Split at the frost line if that is exact for this architecture; else keep the model whole, and say so."""
    model, mask = loaded.model.to(job.world.device), job.mask
    prefix, suffix = split(model, loaded.anatomy, mask.boundary if mask.has_prefix else None)
    if prefix is None:
        return None, suffix
    shortest = min(job.dataset.train, key=lambda example: len(example.token_ids))
    if split_is_exact(model, prefix, suffix, collate([shortest], pad_id=0).to(job.world.device)):
        return prefix, suffix
    log.warning(
        "%s does not give the same logits when cut at block %d; training goes on with the whole model: "
        "the same result, but the frozen blocks run inside it",
        type(model).__name__,
        mask.boundary,
    )
    _, suffix = split(model, loaded.anatomy, None)
    if mask.tied == "head_only":
        suffix.detach_embeddings(loaded.anatomy)
    return None, suffix


def _obstacle(mask: LayerMask) -> str | None:
    """Why this mask's prefix is no function of the data alone, if so."""
    if not mask.has_prefix:
        return "nothing below the trained tensors is frozen"
    if mask.tied == "head_only":
        return "mask.tied is head_only: the embeddings move with every step"
    return None


def _open(loaded: LoadedModel, job: Job) -> ActivationStore:
    computed_by = None
    if job.world.is_main:
        computed_by = identity(loaded.model, loaded.anatomy, job.mask.boundary, job.world.device)
    return open_store(job.config.prefix, job.world.share(computed_by))


def _complete(store: ActivationStore, job: Job) -> list[int | None] | None:
    """What the blocks return, if every rank finds every sample in the store."""
    returned = noted_split(store)
    lacking = returned is None or bool(store.missing([sample_key(example.token_ids) for example in job.examples]))
    return None if job.world.max(float(lacking)) else returned


def _fill(prefix: Prefix | None, store: ActivationStore, job: Job) -> tuple[CachedPrefix | None, str | None]:
    """The prefix behind a cache that all ranks have filled; or none, and why not."""
    settings, world = job.config.prefix, job.world
    if prefix is None:
        return None, refusal(settings, "this architecture cannot be cut")
    if not repeats(prefix, job.dataset.train[0], world.device):
        return None, refusal(settings, "the prefix gives other values each time (dropout or router noise)")
    token_bytes = _token_bytes(prefix)
    decision = decide_together(Request(settings, job.mask.boundary, job.examples, job.passes, token_bytes), store, world)
    if not decision.use:
        return None, decision.reason
    log.info("activation cache: %s", decision.reason)
    cached = CachedPrefix(prefix, _loader(job), store, world)
    cached.fill(job.examples)
    if world.is_main:
        note_split(store, prefix.returned())
    return cached, None


def _token_bytes(prefix: Prefix) -> int:
    config = prefix.skeleton.config.get_text_config()
    return int(config.hidden_size) * prefix.skeleton.dtype.itemsize


def _loader(job: Job) -> Callable[[], Prefix]:
    """Gives the prefix anew, from where the model came from."""

    def again() -> Prefix:
        loaded = load(job.config.model)
        if fingerprint(loaded.model) != job.base.sha256:
            raise ModelError(
                f"the weights of {job.config.model.name_or_path} changed while the run read them; "
                "restore them and start the same command again"
            )
        loaded.model.train()
        return Prefix(loaded.model, loaded.anatomy, job.mask.boundary).to(job.world.device)

    return again


def _detach_from_file(suffix: Suffix, job: Job) -> Suffix:
    """The suffix on the device, in memory of its own: on a CPU its tensors would keep the whole checkpoint mapped."""
    suffix = suffix.to(job.world.device)
    if job.world.device.type == "cpu":
        for tensor in (*suffix.parameters(), *suffix.buffers()):
            tensor.data = tensor.data.clone()
    return suffix
