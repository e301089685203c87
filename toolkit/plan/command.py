"""What launch/plan.py does: plan a command line, print it, draw it."""

from __future__ import annotations

import json
from pathlib import Path

from toolkit.config.flags import Invocation
from toolkit.engine.ds_config import read_ds_config, resolve_ds_config
from toolkit.plan.fit import choose_recompute, judge
from toolkit.plan.load import read_load
from toolkit.plan.memory import EngineSpec, engine_spec
from toolkit.plan.picture import draw
from toolkit.plan.planner import Planner, hidden_size, positions
from toolkit.plan.report import as_dict, as_text
from toolkit.plan.skeleton import Skeleton, skeleton


def plan_command(invocation: Invocation, ranks: int, budget: int | None, as_json: bool, png: Path | None) -> None:
    """Plan the run that ``invocation`` describes and print the plan.

    Args:
        invocation: the parsed command line.
        ranks: world size.
        budget: bytes of one GPU; none judges nothing.
        as_json: print JSON in place of the table.
        png: also draw it into this file.

    Raises:
        UsageError: recipe, flags, DeepSpeed file, model or mask is at fault.
    """
    bare = skeleton(invocation.config.model)
    spec = spec_of(invocation, bare, ranks)
    planner = Planner(invocation.config, bare, read_load(invocation.config, positions(bare)))
    variant = choose_recompute(planner, spec, budget)
    plan = planner.plan(variant)
    verdict = judge(planner, variant, budget) if budget is not None else None
    if png is not None:
        draw(plan, png, verdict)
    print(json.dumps(as_dict(plan, verdict), indent=1) if as_json else as_text(plan, verdict))


def spec_of(invocation: Invocation, bare: Skeleton, ranks: int) -> EngineSpec:
    """The engine that ``--ds`` asks for.

    Raises:
        ConfigError: the DeepSpeed file is at fault.
    """
    accumulation = invocation.config.train.gradient_accumulation_steps
    if invocation.deepspeed is None:
        return engine_spec(None, ranks, accumulation)
    ds = read_ds_config(invocation.deepspeed)
    resolved = resolve_ds_config(ds, invocation.config, ranks, hidden_size(bare), invocation.deepspeed)
    return engine_spec(resolved, ranks, accumulation)
