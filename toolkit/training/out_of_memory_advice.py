"""What to change first after memory ran out, from the plan of the run where there is one."""

from __future__ import annotations

from toolkit.config.schema import RunConfig
from toolkit.planning.device_fit import first_knob, first_pass_knob
from toolkit.planning.meta_model import LOOKED_AT_CONTENT
from toolkit.runtime.errors import OutOfMemoryError, UsageError
from toolkit.training.setup import Setup, spec_of


def advise(error: OutOfMemoryError, setup: Setup | None, config: RunConfig) -> OutOfMemoryError:
    """``error`` with the first knob to turn.

    Args:
        error: says what the run was doing.
        setup: none where the set-up itself failed.
        config: the recipe.
    """
    return error.with_advice(_planned(error, setup) or _by_rule(error, config))


def _planned(error: OutOfMemoryError, setup: Setup | None) -> str | None:
    """What the plan of the current phase proposes; none where there is no plan."""
    if setup is None or not setup.planners or (error.shape is None and error.phase != "the update"):
        return None
    cost = setup.costs[setup.active.phase.index] if hasattr(setup, "active") else None
    planner = setup.planners[setup.active.phase.index] if hasattr(setup, "active") else setup.planners[0]
    try:
        variant = cost.variant if cost is not None else planner.variant(spec_of(setup), recompute=False)
        if error.phase.startswith("the first pass"):
            return first_pass_knob(planner, variant)
        return first_knob(planner, variant, in_update=error.phase == "the update")
    except (UsageError, MemoryError, *LOOKED_AT_CONTENT):  # the advice must not hide the error
        return None


def _by_rule(error: OutOfMemoryError, config: RunConfig) -> str:
    """What helps most often at that phase."""
    if error.shape is None:
        if config.prefix.placement == "device" and not config.mask.schedule:
            return "prefix.placement: disk, which leaves the frozen blocks out of memory"
        return "mask.train: fewer blocks, or more ranks with --ds ds_configs/zero2.json"
    if config.train.gradient_checkpointing != "on" and error.phase in ("forward", "backward"):
        return "train.gradient_checkpointing: on"
    if config.train.micro_batch_size > 1:
        return "train.micro_batch_size: 1, with train.gradient_accumulation_steps in its place"
    return f"data.max_length: less than {config.data.max_length} (longer rows lose context)"
