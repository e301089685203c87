"""From one phase of the mask's schedule to the next, with all that training has made so far.

What stays trainable takes its float32 master and its moments along. What stops training keeps its rounded value in the
model and its master for the checkpoints. What begins anew after a rest goes on from its master, with fresh moments.
"""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import torch

from toolkit.activation_cache.cached_prefix import CachedPrefix
from toolkit.checkpoint.delta import Delta
from toolkit.checkpoint.restore import Checkpoint
from toolkit.checkpoint.saver import CheckpointContent
from toolkit.checkpoint.state import CheckpointState
from toolkit.mask.apply import apply_mask, put_tensors, trainable_parameters
from toolkit.mask.schedule import Phase
from toolkit.optim.state_fragments import AdamState, gather_states, load_fragments
from toolkit.training.fingerprints import versions
from toolkit.training.progress import Progress, order_digest
from toolkit.training.setup import Setup, begin

log = logging.getLogger("frostline")


def content_of(setup: Setup, progress: Progress) -> CheckpointContent:
    """What a checkpoint at ``progress`` is made of."""
    phase = setup.active.phase
    state = CheckpointState(
        step=progress.step,
        total_steps=setup.total_steps,
        epoch=progress.epoch,
        cursor=progress.cursor,
        rows=progress.rows,
        order=order_digest(progress.rows, setup.config.train.seed, progress.epoch),
        global_batch=setup.plan.global_batch,
        phase=phase.index,
        schedule_step=setup.engine.schedule_step,
        engine=setup.engine.name,
        ranks=setup.world.size,
        totals=progress.totals,
        fingerprints=setup.fingerprints,
        versions=versions(),
        recipe=setup.config.model_dump(mode="json"),
    )
    return CheckpointContent(state, setup.engine, setup.resting, phase.trained, setup.base)


def advance(setup: Setup, step: int) -> None:
    """Begin the next phase after ``step`` steps; every rank calls it."""
    engine, world = setup.engine, setup.world
    state = gather_states(engine.fragments(), engine.shapes, engine.is_replicated, world)
    schedule_step = engine.schedule_step
    del engine
    phase = setup.schedule.phases[setup.active.phase.index + 1]
    _take_apart(setup)
    setup.resting |= {name: own.master for name, own in state.items()}
    begin(setup, phase)
    awake = [name for name in phase.mask.names if name in setup.resting]
    carried = {name: state.get(name, AdamState(setup.resting[name])) for name in awake}
    load_fragments(setup.engine.fragments(), setup.engine.shapes, carried, world)
    setup.engine.continue_at(schedule_step)
    setup.resting = {name: master for name, master in setup.resting.items() if name not in phase.entered}


def resume(setup: Setup, path: Path) -> Progress:
    """Begin the phase of a checkpoint's last step, and go on from the checkpoint; every rank calls it.

    A checkpoint at the end of a phase is continued in that phase, and the loop then changes to the next one as it did
    when the checkpoint was written. Ranks, engine and ZeRO stage may be others than those that wrote it.

    Args:
        setup: as ``prepare`` returns it.
        path: a verified checkpoint.

    Raises:
        CheckpointError: it does not fit this run (see ``Checkpoint.require_fit``), or is damaged.
    """
    checkpoint = Checkpoint(path)
    state = checkpoint.state
    phase = setup.schedule.at(max(state.step - 1, 0))
    order = order_digest(len(setup.dataset.train), setup.config.train.seed, state.epoch)
    checkpoint.require_fit(phase.trained, setup.base, setup.fingerprints, order)
    _note_changes(setup, state)
    delta = checkpoint.delta()
    _put_trained(setup, phase, delta)
    begin(setup, phase)
    checkpoint.shards.fill(setup.engine.fragments())
    setup.engine.continue_at(state.schedule_step)
    if setup.world.is_main:
        setup.resting = {name: own.clone() for name, own in delta.tensors.items() if name not in phase.entered}
    checkpoint.restore_generators(setup.world)
    return Progress.of(state)


def _note_changes(setup: Setup, state: CheckpointState) -> None:
    """Say what may make the rest differ from an uninterrupted run by rounding."""
    now = versions()
    for name, version in state.versions.items():
        if now.get(name) != version:
            log.warning("the checkpoint was written with %s %s, this is %s", name, version, now.get(name, "unknown"))
    if state.ranks != setup.world.size:
        log.info("the checkpoint was written by %d rank(s), this run has %d", state.ranks, setup.world.size)


def _take_apart(setup: Setup) -> None:
    """Free the engine and both halves, and leave the whole model in plain parameters."""
    assert setup.loaded is not None
    setup.reading = None
    if isinstance(setup.prefix, CachedPrefix):
        log.info("%s", setup.prefix.close())
    put_tensors(setup.loaded.model, setup.engine.release())
    del setup.active
    gc.collect()  # DeepSpeed's objects refer to one another and to the masters, and the parameters refer to them


@torch.no_grad()
def _put_trained(setup: Setup, phase: Phase, delta: Delta) -> None:
    """Round all that trained up to ``phase`` into the model."""
    assert setup.loaded is not None
    apply_mask(setup.loaded.model, phase.trained, setup.loaded.anatomy)
    for name, parameter in trainable_parameters(setup.loaded.model, phase.trained).items():
        parameter.copy_(delta.tensors[name])
