"""Build the phases of a mask schedule, and hand the training state over from one to the next.

A run without a schedule has one phase. A tensor that stays trainable keeps its fp32 master and moments. One that stops
training keeps its rounded value in the model, and its master for checkpoints. One that trains again later starts from
its master, with fresh moments.
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
from toolkit.config.policy import Decision, most_rows_at_once
from toolkit.data.batches import Batch, collate
from toolkit.engine.base import Engine
from toolkit.engine.deepspeed.nvme_files import prepare_swap_folders
from toolkit.engine.local import LocalEngine
from toolkit.mask.apply import apply_mask, replace_parameters, trainable_parameters, unused_adapters
from toolkit.mask.audit import audit_table
from toolkit.mask.layer_mask import LayerMask
from toolkit.mask.row_layers import unused_rows
from toolkit.mask.schedule import Phase
from toolkit.models.probe import called_modules, evaluation_mode
from toolkit.optim.state_fragments import AdamState
from toolkit.planning.planner import Plan, Planner
from toolkit.runtime.errors import MaskError
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
class _CutModel:
    """The model as a phase cuts and plans it, before an engine is built."""

    phase: Phase
    prefix: HiddenStates | None
    """Computes or reads the hidden states at the frost line; None if the model is not cut."""
    suffix: Suffix
    joined: JoinedModel
    """Joins prefix and suffix to one model again, to generate with."""
    packing: Decision
    """Whether micro batches are packed; decided in the first phase."""
    planner: Planner | None
    """Planner of this phase as it was built; None for an architecture that cannot be planned."""
    plan: Plan | None
    """Plan of this phase as it was built; None if it cannot be planned."""

    @property
    def mask(self) -> LayerMask:
        """The mask of what trains."""
        return self.phase.mask


@dataclass(frozen=True)
class PhaseState(_CutModel):
    """The current phase of the mask schedule, ready to train."""

    engine: Engine
    plans: tuple[Plan | None, ...]
    """Plan of each phase: as built for those that have begun, as expected for those to come."""
    resting: Mapping[str, torch.Tensor]
    """On rank 0, the fp32 masters of tensors that trained in earlier phases and are frozen now."""


@dataclass(frozen=True)
class Handover:
    """The training state that a phase leaves for the next one."""

    packing: Decision
    plans: tuple[Plan | None, ...]
    masters: Mapping[str, torch.Tensor]
    """On rank 0, the fp32 masters of all tensors that have trained so far."""
    states: Mapping[str, AdamState]
    """On rank 0, masters and moments of the tensors that trained in the phase that ended."""
    schedule_step: int
    """Steps that the learning-rate scheduler has done."""


def build_phase(context: RunContext, model: ModelHandle, phase: Phase, handover: Handover | None = None) -> PhaseState:
    """Apply the mask of ``phase``, cut the model at the frost line, and build the engine that trains the suffix.

    ``handover`` is what ``end_phase`` returned for the phase before, whose ``PhaseState`` must not be referenced any
    more; None for the first phase. The last phase frees ``model``.
    """
    if handover is not None:
        gc.collect()  # DeepSpeed's objects refer to one another and to the masters, and the parameters refer to them
    cut_model = _cut_model(context, model, phase, handover.packing if handover else None)
    if phase is context.schedule.phases[-1]:
        model.free()  # what only a later phase would need is to be gone before anybody looks at what is free
    cut_model = replace(cut_model, plan=_decide_checkpointing(context, cut_model))
    engine = _build_engine(context, cut_model)
    plans = list(handover.plans if handover else context.plans)
    plans[phase.index] = cut_model.plan
    resting = _continue_training(phase, engine, handover) if handover else {}
    return PhaseState(**vars(cut_model), engine=engine, plans=tuple(plans), resting=resting)


def end_phase(model: ModelHandle, state: PhaseState) -> Handover:
    """Free the engine, put its tensors back into the model, and return the training state; every rank calls it.

    ``state`` cannot be used afterwards, and its memory is freed once no variable refers to it.
    """
    engine = state.engine
    states, schedule_step = engine.states(), engine.schedule_step
    if isinstance(state.prefix, CachedPrefix):
        log.info("%s", state.prefix.close())
    replace_parameters(model.loaded.model, engine.release())
    masters = {**state.resting, **{name: state_of_tensor.master for name, state_of_tensor in states.items()}}
    return Handover(state.packing, state.plans, masters, states, schedule_step)


def resume(context: RunContext, model: ModelHandle, path: Path) -> tuple[PhaseState, Progress]:
    """Build the phase of a checkpoint's last step, and load the checkpoint into it; every rank calls it.

    A checkpoint at the end of a phase resumes in that phase, and the training loop then changes to the next one as it
    did when the checkpoint was written. Number of ranks, engine and ZeRO stage may differ from the checkpoint's.
    ``path`` is a verified checkpoint, ``model`` as loaded.

    Raises:
        CheckpointError: it does not fit this run (see ``Checkpoint.require_fit``), or is damaged.
    """
    checkpoint = Checkpoint(path)
    saved, world = checkpoint.state, context.world
    phase = context.schedule.at(max(saved.step - 1, 0))
    order = order_digest(len(context.dataset.train), context.config.train.seed, saved.epoch)
    checkpoint.require_fit(phase.delta_mask, context.base, context.fingerprints, order)
    _log_changes(context, saved)
    delta = checkpoint.delta()
    _copy_trained_tensors(model, phase, delta)
    state = build_phase(context, model, phase)
    checkpoint.shards.load(state.engine.fragments())
    state.engine.continue_at(saved.schedule_step)
    if world.is_main:
        resting = {name: own.clone() for name, own in delta.tensors.items() if name not in phase.trained_since}
        state = replace(state, resting=resting)
    checkpoint.restore_generators(world)
    return state, Progress.of(saved)


def content_of(context: RunContext, phase_state: PhaseState, progress: Progress) -> CheckpointContent:
    """Return the content of a checkpoint at ``progress``, for ``Saver.save``."""
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
    return CheckpointContent(state, engine, phase_state.resting, phase.delta_mask, context.base)


def _cut_model(context: RunContext, model: ModelHandle, phase: Phase, packing: Decision | None) -> _CutModel:
    """Apply the mask, cut the model, and decide on shortcuts and packing."""
    loaded, phases = model.loaded, context.schedule.phases
    apply_mask(loaded.model, phase.mask, loaded.anatomy, context.config.train.seed)
    if context.mask_changes:
        log.info("phase %d of %d: steps %d to %d", phase.index + 1, len(phases), phase.start + 1, phase.end)
    name = context.config.model.name_or_path
    log.info("layer mask of %s:\n%s", name, audit_table(phase.mask, loaded.anatomy))
    prefix, suffix = cut(context, loaded, phase)
    device = context.world.device
    row = collate([context.dataset.train.shortest()], pad_id=0).to(device)
    hidden = prefix(row) if prefix else None
    if phase.mask.adapters or phase.mask.rows:
        _require_used_adapters(suffix, hidden, row)
    suffix.choose_shortcuts(hidden, row)
    log.info("supervised positions: %s", suffix.loss_text)
    if packing is None:
        mode, rows = context.config.data.packing, most_rows_at_once(context.config.train)
        packing = choose_packing(mode, rows, prefix, suffix, context.examples, device)
        log.info("packing: %s", packing.reason)
    planner = None
    if context.planners:
        planner = replace(
            context.planners[phase.index], cut=prefix is not None, cached=isinstance(prefix, CachedPrefix),
            packed=packing.on, shortcuts=suffix.shortcuts,
        )  # fmt: skip
    joined = JoinedModel(loaded.model, loaded.anatomy, None if prefix is None else phase.mask.boundary)
    return _CutModel(phase, prefix, suffix, joined, packing, planner, plan=None)


def _decide_checkpointing(context: RunContext, cut_model: _CutModel) -> Plan | None:
    """Decide on activation checkpointing by the memory that is free now, and apply it; return the plan with it."""
    checkpointing, plan = choose_checkpointing(context, cut_model.planner)
    log.info("gradient checkpointing: %s", checkpointing.reason)
    if checkpointing.on:
        checkpoint_blocks(cut_model.suffix.blocks(cut_model.mask.boundary))
    return plan


def _require_used_adapters(suffix: Suffix, hidden: torch.Tensor | None, row: Batch) -> None:
    """Raise MaskError if the model does not call a layer with an adapter or rows, which would then learn nothing."""
    with evaluation_mode(suffix):
        called = called_modules(suffix.model, lambda: suffix.logits(hidden, row))
    unused = unused_adapters(suffix.model, called)
    if tables := unused_rows(suffix.model, called):
        raise MaskError(
            f"mask.train: rows trains some of {tables[0]}, which this model never calls: it computes with its weight "
            "past the rows. Train the table whole, or leave it out"
        )
    if unused:
        raise MaskError(
            f"mask.train: lora adapts {unused[0]} and {len(unused) - 1} more layers that this model never calls: it "
            "computes past an adapter there, or not at all. Name the other layers in lora.targets"
        )


def _build_engine(context: RunContext, cut_model: _CutModel) -> Engine:
    """Build the engine of the recipe for the suffix: DeepSpeed if there is a DeepSpeed file, else local."""
    config, suffix, prefix, plan = context.config, cut_model.suffix, cut_model.prefix, cut_model.plan
    parameters = trainable_parameters(suffix.model, cut_model.mask)
    groups = cut_model.phase.groups
    arguments = (suffix, parameters, groups, config.train, config.optim, context.total_steps, context.world)
    if context.ds_config is None:
        engine = LocalEngine(*arguments)
        if context.world.device.type == "cuda":
            log.info("update of float32 moments: %s", engine.kernels.reason)
        if engine.buckets is not None:
            log.info("%s", engine.buckets.text)
        return engine
    from toolkit.engine.deepspeed.engine import ZeroEngine  # DeepSpeed is imported only by runs that use it

    prepare_swap_folders(context.ds_config, context.world, plan.memory.files if plan else 0)
    below = prefix.model.named_parameters() if isinstance(prefix, Prefix) else ()
    copies = {name: parameter for name, parameter in below if name in parameters}
    return ZeroEngine(*arguments, copies, context.ds_config)


def _continue_training(phase: Phase, engine: Engine, handover: Handover) -> dict[str, torch.Tensor]:
    """Load the state of the phase before into the engine; return the masters of tensors that are frozen in this one."""
    masters = handover.masters
    continuing = [name for name in phase.mask.names if name in masters]
    states = {name: handover.states.get(name, AdamState(masters[name])) for name in continuing}
    engine.load_states(states, handover.schedule_step)
    return {name: master for name, master in masters.items() if name not in phase.trained_since}


def _log_changes(context: RunContext, saved: CheckpointState) -> None:
    """Log changes of versions and ranks, by which a resumed run may differ from an uninterrupted one in rounding."""
    now = versions()
    for name, version in saved.versions.items():
        if now.get(name) != version:
            log.warning("the checkpoint was written with %s %s, this is %s", name, version, now.get(name, "unknown"))
    if saved.ranks != context.world.size:
        log.info("the checkpoint was written by %d rank(s), this run has %d", saved.ranks, context.world.size)


@torch.no_grad()
def _copy_trained_tensors(model: ModelHandle, phase: Phase, delta: Delta) -> None:
    """Copy all tensors that trained up to ``phase`` from a checkpoint into the model, rounded to its precision."""
    loaded = model.loaded
    apply_mask(loaded.model, phase.delta_mask, loaded.anatomy)
    for name, parameter in trainable_parameters(loaded.model, phase.delta_mask).items():
        parameter.copy_(delta.tensors[name])
