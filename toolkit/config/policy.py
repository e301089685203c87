"""Decisions that planning and training share, so that a plan predicts what the run does. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from toolkit.config.schema import PrefixConfig, TrainConfig
from toolkit.runtime.errors import ConfigError

Mode = Literal["auto", "on", "off"]
"""Value of a recipe key that switches a feature."""

_GIB = 2**30


@dataclass(frozen=True)
class Decision:
    """A decision to turn a feature on or off, with its reason."""

    on: bool
    reason: str
    """As a phrase for the log."""


def global_batch(micro_batch_size: int, accumulation: int, ranks: int) -> int:
    """Return the rows of one optimizer step over all ranks."""
    return micro_batch_size * accumulation * ranks


def most_rows_at_once(train: TrainConfig) -> int:
    """Return the most rows that a micro batch may have: with ``micro_batch_tokens`` all of a rank's in a step."""
    rows = train.micro_batch_size
    return rows if train.micro_batch_tokens is None else rows * train.gradient_accumulation_steps


def most_micro_batches(train: TrainConfig) -> int:
    """Return the most micro batches that a rank may have in a step: with ``micro_batch_tokens`` one for each row."""
    steps = train.gradient_accumulation_steps
    return steps if train.micro_batch_tokens is None else steps * train.micro_batch_size


def reduce_dtype(train: TrainConfig) -> Literal["float32", "bfloat16"]:
    """Return the precision in which ranks sum gradients without DeepSpeed."""
    return train.reduce_dtype or "float32"


def refuse_cache(settings: PrefixConfig, obstacle: str | None) -> Decision | None:
    """Decide against a cache if the recipe or an ``obstacle``, why none is possible, rules it out; else return None.

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
        obstacle: as in ``refuse_cache``, which may raise ConfigError.
        passes: passes over the training rows under one mask; 0.5 is half an epoch.
        is_complete: whether the cache holds every sample already, so that even a single pass benefits.
    """
    if refused := refuse_cache(settings, obstacle):
        return refused
    if settings.cache == "on":
        return Decision(True, "on, as the recipe says")
    if passes <= 1 and not is_complete:
        return Decision(False, "off (auto: one pass over the rows reads nothing twice)")
    return Decision(True, "on (auto)")


def saves_in_background(setting: bool | None, on_gpu: bool) -> bool:
    """Return whether checkpoints are written while training goes on: ``output.async_save``, by default on a GPU."""
    return on_gpu if setting is None else setting


def refuse_packing(mode: Mode, micro_batch_size: int, lengths: Iterable[int] | None) -> Decision | None:
    """Decide against packing if it is off or has no effect; None if it depends on the model.

    ``mode`` is the recipe's ``data.packing``, ``lengths`` the tokens of each row of the run, None if not known.
    """
    if mode == "off":
        return Decision(False, "off, as the recipe says")
    if micro_batch_size == 1:
        return Decision(False, "off (a micro batch is one row, which needs no padding)")
    if lengths is not None and len(set(lengths)) == 1:
        return Decision(False, "off (all rows have one length, so nothing is padded)")
    return None


def decide_checkpointing(mode: Mode, needed: int | None, free: int | None, fixed_moment: str | None = None) -> Decision:
    """Decide on activation checkpointing: whether the trained blocks are recomputed in backward.

    Args:
        mode: the recipe's ``train.gradient_checkpointing``; ``auto`` recomputes if the run would not fit otherwise.
        needed: bytes without checkpointing; None for an architecture that cannot be planned, where ``auto`` recomputes.
        free: bytes available; None if that is not known, where ``auto`` keeps the activations.
        fixed_moment: moment of the peak, such as the update, if checkpointing would not reduce it.
    """
    if mode != "auto":
        return Decision(mode == "on", f"{mode}, as the recipe says")
    if needed is None:
        return Decision(True, "on (auto: this architecture cannot be planned)")
    if free is None:
        return Decision(False, "off (auto: no limit of memory is known)")
    sizes = f"without it, {needed / _GIB:.2f} GiB beside the weights; {free / _GIB:.2f} GiB free"
    if needed > free and fixed_moment:
        return Decision(False, f"off (auto: {sizes}; the {fixed_moment} needs most, which it does not change)")
    return Decision(needed > free, f"{'on' if needed > free else 'off'} (auto: {sizes})")
