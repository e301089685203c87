"""Plan the run that a command line or a call describes."""

from __future__ import annotations

from itertools import pairwise

from toolkit.config.flags import Invocation
from toolkit.config.schema import RunConfig
from toolkit.data.batches import BatchPlan
from toolkit.engine.deepspeed.config import read_ds_config, resolve_ds_config
from toolkit.mask.schedule import phase_ends
from toolkit.planning.device_fit import Verdict, choose_checkpointing, judge
from toolkit.planning.engine_memory import EngineSpec, engine_spec
from toolkit.planning.meta_model import MetaModel, meta_model
from toolkit.planning.phase_plans import phase_planners, whole_plan
from toolkit.planning.planner import Plan
from toolkit.planning.workload import Workload, read_workload


def plan_run(invocation: Invocation, ranks: int, budget: int | None) -> tuple[Plan, Verdict | None]:
    """Plan the run that ``invocation`` describes.

    Args:
        invocation: the parsed command line.
        ranks: world size.
        budget: bytes of one GPU; none judges nothing.

    Returns:
        The plan, and whether it fits ``budget``.

    Raises:
        UsageError: recipe, flags, DeepSpeed file, model or mask is at fault.
    """
    bare = meta_model(invocation.config.model)
    spec = spec_of(invocation, bare, ranks)
    config = invocation.config
    load = read_workload(config, bare.positions)
    planners = phase_planners(config, bare, load, _passes(config, load, ranks))
    plans = [planner.plan(choose_checkpointing(planner, spec, budget)) for planner in planners]
    plan = whole_plan(plans, config.mask)
    if budget is None:
        return plan, None
    most = max(zip(plans, planners, strict=True), key=lambda pair: pair[0].memory.peak)
    return plan, judge(most[1], most[0].variant, budget)


def _passes(config: RunConfig, load: Workload, ranks: int) -> list[float]:
    """Return the passes over the rows of each phase.

    Raises:
        ConfigError: phases that do not end one after the other, and before the run does.
    """
    if load.lengths is None:  # nobody knows how many steps an epoch has
        return [float(config.train.epochs)] * (len(config.mask.schedule) + 1)
    plan = BatchPlan.of_recipe(config.train, len(load.lengths), ranks)
    ends = phase_ends(config.mask, plan.steps_per_epoch, plan.steps(config.train.epochs, config.train.max_steps))
    return [plan.passes(end, start) for start, end in pairwise([0, *ends])]


def spec_of(invocation: Invocation, bare: MetaModel, ranks: int) -> EngineSpec:
    """Return the engine that ``--ds`` asks for.

    Raises:
        ConfigError: the DeepSpeed file is at fault.
    """
    accumulation, name = invocation.config.train.gradient_accumulation_steps, invocation.config.optim.name
    if invocation.deepspeed is None:
        return engine_spec(None, ranks, accumulation, name)
    ds = read_ds_config(invocation.deepspeed)
    resolved = resolve_ds_config(ds, invocation.config, ranks, bare.hidden_size, invocation.deepspeed)
    return engine_spec(resolved, ranks, accumulation, name)
