"""Build what the current mask runs on, and hand over from one phase of the mask's schedule to the next.

What stays trainable keeps its float32 master and its moments. What stops training keeps its rounded value in the model
and its master for the checkpoints. What trains again after a rest starts from its master, with fresh moments.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from toolkit.activation_cache.cached_prefix import CachedPrefix, HiddenStates
from toolkit.activation_cache.packing import choose_packing
from toolkit.checkpoint.delta import Delta
from toolkit.checkpoint.restore import Checkpoint
from toolkit.checkpoint.saver import CheckpointContent
from toolkit.checkpoint.state import CheckpointState
from toolkit.config.policy import Decision
from toolkit.data.batches import collate
from toolkit.data.examples import shortest
from toolkit.engine.base import Engine
from toolkit.engine.deepspeed.nvme_files import make_room
from toolkit.engine.local import LocalEngine
from toolkit.mask.apply import apply_mask, put_tensors, trainable_parameters
from toolkit.mask.audit import AuditRow, audit, audit_markdown, audit_table
from toolkit.mask.layer_mask import LayerMask
from toolkit.mask.schedule import Phase
from toolkit.optim.state_fragments import AdamState, gather_states, load_fragments
from toolkit.planning.planner import Plan, Planner
from toolkit.runtime import malloc
from toolkit.split.activation_checkpointing import checkpoint_blocks
from toolkit.split.joined_model import JoinedModel
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import Suffix
from toolkit.training.context import ModelHandle, RunContext, choose_checkpointing
from toolkit.training.cut import cut
from toolkit.training.fingerprints import versions
from toolkit.training.progress import Progress, order_digest

log = logging.getLogger("frostline")


@dataclass(frozen=True)
class PhaseState:
    """The halves, the engine and the decisions of the current phase of the mask's schedule."""

    phase: Phase
    prefix: HiddenStates | None
    """Gives the hidden states at the frost line; None if the model is not cut."""
    suffix: Suffix
    engine: Engine
    audit_rows: tuple[AuditRow, ...]
    """What trains and what does not, from input to head."""
    audit: str
    """The same in Markdown."""
    joined: JoinedModel
    """The model as one piece again, to generate with."""
    packing: Decision
    """Whether micro batches are packed; decided in the first phase."""
    planner: Planner | None
    """Plans this phase as it was built; None for an architecture that cannot be planned."""
    plans: tuple[Plan | None, ...]
    """Plan of each phase: as built for those that have begun, as expected for those to come."""
    resting: Mapping[str, torch.Tensor]
    """On rank 0, the float32 masters of what trained in earlier phases and does not now."""

    @property
    def mask(self) -> LayerMask:
        """Return the mask of what trains."""
        return self.phase.mask

    @property
    def plan(self) -> Plan | None:
        """The plan of this phase; None if it cannot be planned."""
        return self.plans[self.phase.index]


@dataclass(frozen=True)
class Handover:
    """The training state that a phase leaves for the next one."""

    packing: Decision
    plans: tuple[Plan | None, ...]
    masters: Mapping[str, torch.Tensor]
    """On rank 0, the float32 masters of all that trained so far."""
    states: Mapping[str, AdamState]
    """On rank 0, masters and moments of what trained in the phase that ended."""
    schedule_step: int
    """Steps that the learning-rate schedule has done."""


@dataclass(frozen=True)
class _Parts:
    """The halves of the model, with what was decided about them."""

    prefix: HiddenStates | None
    suffix: Suffix
    packing: Decision
    planner: Planner | None
    plan: Plan | None
    audit_rows: tuple[AuditRow, ...]
    audit: str
    joined: JoinedModel


def build_phase(context: RunContext, model: ModelHandle, phase: Phase, handover: Handover | None = None) -> PhaseState:
    """Apply the mask of ``phase``, cut the model at the frost line, and give what trains to an engine.

    Args:
        context: of the run.
        model: the whole model, in plain parameters; freed in the last phase.
        phase: the one to begin.
        handover: of the phase before, whose ``PhaseState`` nothing refers to any more; None in the first phase.
    """
    if handover is not None:
        gc.collect()  # DeepSpeed's objects refer to one another and to the masters, and the parameters refer to them
    parts = _cut_model(context, model, phase, handover.packing if handover else None)
    if phase is context.schedule.phases[-1]:
        model.free()  # what only a later phase would need is to be gone before the engine allocates
    malloc.release_free_memory()
    engine = _build_engine(context, phase, parts)
    plans = list(handover.plans if handover else context.plans)
    plans[phase.index] = parts.plan
    masters = _continue_training(context, phase, engine, handover) if handover else {}
    return PhaseState(
        phase, parts.prefix, parts.suffix, engine, parts.audit_rows, parts.audit, parts.joined, parts.packing,
        parts.planner, tuple(plans), masters,
    )  # fmt: skip


def end_phase(context: RunContext, model: ModelHandle, state: PhaseState) -> Handover:
    """Free the engine, and leave the whole model in plain parameters; every rank calls it.

    ``state`` cannot be used afterwards, and its memory is free once no variable refers to it.
    """
    engine = state.engine
    states = gather_states(engine.fragments(), engine.shapes, engine.is_replicated, context.world)
    schedule_step = engine.schedule_step
    if isinstance(state.prefix, CachedPrefix):
        log.info("%s", state.prefix.close())
    put_tensors(model.loaded.model, engine.release())
    masters = {**state.resting, **{name: own.master for name, own in states.items()}}
    return Handover(state.packing, state.plans, masters, states, schedule_step)


def resume(context: RunContext, model: ModelHandle, path: Path) -> tuple[PhaseState, Progress]:
    """Build the phase of a checkpoint's last step, and go on from the checkpoint; every rank calls it.

    A checkpoint at the end of a phase is continued in that phase, and the loop then changes to the next one as it did
    when the checkpoint was written. Ranks, engine and ZeRO stage may be others than those that wrote it.

    Args:
        context: of the run.
        model: the whole model, as loaded.
        path: a verified checkpoint.

    Raises:
        CheckpointError: it does not fit this run (see ``Checkpoint.require_fit``), or is damaged.
    """
    checkpoint = Checkpoint(path)
    saved, world = checkpoint.state, context.world
    phase = context.schedule.at(max(saved.step - 1, 0))
    order = order_digest(len(context.dataset.train), context.config.train.seed, saved.epoch)
    checkpoint.require_fit(phase.trained, context.base, context.fingerprints, order)
    _note_changes(context, saved)
    delta = checkpoint.delta()
    _put_trained(model, phase, delta)
    state = build_phase(context, model, phase)
    checkpoint.shards.fill(state.engine.fragments())
    state.engine.continue_at(saved.schedule_step)
    if world.is_main:
        resting = {name: own.clone() for name, own in delta.tensors.items() if name not in phase.entered}
        state = replace(state, resting=resting)
    checkpoint.restore_generators(world)
    return state, Progress.of(saved)


def content_of(context: RunContext, phase_state: PhaseState, progress: Progress) -> CheckpointContent:
    """Return what a checkpoint at ``progress`` is made of."""
    phase, engine = phase_state.phase, phase_state.engine
    state = CheckpointState(
        step=progress.step,
        total_steps=context.total_steps,
        epoch=progress.epoch,
        cursor=progress.cursor,
        rows=progress.rows,
        order=order_digest(progress.rows, context.config.train.seed, progress.epoch),
        global_batch=context.batch_plan.global_batch,
        phase=phase.index,
        schedule_step=engine.schedule_step,
        engine=engine.name,
        ranks=context.world.size,
        totals=progress.totals,
        fingerprints=context.fingerprints,
        versions=versions(),
        recipe=context.config.model_dump(mode="json"),
    )
    return CheckpointContent(state, engine, phase_state.resting, phase.trained, context.base)


def _cut_model(context: RunContext, model: ModelHandle, phase: Phase, packing: Decision | None) -> _Parts:
    """Apply the mask, cut the model, and decide on rows of the data how the halves compute."""
    loaded, phases = model.loaded, context.schedule.phases
    apply_mask(loaded.model, phase.mask, loaded.anatomy)
    if context.mask_changes:
        log.info("phase %d of %d: steps %d to %d", phase.index + 1, len(phases), phase.start + 1, phase.end)
    name = context.config.model.name_or_path
    log.info("layer mask of %s:\n%s", name, audit_table(phase.mask, loaded.anatomy))
    prefix, suffix = cut(context, loaded, phase)
    device = context.world.device
    row = collate([shortest(context.dataset.train)], pad_id=0).to(device)
    log.info("supervised positions: %s", suffix.choose_shortcuts(prefix(row) if prefix else None, row).text)
    if packing is None:
        mode, rows = context.config.data.packing, context.config.train.micro_batch_size
        packing = choose_packing(mode, rows, prefix, suffix, context.examples, device)
        log.info("packing: %s", packing.reason)
    planner = None
    if context.planners:
        planner = replace(
            context.planners[phase.index], cut=prefix is not None, cached=isinstance(prefix, CachedPrefix),
            packed=packing.on, shortcuts=suffix.shortcuts,
        )  # fmt: skip
    checkpointing, plan = choose_checkpointing(context, planner)
    log.info("gradient checkpointing: %s", checkpointing.reason)
    if checkpointing.on:
        checkpoint_blocks(suffix.blocks(phase.mask.boundary))
    rows_of_audit = tuple(audit(phase.mask, loaded.anatomy))
    joined = JoinedModel(loaded.model, loaded.anatomy, None if prefix is None else phase.mask.boundary)
    return _Parts(
        prefix, suffix, packing, planner, plan, rows_of_audit, audit_markdown(phase.mask, loaded.anatomy), joined
    )


def _build_engine(context: RunContext, phase: Phase, parts: _Parts) -> Engine:
    config, suffix, prefix = context.config, parts.suffix, parts.prefix
    parameters = trainable_parameters(suffix.model, phase.mask)
    shared = (suffix, parameters, phase.groups, config.train, config.optim, context.total_steps, context.world)
    if context.ds_config is None:
        return LocalEngine(*shared)
    from toolkit.engine.deepspeed.engine import ZeroEngine  # DeepSpeed is imported only by runs that use it

    make_room(context.ds_config, context.world, parts.plan.memory.files if parts.plan else 0)
    below = prefix.model.named_parameters() if isinstance(prefix, Prefix) else ()
    copies = {name: parameter for name, parameter in below if name in parameters}
    return ZeroEngine(*shared, copies, context.ds_config)


def _continue_training(
    context: RunContext, phase: Phase, engine: Engine, handover: Handover
) -> dict[str, torch.Tensor]:
    """Give the engine what the phase before left; return the masters of what does not train in this one."""
    masters = handover.masters
    awake = [name for name in phase.mask.names if name in masters]
    carried = {name: handover.states.get(name, AdamState(masters[name])) for name in awake}
    load_fragments(engine.fragments(), engine.shapes, carried, context.world)
    engine.continue_at(handover.schedule_step)
    return {name: master for name, master in masters.items() if name not in phase.entered}


def _note_changes(context: RunContext, saved: CheckpointState) -> None:
    """Log what may make the rest differ from an uninterrupted run by rounding."""
    now = versions()
    for name, version in saved.versions.items():
        if now.get(name) != version:
            log.warning("the checkpoint was written with %s %s, this is %s", name, version, now.get(name, "unknown"))
    if saved.ranks != context.world.size:
        log.info("the checkpoint was written by %d rank(s), this run has %d", saved.ranks, context.world.size)


@torch.no_grad()
def _put_trained(model: ModelHandle, phase: Phase, delta: Delta) -> None:
    """Round all that trained up to ``phase`` into the model."""
    loaded = model.loaded
    apply_mask(loaded.model, phase.trained, loaded.anatomy)
    for name, parameter in trainable_parameters(loaded.model, phase.trained).items():
        parameter.copy_(delta.tensors[name])
