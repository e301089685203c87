"""A model ready to be evaluated: cut at the frost line of a run, so that models above one prefix share its cache."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from toolkit.activation_cache.cached_prefix import CachedPrefix, HiddenStates
from toolkit.activation_cache.policy import decide, open_store, prefix_fingerprints, uncacheable_reason
from toolkit.data.batches import collate
from toolkit.data.examples import Encoder, Example
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
    short = examples.shortest()
    batch = collate([short], pad_id).to(world.device)
    prefix: Prefix | None = None
    suffix = Suffix(model, loaded.anatomy, None)
    if boundary is not None and opened.config.prefix.cache != "off":
        prefix, cut = split(model, loaded.anatomy, boundary)
        if prefix is not None and split_is_exact(model, prefix, cut, batch):
            cached = _cached(opened, boundary, prefix, examples, short, models, world)
            if cached is not None:
                cut.eval().choose_shortcuts(prefix.eval()(batch), batch)
                return CutModel(cut, cached, encoder, pad_id, world)
    suffix.eval().choose_shortcuts(None, batch)
    return CutModel(suffix, None, encoder, pad_id, world)


def _cached(
    opened: OpenedModel, boundary: int, prefix: Prefix, examples: Rows, short: Example, models: int,
    world: World,
) -> CachedPrefix | None:  # fmt: skip
    """Return the prefix with its cache, which holds all examples; None if it does not pay or cannot be."""
    # evaluation holds the prefix as it was loaded, however training stored it
    settings = opened.config.prefix.model_copy(update={"precision": "model", "placement": "device"})
    fingerprints = prefix_fingerprints(opened.loaded, boundary, settings, world.device)
    store = open_store(settings, fingerprints, opened.loaded.model, world)
    if (reason := uncacheable_reason(prefix, short, store, world)) is None:
        decision = decide(settings.model_copy(update={"cache": "auto"}), examples, models, store)
        if decision.on:
            log.info("activation cache: %s", decision.reason)
            cached = CachedPrefix(prefix.eval(), lambda: prefix, lambda: prefix, store, world)
            cached.fill(examples)
            return cached
        reason = decision.reason
    log.info("activation cache: %s", reason)
    store.close()
    return None
