"""Plan the run of a parsed command line, for ``frostline plan`` and ``toolkit.plan``."""

from __future__ import annotations

from itertools import pairwise

from toolkit.config.flags import Invocation
from toolkit.config.schema import RunConfig
from toolkit.data.batches import BatchPlan
from toolkit.engine.deepspeed.config import read_ds_config, resolve_ds_config
from toolkit.mask.schedule import phase_ends
from toolkit.planning.device_fit import DeviceFit, choose_variant, fit_device
from toolkit.planning.engine_memory import EngineSpec, engine_spec
from toolkit.planning.meta_model import MetaModel, meta_model
from toolkit.planning.phase_plans import combine_plans, phase_planners
from toolkit.planning.planner import Plan
from toolkit.planning.workload import Workload, read_workload


def plan_run(invocation: Invocation, ranks: int, budget: int | None) -> tuple[Plan, DeviceFit | None]:
    """Plan the run of ``invocation``.

    Args:
        invocation: the parsed command line.
        ranks: world size.
        budget: memory of one GPU in bytes; None to plan without a comparison.

    Returns:
        The plan, and how it fits ``budget``; None if there is no budget.

    Raises:
        UsageError: recipe, flags, DeepSpeed file, model or mask is invalid.
    """
    meta = meta_model(invocation.config.model)
    spec = _engine_spec_of(invocation, meta, ranks)
    config = invocation.config
    workload = read_workload(config, meta.positions)
    planners = phase_planners(config, meta, workload, _passes_by_phase(config, workload, ranks))
    plans = [planner.plan(choose_variant(planner, spec, budget)) for planner in planners]
    plan = combine_plans(plans, config.mask)
    if budget is None:
        return plan, None
    largest, planner = max(zip(plans, planners, strict=True), key=lambda pair: pair[0].memory.peak)
    return plan, fit_device(planner, largest.variant, budget)


def _passes_by_phase(config: RunConfig, workload: Workload, ranks: int) -> list[float]:
    """Return the number of passes over the training rows in each phase.

    Raises:
        ConfigError: a phase ends before it begins, or after the run.
    """
    if workload.lengths is None:  # the steps of an epoch, and so the ends of phases, are unknown: an upper bound
        return [float(config.train.epochs)] * (len(config.mask.schedule) + 1)
    plan = BatchPlan.of_recipe(config.train, len(workload.lengths), ranks)
    ends = phase_ends(config.mask, plan.steps_per_epoch, plan.steps(config.train.epochs, config.train.max_steps))
    return [plan.passes(end, start) for start, end in pairwise([0, *ends])]


def _engine_spec_of(invocation: Invocation, meta: MetaModel, ranks: int) -> EngineSpec:
    """Return the engine that ``--ds`` asks for.

    Raises:
        ConfigError: the DeepSpeed file is invalid.
    """
    accumulation, name = invocation.config.train.gradient_accumulation_steps, invocation.config.optim.name
    if invocation.deepspeed is None:
        return engine_spec(None, ranks, accumulation, name)
    ds = read_ds_config(invocation.deepspeed)
    resolved = resolve_ds_config(ds, invocation.config, ranks, meta.hidden_size, invocation.deepspeed)
    return engine_spec(resolved, ranks, accumulation, name)
