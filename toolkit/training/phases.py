"""Build the phases of a mask schedule, and hand the training state over from one to the next.

A run without a schedule has one phase. A tensor that stays trainable keeps its fp32 master and moments. One that stops
training keeps its rounded value in the model, and its master for checkpoints. One that trains again later starts from
its master, with fresh moments. The turns of a rotation have one frost line, so the cut goes along as well.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from toolkit.activation_cache.cached_prefix import CachedPrefix
from toolkit.checkpoint.delta import Delta
from toolkit.checkpoint.restore import Checkpoint
from toolkit.checkpoint.saver import CheckpointContent
from toolkit.checkpoint.state import CheckpointState
from toolkit.config.policy import Decision
from toolkit.engine.base import Engine
from toolkit.engine.deepspeed.nvme_files import prepare_swap_folders
from toolkit.engine.local import LocalEngine
from toolkit.mask.apply import apply_mask, replace_parameters, trainable_parameters
from toolkit.mask.schedule import Phase
from toolkit.optim.state_fragments import AdamState
from toolkit.planning.planner import Plan
from toolkit.split.prefix import Prefix
from toolkit.training.context import ModelHandle, RunContext
from toolkit.training.fingerprints import versions
from toolkit.training.phase_cut import KeptCut, PhaseCut, cut_again, cut_phase, with_checkpointing
from toolkit.training.progress import Progress, order_digest

log = logging.getLogger("frostline")


@dataclass(frozen=True)
class PhaseState(PhaseCut):
    """The current phase of the mask schedule, ready to train."""

    engine: Engine
    plans: tuple[Plan | None, ...]
    """Plan of each of ``RunContext.planners``: as built for phases that have begun, as expected for those to come."""
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
    kept: KeptCut | None
    """The cut, where the next phase is a turn of the same rotation; else None."""


def build_phase(context: RunContext, model: ModelHandle, phase: Phase, handover: Handover | None = None) -> PhaseState:
    """Apply the mask of ``phase``, cut the model at the frost line, and build the engine that trains the suffix.

    ``handover`` is what ``end_phase`` returned for the phase before, whose ``PhaseState`` must not be referenced any
    more; None for the first phase. The last phase frees ``model``.
    """
    if handover is not None:
        gc.collect()  # DeepSpeed's objects refer to one another and to the masters, and the parameters refer to them
    if handover is not None and handover.kept is not None:
        cut_model = cut_again(context, model, phase, handover.kept)
    else:
        cut_model = cut_phase(context, model, phase, handover.packing if handover else None)
    if phase is context.schedule.phases[-1]:
        model.free()  # what only a later phase would need is to be gone before anybody looks at what is free
    if handover is None or handover.kept is None:
        cut_model = with_checkpointing(context, cut_model)
    engine = _build_engine(context, cut_model)
    plans = list(handover.plans if handover else context.plans)
    plans[context.planned_as(phase)] = cut_model.plan
    resting = _continue_training(phase, engine, handover) if handover else {}
    return PhaseState(**vars(cut_model), engine=engine, plans=tuple(plans), resting=resting)


def end_phase(context: RunContext, model: ModelHandle, state: PhaseState) -> Handover:
    """Free the engine, put its tensors back into the model, and return the training state; every rank calls it.

    ``state`` cannot be used afterwards, and its memory is freed once no variable refers to it.
    """
    engine = state.engine
    states, schedule_step = engine.states(), engine.schedule_step
    kept = KeptCut.of(state) if context.schedule.rotation is not None else None
    if kept is None and isinstance(state.prefix, CachedPrefix):
        log.info("%s", state.prefix.close())
    replace_parameters(model.loaded.model, engine.release())
    masters = {**state.resting, **{name: state_of_tensor.master for name, state_of_tensor in states.items()}}
    return Handover(state.packing, state.plans, masters, states, schedule_step, kept)


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


def _build_engine(context: RunContext, cut_model: PhaseCut) -> Engine:
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
    states: dict[str, AdamState] = {}
    for name in phase.mask.names:
        if name in masters:  # it has trained before, up to this step or to an earlier one
            begins_anew = phase.trained_since[name] == phase.start or name not in handover.states
            states[name] = AdamState(masters[name]) if begins_anew else handover.states[name]
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
