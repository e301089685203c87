"""Advise what to change first after memory ran out, from the plan of the run where there is one."""

from __future__ import annotations

from toolkit.config.schema import RunConfig
from toolkit.planning.device_fit import first_change, first_change_in_cache_fill
from toolkit.runtime.errors import OutOfMemoryError, UsageError
from toolkit.split.logit_processing import MODEL_CODE_ERRORS
from toolkit.training.trainer import Trainer


def advise(error: OutOfMemoryError, trainer: Trainer | None, config: RunConfig) -> OutOfMemoryError:
    """Return ``error`` with the setting to change first; ``trainer`` is None if the set-up failed."""
    advice = _planned(error, trainer) or _by_rule(error, config)
    return OutOfMemoryError(error.phase, error.shape, error.detail, advice)


def _planned(error: OutOfMemoryError, trainer: Trainer | None) -> str | None:
    """Return what the plan of the current phase proposes; None where there is no plan."""
    if trainer is None or (error.shape is None and error.phase != "the update"):
        return None
    context, state = trainer.context, trainer.current
    planner = state.planner if state else next(iter(context.planners), None)
    if planner is None:
        return None
    try:
        plan = state.plan if state else None
        variant = plan.variant if plan else planner.variant(context.engine_spec, checkpointing=False)
        if error.phase.startswith("the first pass"):
            return first_change_in_cache_fill(planner, variant)
        return first_change(planner, variant, in_update=error.phase == "the update")
    except (UsageError, MemoryError, *MODEL_CODE_ERRORS):  # the advice must not hide the error
        return None


def _by_rule(error: OutOfMemoryError, config: RunConfig) -> str:
    """Return what helps most often at that phase."""
    if error.shape is None:
        if config.prefix.placement == "device" and not config.mask.schedule:
            return "prefix.placement: disk, which leaves the frozen blocks out of memory"
        return "mask.train: fewer blocks, or more ranks with --ds ds_configs/zero2.json"
    if config.train.gradient_checkpointing != "on" and error.phase in ("forward", "backward"):
        return "train.gradient_checkpointing: on"
    if (tokens := config.train.micro_batch_tokens) and not error.shape.startswith("1 row "):
        return f"train.micro_batch_tokens: {tokens // 2}"
    if config.train.micro_batch_size > 1 and tokens is None:
        return "train.micro_batch_size: 1, with train.gradient_accumulation_steps in its place"
    return f"data.max_length: less than {config.data.max_length} (longer rows lose context)"
