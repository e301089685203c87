"""Plan the run of a parsed command line, for ``frostline plan`` and ``toolkit.plan``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from itertools import pairwise

from toolkit.config.flags import Invocation
from toolkit.config.mask_schema import MaskConfig
from toolkit.config.policy import most_micro_batches, reduce_dtype
from toolkit.config.schema import RunConfig
from toolkit.data.batches import BatchPlan
from toolkit.engine.deepspeed.config import load_ds_config
from toolkit.mask.rotation import resolve_rotation
from toolkit.mask.schedule import phase_ends
from toolkit.models.anatomy import Anatomy
from toolkit.planning.device_fit import DeviceFit, choose_variant, fit_device
from toolkit.planning.engine_spec import engine_spec
from toolkit.planning.meta_model import meta_model
from toolkit.planning.phase_plans import combine_plans, phase_planners
from toolkit.planning.planner import Plan
from toolkit.planning.workload import Workload, read_workload


def plan_run(invocation: Invocation, ranks: int, budget: int | None) -> tuple[Plan, DeviceFit | None]:
    """Return the plan of a run, and whether it fits a GPU with ``budget`` bytes (None without a budget).

    Raises:
        UsageError: recipe, flags, DeepSpeed file, model or mask is invalid.
    """
    return plan_masks(invocation, ranks, budget, [invocation.config.mask])[0]


def plan_masks(
    invocation: Invocation, ranks: int, budget: int | None, masks: Sequence[MaskConfig]
) -> list[tuple[Plan, DeviceFit | None]]:
    """Return what ``plan_run`` does for each of several mask sections in the place of the recipe's."""
    config = invocation.config
    meta = meta_model(config.model)
    ds_config = load_ds_config(invocation.deepspeed, config, ranks, meta.hidden_size)
    with redirect_stdout(sys.stderr):  # DeepSpeed logs to the stdout of its import, and a plan in JSON goes there
        accumulation, dtype = most_micro_batches(config.train), reduce_dtype(config.train)
        spec = engine_spec(ds_config, ranks, accumulation, config.optim.name, reduce_dtype=dtype)
    workload = read_workload(config, meta.positions)
    found: list[tuple[Plan, DeviceFit | None]] = []
    for mask in masks:
        masked = config.model_copy(update={"mask": mask})
        planners = phase_planners(masked, meta, workload, _passes_by_phase(masked, meta.anatomy, workload, ranks))
        plans = [planner.plan(choose_variant(planner, spec, budget)) for planner in planners]
        largest, planner = max(zip(plans, planners, strict=True), key=lambda pair: pair[0].memory.peak)
        fit = None if budget is None else fit_device(planner, largest.variant, budget)
        found.append((combine_plans(plans, mask), fit))
    return found


def _passes_by_phase(config: RunConfig, anatomy: Anatomy, workload: Workload, ranks: int) -> list[float]:
    """Return the number of passes over the training rows in each phase.

    Raises:
        ConfigError: a phase ends before it begins, or after the run; a rotation has no second turn.
        MaskError: the mask does not suit the rotation.
    """
    if workload.lengths is None:  # the steps of an epoch, and so the ends of phases, are unknown: an upper bound
        return [float(config.train.epochs)] * (len(config.mask.schedule) + 1)
    plan = BatchPlan.of_recipe(config.train, len(workload.lengths), ranks)
    steps = plan.steps(config.train.epochs, config.train.max_steps)
    if config.mask.rotation is not None:
        resolve_rotation(config.mask, anatomy).turns(steps)
    ends = phase_ends(config.mask, plan.steps_per_epoch, steps)
    return [plan.passes(end, start) for start, end in pairwise([0, *ends])]
