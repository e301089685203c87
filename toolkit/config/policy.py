"""Decisions that a plan and a run both take, so that both take the same. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from toolkit.config.schema import PrefixConfig
from toolkit.runtime.errors import ConfigError

Mode = Literal["auto", "on", "off"]
"""How a recipe asks for something that is switched on or off."""

_GIB = 2**30


@dataclass(frozen=True)
class Decision:
    """Hold whether a feature is on, and why."""

    on: bool
    reason: str
    """As a phrase for the log."""


def global_batch(micro_batch_size: int, accumulation: int, ranks: int) -> int:
    """Return the rows of one optimizer step over all ranks."""
    return micro_batch_size * accumulation * ranks


def refuse_cache(settings: PrefixConfig, obstacle: str | None) -> Decision | None:
    """Return the decision not to cache; None if neither the recipe nor an obstacle stands against it.

    Args:
        settings: the recipe's prefix section.
        obstacle: what makes a cache impossible, if anything does.

    Raises:
        ConfigError: ``prefix.cache`` is ``on`` and there is an obstacle.
    """
    if settings.cache == "off":
        return Decision(False, "off, as the recipe says")
    if obstacle is None:
        return None
    if settings.cache == "on":
        raise ConfigError([f"prefix.cache is on, but {obstacle}; set it to auto or off"], "recipe")
    return Decision(False, f"off (auto: {obstacle})")


def decide_cache(settings: PrefixConfig, obstacle: str | None, passes: float, is_complete: bool = False) -> Decision:
    """Decide whether the prefix's hidden states are cached.

    Args:
        settings: the recipe's prefix section.
        obstacle: what makes a cache impossible, if anything does.
        passes: over the training rows while the mask holds; 0.5 is half an epoch.
        is_complete: the cache holds every sample already, so that a single pass reads from it.

    Raises:
        ConfigError: as ``refuse_cache``.
    """
    if refused := refuse_cache(settings, obstacle):
        return refused
    if settings.cache == "on":
        return Decision(True, "on, as the recipe says")
    if passes <= 1 and not is_complete:
        return Decision(False, "off (auto: one pass over the rows reads nothing twice)")
    return Decision(True, "on (auto)")


def refuse_packing(mode: Mode, micro_batch_size: int, lengths: Collection[int] | None) -> Decision | None:
    """Return the decision not to pack micro batches; None if it depends on the model alone.

    Args:
        mode: the recipe's ``data.packing``.
        micro_batch_size: rows that are computed together.
        lengths: tokens of each row of the run; None where they are not known.
    """
    if mode == "off":
        return Decision(False, "off, as the recipe says")
    if micro_batch_size == 1:
        return Decision(False, "off (a micro batch is one row, which needs no padding)")
    if lengths is not None and len(set(lengths)) == 1:
        return Decision(False, "off (all rows have one length, so nothing is padded)")
    return None


def decide_checkpointing(mode: Mode, needed: int | None, free: int | None, in_update: bool = False) -> Decision:
    """Decide whether the trained blocks' activations are recomputed in backward.

    Args:
        mode: the recipe's ``train.gradient_checkpointing``; ``auto`` recomputes where the run would not fit otherwise.
        needed: bytes without recomputation; None for an architecture that cannot be planned, where ``auto`` takes the
            way that needs less.
        free: bytes that there are for it; None where that is not known, and ``auto`` then keeps the activations.
        in_update: the optimizer's update needs most, which recomputation does not change.
    """
    if mode != "auto":
        return Decision(mode == "on", f"{mode}, as the recipe says")
    if needed is None:
        return Decision(True, "on (auto: this architecture cannot be planned)")
    if free is None:
        return Decision(False, "off (auto: no limit of memory is known)")
    sizes = f"without it, {needed / _GIB:.2f} GiB beside the weights; {free / _GIB:.2f} GiB free"
    if needed > free and in_update:
        return Decision(False, f"off (auto: {sizes}; the update needs most, which it does not change)")
    return Decision(needed > free, f"{'on' if needed > free else 'off'} (auto: {sizes})")
