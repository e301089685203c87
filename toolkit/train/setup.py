"""Set a run up: data, model, mask, split, engine, each checked before the next and more costly one."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from toolkit.config.flags import Invocation
from toolkit.config.schema import RunConfig
from toolkit.consistency import require_same
from toolkit.data.batches import BatchPlan, collate
from toolkit.data.dataset import Dataset, load_dataset
from toolkit.delta import Base
from toolkit.distributed import World
from toolkit.engine.base import Engine
from toolkit.engine.ds_config import read_ds_config, resolve_ds_config
from toolkit.engine.local import LocalEngine
from toolkit.errors import DataError, ModelError, PlanError
from toolkit.mask.apply import apply_mask, trainable_parameters
from toolkit.mask.audit import audit_markdown, audit_table
from toolkit.mask.layer_mask import LayerMask, build_mask
from toolkit.models.load import LoadedModel, fingerprint, load_tokenizer
from toolkit.plan.load import load_of
from toolkit.plan.memory import engine_spec
from toolkit.plan.planner import Plan, Planner
from toolkit.plan.report import as_dict
from toolkit.plan.skeleton import skeleton_of
from toolkit.prefix.cached import CachedPrefix, HiddenStates
from toolkit.prefix.packing import choose_packing
from toolkit.prefix.recompute import free_bytes, recompute_blocks, should_recompute
from toolkit.prefix.split import Prefix, Suffix
from toolkit.train.cut import Job, cut, effective, load_for

log = logging.getLogger("frostline")


@dataclass(frozen=True)
class Setup:
    """Everything a run needs, ready for the first step."""

    config: RunConfig
    world: World
    dataset: Dataset
    plan: BatchPlan
    total_steps: int
    mask: LayerMask
    base: Base
    prefix: HiddenStates | None
    suffix: Suffix
    engine: Engine
    pad_id: int
    packed: bool
    """Micro batches are laid end to end, not padded."""
    audit: str
    """The audit table in Markdown."""
    cost: Plan | None
    """What the run was planned to need; none for an architecture that cannot be planned."""


def set_up(invocation: Invocation, world: World) -> Setup:
    """Load and check everything ``invocation`` names; every rank calls it.

    Raises:
        UsageError: the DeepSpeed file, data, model or mask is at fault.
    """
    config = invocation.config
    ds = read_ds_config(invocation.deepspeed) if invocation.deepspeed else None
    with world.main_first():  # rank 0 fills the download and conversion caches
        tokenizer = load_tokenizer(config.model)
    dataset = load_dataset(config.data, tokenizer, config.train.seed)
    require_same(world, {"the rows": f"SHA-256 {dataset.fingerprint[:12]}"})
    log.info("data: %s", dataset.summary())
    train = config.train
    plan = BatchPlan(
        len(dataset.train), train.micro_batch_size, train.gradient_accumulation_steps, world.rank, world.size
    )
    total_steps = min(plan.steps_per_epoch * train.epochs, train.max_steps or plan.steps_per_epoch * train.epochs)
    loaded = load_for(config, tokenizer)
    _check_fit(dataset, loaded)
    base = Base(config.model, world.share(fingerprint(loaded.model, loaded.on_disk) if world.is_main else None))
    mask = build_mask(config.mask, loaded.anatomy)
    planner = _planner(config, loaded, dataset, world)
    apply_mask(loaded.model, mask, loaded.anatomy)
    log.info("layer mask of %s:\n%s", config.model.name_or_path, audit_table(mask, loaded.anatomy))
    passes = total_steps * plan.global_batch / plan.rows
    prefix, suffix = cut(loaded, Job(config, tokenizer, mask, base, dataset, passes, world))
    anatomy, hidden_size = loaded.anatomy, loaded.model.config.get_text_config().hidden_size
    del loaded  # what the two halves do not hold is to be gone before the engine allocates
    shortest = collate([min(dataset.train, key=lambda example: len(example.token_ids))], pad_id=0).to(world.device)
    log.info("supervised positions: %s", suffix.settle(prefix(shortest) if prefix else None, shortest).text)
    packing = choose_packing(
        config.data.packing, train.micro_batch_size, prefix, suffix, (*dataset.train, *dataset.validation), world.device
    )
    log.info("packing: %s", packing.reason)
    resolved = None
    if ds is not None and invocation.deepspeed is not None:
        resolved = resolve_ds_config(ds, config, world.size, hidden_size, invocation.deepspeed)
    if planner is not None:
        planner.cut, planner.cached = prefix is not None, isinstance(prefix, CachedPrefix)
        planner.packed, planner.short_cuts = packing.on, suffix.short_cuts
    cost = _plan_and_recompute(planner, suffix, mask.boundary, config, world, resolved)
    engine = _build_engine(prefix, suffix, mask, config, total_steps, world, resolved)
    log.info(
        "engine %s, %d rank(s) on %s: %d steps of %d rows (micro batch %d x accumulation %d x ranks %d), %d epochs",
        engine.name, world.size, world.device.type, total_steps, plan.global_batch, train.micro_batch_size,
        train.gradient_accumulation_steps, world.size, train.epochs,
    )  # fmt: skip
    return Setup(
        config=config, world=world, dataset=dataset, plan=plan, total_steps=total_steps, mask=mask, base=base,
        prefix=prefix, suffix=suffix, engine=engine, pad_id=int(tokenizer.pad_token_id),
        packed=packing.on, audit=audit_markdown(mask, anatomy), cost=cost,
    )  # fmt: skip


def _check_fit(dataset: Dataset, loaded: LoadedModel) -> None:
    """Refuse rows longer than the model's positions and ids beyond its embeddings, before an index error does."""
    examples = (*dataset.train, *dataset.validation)
    longest = max(len(example.token_ids) for example in examples)
    positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if positions and longest > positions:
        raise DataError(
            f"the longest row has {longest} tokens, the model has {positions} positions; "
            f"set data.max_length: {positions}"
        )
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    largest = max(max(example.token_ids) for example in examples)
    if largest >= rows:
        raise ModelError(
            f"the tokenizer gives id {largest}, the model embeds {rows} ids; expected a tokenizer made for this model"
        )


def _planner(config: RunConfig, loaded: LoadedModel, dataset: Dataset, world: World) -> Planner | None:
    """What plans this run; none, and a word in the log, where the architecture does not allow it."""
    config = config.model_copy(update={"prefix": effective(config.prefix, world.device)})
    try:
        return Planner(config, skeleton_of(loaded), load_of(dataset))
    except PlanError as error:
        log.warning("%s", error)
        return None


def _plan_and_recompute(
    planner: Planner | None,
    suffix: Suffix,
    boundary: int,
    config: RunConfig,
    world: World,
    ds_config: dict[str, Any] | None,
) -> Plan | None:
    """Checkpoint the blocks from the frost line up, if the recipe or memory asks for it; the plan of the run."""
    train = config.train
    plans: dict[bool, Plan] = {}
    if planner is not None:
        spec = engine_spec(ds_config, world.size, train.gradient_accumulation_steps)
        try:
            plans = {on: planner.plan(planner.variant(spec, recompute=on)) for on in (False, True)}
        except PlanError as error:
            log.warning("%s", error)
    needed = plans[False].memory.beside_weights if plans else None
    free = -int(world.max(-free_bytes(world.device)))  # the tightest rank decides for all
    on, why = should_recompute(train.gradient_checkpointing, needed, free)
    log.info("gradient checkpointing: %s", why)
    if on:
        recompute_blocks(suffix.blocks(boundary))
    return plans.get(on)


def _build_engine(
    prefix: HiddenStates | None,
    suffix: Suffix,
    mask: LayerMask,
    config: RunConfig,
    total_steps: int,
    world: World,
    ds_config: dict[str, Any] | None,
) -> Engine:
    parameters = trainable_parameters(suffix.model, mask)
    if ds_config is None:
        return LocalEngine(suffix, parameters, mask.groups, config.train, config.optim, total_steps, world)
    from toolkit.engine.zero import ZeroEngine  # DeepSpeed is imported only by runs that use it

    below = prefix.skeleton.named_parameters() if isinstance(prefix, Prefix) else ()
    copies = {name: parameter for name, parameter in below if name in parameters}
    return ZeroEngine(
        suffix, parameters, mask.groups, config.train, config.optim, total_steps, world, copies, ds_config
    )


def save_set_up(setup: Setup, run: Path) -> None:
    """Write what the run consists of into its directory."""
    setup.mask.save(run / "mask.json")
    if setup.cost is not None:
        (run / "plan.json").write_text(json.dumps(as_dict(setup.cost), indent=1), encoding="utf-8")
    setup.dataset.save_skipped(run / "skipped_rows.jsonl")


def seed_step(seed: int, step: int, world: World) -> None:
    """Make dropout a function of seed, step and rank alone, so that a resumed run repeats it."""
    torch.manual_seed((seed * 1_000_003 + step) * world.size + world.rank)
