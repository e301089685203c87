"""A model ready to be evaluated: cut at the frost line of a run, so that models above one prefix share its cache."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from toolkit.activation_cache.cached_prefix import CachedPrefix, HiddenStates
from toolkit.activation_cache.lower_line import best_lower_line, cached_lines_below
from toolkit.activation_cache.policy import (
    decide,
    open_store,
    prefix_fingerprints,
    read_split_check,
    save_split_check,
    settings_of_a_run,
    uncacheable_reason,
)
from toolkit.config.policy import refuse_cache
from toolkit.data.batches import Batch, collate
from toolkit.data.examples import Encoder
from toolkit.data.model_limits import padding_id
from toolkit.data.rows import Rows
from toolkit.inference.open_model import OpenedModel
from toolkit.models.float32_gradients import use_faster_forward
from toolkit.runtime.distributed import World
from toolkit.split.exactness import split_is_exact
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import Suffix, split

log = logging.getLogger("frostline")


@dataclass(frozen=True)
class CutModel:
    """Prefix and suffix of a model, with dropout off, on the device of this process."""

    suffix: Suffix
    prefix: HiddenStates | None
    """None if the suffix is the whole model."""
    encoder: Encoder
    pad_id: int
    world: World

    def close(self) -> None:
        """Close the activation cache, if there is one, and log what it did."""
        if isinstance(self.prefix, CachedPrefix):
            log.info("%s", self.prefix.close())


def cut_for_evaluation(
    opened: OpenedModel, boundary: int | None, examples: Rows, encoder: Encoder, models: int, world: World
) -> CutModel:
    """Cut a model where a prefix can be cached that several models share.

    The cache is that of the recipe's ``prefix`` section. It is used if it pays, as for training: if more than one model
    reads it, or it holds all rows already.

    Args:
        opened: the model.
        boundary: frost line of the run that it is, or is compared with; None for a model without a frozen prefix.
        examples: all that will be computed.
        encoder: encoder of the examples.
        models: number of models with this prefix.
        world: this process.
    """
    loaded = opened.loaded
    model = loaded.model.to(world.device).eval()
    use_faster_forward(model, world.device)
    pad_id = padding_id(loaded.tokenizer, model)
    short = collate([examples.shortest()], pad_id).to(world.device)
    found = None
    if boundary is not None and opened.config.prefix.cache != "off":
        found = _cached(opened, boundary, examples, short, models, world)
    prefix, suffix = found or (None, Suffix(model, loaded.anatomy, None))
    suffix.eval().choose_shortcuts(prefix(short) if prefix is not None else None, short)
    return CutModel(suffix, prefix, encoder, pad_id, world)


def _cached(
    opened: OpenedModel, boundary: int, examples: Rows, short: Batch, models: int, world: World
) -> tuple[CachedPrefix, Suffix] | None:
    """Cut the model, and return the prefix with its cache, which holds all examples; None if that cannot be or pay.

    If the cache holds them already, the prefix never runs.
    """
    loaded = opened.loaded
    # evaluation computes the prefix as it was loaded, however training stored it
    settings = settings_of_a_run(opened.config.prefix).model_copy(
        update={"precision": "model", "placement": "device", "cache": "auto"}
    )
    fingerprints = prefix_fingerprints(loaded, boundary, settings, world.device)
    store = open_store(settings, fingerprints, loaded.model, world)
    counts = read_split_check(store)
    if counts is not None and not store.lacking(examples.keys).any():
        log.info("activation cache: all rows are in %s; the prefix is not needed", store.directory)

        def load() -> Prefix:
            return Prefix(loaded.model, loaded.anatomy, boundary).eval()

        return CachedPrefix(None, load, load, store, world), Suffix(loaded.model, loaded.anatomy, boundary, counts)
    prefix, suffix = split(loaded.model, loaded.anatomy, boundary)
    assert prefix is not None
    reason: str | None = "this architecture cannot be cut"
    if split_is_exact(loaded.model, prefix, suffix, short):
        reason = uncacheable_reason(prefix, short.examples[0], store, world)
    decision = decide(settings, examples, models, store) if reason is None else refuse_cache(settings, reason)
    log.info("activation cache: %s", decision.reason if decision else "")
    if decision is None or not decision.on:
        store.close()
        return None
    frozen = prefix.eval()
    cached = CachedPrefix(frozen, lambda: frozen, lambda: frozen, store, world)
    lines = cached_lines_below(loaded, boundary, settings, store, world)
    with best_lower_line(lines, settings, loaded.model, frozen, store, examples, world) as lower:
        cached.fill(examples, lower=lower)
    save_split_check(store, prefix.block_output_counts())
    return cached, suffix
