"""Set a run up: data, model, mask, split, engine, each checked before the next and more costly one."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from toolkit.activation_cache.cached_prefix import CachedPrefix, HiddenStates
from toolkit.activation_cache.packing import choose_packing
from toolkit.checkpoint.delta import Base
from toolkit.checkpoint.state import CheckpointState
from toolkit.config.flags import Invocation
from toolkit.config.policy import Decision, decide_checkpointing
from toolkit.config.schema import RunConfig
from toolkit.data.batches import BatchPlan, collate
from toolkit.data.dataset import Dataset
from toolkit.data.examples import shortest
from toolkit.data.model_limits import check_fit, padding_id
from toolkit.engine.base import Engine
from toolkit.engine.deepspeed.config import read_ds_config, refuse_what_cannot_move, resolve_ds_config, zero_stage
from toolkit.engine.deepspeed.nvme_files import make_room
from toolkit.engine.local import LocalEngine
from toolkit.mask.apply import apply_mask, trainable_parameters
from toolkit.mask.audit import AuditRow, audit, audit_markdown, audit_table
from toolkit.mask.layer_mask import LayerMask
from toolkit.mask.schedule import Phase, Schedule, build_schedule
from toolkit.models.float32_gradients import float32_is_faster, use_float32_gradients
from toolkit.models.load import LoadedModel, fingerprint, load_tokenizer
from toolkit.models.quirks import log_training_notes
from toolkit.planning.engine_memory import EngineSpec, engine_spec
from toolkit.planning.phase_plans import whole_plan
from toolkit.planning.planner import Plan, Planner
from toolkit.runtime import malloc, signals
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import PlanError
from toolkit.split.activation_checkpointing import checkpoint_blocks, free_bytes
from toolkit.split.joined_model import JoinedModel
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import Suffix
from toolkit.training.cut import CutJob, cut, load_for, refuse_with_schedule
from toolkit.training.fingerprints import fingerprints
from toolkit.training.preflight import check_config
from toolkit.training.run_plan import planners_of
from toolkit.training.run_rows import read_rows_of
from toolkit.training.summary import grown_by, resident_bytes
from toolkit.training.unused_settings import unused_settings

log = logging.getLogger("frostline")


@dataclass(frozen=True)
class Active:
    """What the current phase of the mask's schedule runs on."""

    phase: Phase
    prefix: HiddenStates | None
    suffix: Suffix
    engine: Engine
    parts: tuple[AuditRow, ...]
    """What trains and what does not, from input to head."""
    audit: str
    """The same in Markdown."""
    whole: JoinedModel
    """The model in one piece again, to generate with."""


@dataclass
class Setup:
    """Everything a run needs, ready for the next step. ``toolkit.training.phase_change`` exchanges ``active``."""

    config: RunConfig
    world: World
    dataset: Dataset
    plan: BatchPlan
    total_steps: int
    schedule: Schedule
    base: Base
    tokenizer: PreTrainedTokenizerBase
    pad_id: int
    """What rows are padded with."""
    stop_ids: list[int]
    """Tokens that end an answer."""
    loaded: LoadedModel | None
    """The whole model, for the phases to come; none in the last one."""
    fingerprints: dict[str, str]
    """Of what a checkpoint belongs to, by name."""
    ds_config: dict[str, Any] | None
    """As DeepSpeed is given it; none trains with torch alone."""
    planners: list[Planner]
    """One a phase; empty for an architecture that cannot be planned."""
    costs: list[Plan | None] = field(default_factory=list)
    """What each phase was planned to need; none where that cannot be planned."""
    libraries: int = 0
    """Bytes in memory of Python and what it has imported."""
    resting: dict[str, torch.Tensor] = field(default_factory=dict)
    """On rank 0, the float32 masters of what trained in earlier phases and does not now."""
    packing: Decision | None = None
    """Whether micro batches are packed; none before the first phase has found out."""
    reading: HiddenStates | None = None
    """What a thread may ask to read ahead; none between two phases."""
    active: Active = field(init=False)

    @property
    def packed(self) -> bool:
        """Micro batches are packed."""
        return self.packing is not None and self.packing.on

    @property
    def mask(self) -> LayerMask:
        """What trains now."""
        return self.active.phase.mask

    @property
    def prefix(self) -> HiddenStates | None:
        """What gives the hidden states at the frost line."""
        return self.active.prefix

    @property
    def suffix(self) -> Suffix:
        """The part that holds what trains now."""
        return self.active.suffix

    @property
    def engine(self) -> Engine:
        """What executes a step now."""
        return self.active.engine

    @property
    def cost(self) -> Plan | None:
        """What the run was planned to need; none for an architecture that cannot be planned."""
        plans = [plan for plan in self.costs if plan is not None]
        return whole_plan(plans, self.config.mask) if len(plans) == len(self.schedule.phases) else None


def set_up(invocation: Invocation, world: World) -> Setup:
    """``prepare``, then begin the first phase."""
    setup = prepare(invocation, world)
    begin(setup, setup.schedule.phases[0])
    return setup


def prepare(
    invocation: Invocation, world: World, state: CheckpointState | None = None, run_dir: Path | None = None
) -> Setup:
    """Load and check everything ``invocation`` names, for ``begin``; every rank calls it.

    Args:
        invocation: the parsed command line.
        world: this process among the run's.
        state: of the checkpoint that is to be continued.
        run_dir: keeps how rows are written; none where nothing is kept.

    Raises:
        UsageError: the DeepSpeed file, data, model or mask is at fault.
    """
    config = invocation.config
    ds = read_ds_config(invocation.deepspeed) if invocation.deepspeed else None
    with world.main_first():  # rank 0 fills the download and conversion caches
        with suppress(PlanError):  # what the config alone does not tell is found once the model is loaded
            check_config(invocation, world.size)
        tokenizer = load_tokenizer(config.model)
    dataset, stop_ids = read_rows_of(config, tokenizer, world, run_dir)
    signals.raise_if_stopping(world)
    train = config.train
    plan = BatchPlan.of_recipe(train, len(dataset.train), world.size, world.rank)
    total_steps = state.steps_in_all(config, world.size) if state else plan.steps(train.epochs, train.max_steps)
    refuse_with_schedule(config, world.device)
    for warning in unused_settings(config, total_steps, world.device):
        log.warning("%s", warning)
    libraries = resident_bytes()
    log.info("loading %s", config.model.name_or_path)
    loaded = load_for(config, tokenizer)
    check_fit((*dataset.train, *dataset.validation), loaded.model)
    log_training_notes(loaded.model.config)
    signals.raise_if_stopping(world)
    if world.broadcast_object(float32_is_faster(loaded.model.dtype, world.device) if world.is_main else None):
        use_float32_gradients(loaded.model)
    base = Base(
        config.model, world.broadcast_object(fingerprint(loaded.model, loaded.on_disk) if world.is_main else None)
    )
    schedule = build_schedule(config.mask, loaded.anatomy, plan.steps_per_epoch, total_steps)
    planners = planners_of(
        config, loaded, dataset, world.device, [plan.passes(phase.end, phase.start) for phase in schedule.phases]
    )
    resolved = None
    if ds is not None and invocation.deepspeed is not None:
        width = loaded.model.config.get_text_config().hidden_size
        resolved = resolve_ds_config(ds, config, world.size, width, invocation.deepspeed)
        refuse_what_cannot_move(resolved, config.mask, invocation.deepspeed)
    setup = Setup(
        config=config, world=world, dataset=dataset, plan=plan, total_steps=total_steps, schedule=schedule, base=base,
        tokenizer=tokenizer, pad_id=padding_id(tokenizer, loaded.model), stop_ids=stop_ids, loaded=loaded,
        libraries=libraries, fingerprints=fingerprints(dataset, tokenizer, base, schedule), ds_config=resolved,
        planners=planners,
    )  # fmt: skip
    del loaded  # ``begin`` lets go of it in the last phase
    setup.costs = [_decide_recompute(setup, phase)[2] for phase in schedule.phases]
    signals.raise_if_stopping(world)
    name, length = "local" if resolved is None else f"zero-{zero_stage(resolved)}", plan.text(total_steps, train.epochs)
    log.info("engine %s, %d rank(s) on %s: %s", name, world.size, world.device.type, length)
    return setup


def begin(setup: Setup, phase: Phase) -> None:
    """Lay the mask of ``phase`` on the model, cut it at the frost line, and give what trains to an engine.

    The model has to be whole, in plain parameters: as loaded, or as ``toolkit.training.phase_change`` puts it together
    again.
    """
    loaded, phases = setup.loaded, setup.schedule.phases
    assert loaded is not None
    apply_mask(loaded.model, phase.mask, loaded.anatomy)
    if len(phases) > 1:
        log.info("phase %d of %d: steps %d to %d", phase.index + 1, len(phases), phase.start + 1, phase.end)
    name = setup.config.model.name_or_path
    log.info("layer mask of %s:\n%s", name, audit_table(phase.mask, loaded.anatomy))
    prefix, suffix = cut(loaded, _job(setup, phase))
    _settle(setup, prefix, suffix)
    if setup.planners:
        planner = setup.planners[phase.index]
        planner.cut, planner.cached = prefix is not None, isinstance(prefix, CachedPrefix)
        planner.packed, planner.shortcuts = setup.packed, suffix.shortcuts
    on, why, setup.costs[phase.index] = _decide_recompute(setup, phase)
    log.info("gradient checkpointing: %s", why)
    if on:
        checkpoint_blocks(suffix.blocks(phase.mask.boundary))
    shown = tuple(audit(phase.mask, loaded.anatomy)), audit_markdown(phase.mask, loaded.anatomy)
    whole = JoinedModel(loaded.model, loaded.anatomy, None if prefix is None else phase.mask.boundary)
    del loaded  # what only a later phase would need is to be gone before the engine allocates
    if phase is phases[-1]:
        setup.loaded = None
    malloc.release_free_memory()
    engine = _build_engine(setup, prefix, suffix, phase)
    setup.active = Active(phase, prefix, suffix, engine, *shown, whole)
    setup.reading = prefix


def _job(setup: Setup, phase: Phase) -> CutJob:
    return CutJob(
        setup.config, setup.tokenizer, phase.mask, setup.base, setup.dataset,
        setup.plan.passes(phase.end, phase.start), setup.world, changes=len(setup.schedule.phases) > 1,
    )  # fmt: skip


def _settle(setup: Setup, prefix: HiddenStates | None, suffix: Suffix) -> None:
    """Find out on rows of the data what may be left out at the top, and in the first phase whether to pack."""
    examples, device = (*setup.dataset.train, *setup.dataset.validation), setup.world.device
    row = collate([shortest(setup.dataset.train)], pad_id=0).to(device)
    log.info("supervised positions: %s", suffix.choose_shortcuts(prefix(row) if prefix else None, row).text)
    if setup.packing is None:
        rows = setup.config.train.micro_batch_size
        setup.packing = choose_packing(setup.config.data.packing, rows, prefix, suffix, examples, device)
        log.info("packing: %s", setup.packing.reason)


def _decide_recompute(setup: Setup, phase: Phase) -> tuple[bool, str, Plan | None]:
    """Whether the recipe or memory asks for gradient checkpointing in a phase, why, and the plan of the phase."""
    train = setup.config.train
    plans: dict[bool, Plan] = {}
    if setup.planners:
        planner = setup.planners[phase.index]
        try:
            plans = {on: planner.plan(planner.variant(spec_of(setup), recompute=on)) for on in (False, True)}
        except PlanError as error:
            log.warning("%s", error)
    memory = plans[False].memory if plans else None
    free = -int(setup.world.max(-free_bytes(setup.world.device)))  # the tightest rank decides for all
    decision = decide_checkpointing(
        train.gradient_checkpointing, memory.beside_weights if memory else None, free,
        in_update=memory is not None and memory.moment == "update",
    )  # fmt: skip
    return decision.on, decision.reason, plans.get(decision.on)


def spec_of(setup: Setup) -> EngineSpec:
    """What the plan has to know of the run's engine."""
    accumulation, name = setup.config.train.gradient_accumulation_steps, setup.config.optim.name
    on_cpu = setup.world.device.type == "cpu"
    return engine_spec(setup.ds_config, setup.world.size, accumulation, name, host_is_device=on_cpu)


def _build_engine(setup: Setup, prefix: HiddenStates | None, suffix: Suffix, phase: Phase) -> Engine:
    config = setup.config
    parameters = trainable_parameters(suffix.model, phase.mask)
    shared = (suffix, parameters, phase.groups, config.train, config.optim, setup.total_steps, setup.world)
    if setup.ds_config is None:
        return LocalEngine(*shared)
    setup.libraries += grown_by("toolkit.engine.deepspeed.engine")
    from toolkit.engine.deepspeed.engine import ZeroEngine  # DeepSpeed is imported only by runs that use it

    cost = setup.costs[phase.index]
    make_room(setup.ds_config, setup.world, cost.memory.files if cost else 0)

    below = prefix.skeleton.named_parameters() if isinstance(prefix, Prefix) else ()
    copies = {name: parameter for name, parameter in below if name in parameters}
    return ZeroEngine(*shared, copies, setup.ds_config)
