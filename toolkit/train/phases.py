"""From one phase of the mask's schedule to the next, with all that training has made so far.

What stays trainable takes its float32 master and its moments along. What stops training keeps its rounded value in the
model and its master for the checkpoints. What begins anew after a rest goes on from its master, with fresh moments.
"""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import torch

from toolkit.checkpoint import State, read_fitting, read_state
from toolkit.engine.base import AdamState
from toolkit.mask.apply import apply_mask, put_tensors, trainable_parameters
from toolkit.mask.schedule import Phase
from toolkit.prefix.cached import CachedPrefix
from toolkit.train.setup import Setup, begin

log = logging.getLogger("frostline")


def state_of(setup: Setup, step: int) -> State:
    """What a checkpoint after ``step`` steps says of itself."""
    return State(
        step=step,
        total_steps=setup.total_steps,
        engine=setup.engine.name,
        ranks=setup.world.size,
        data=setup.dataset.fingerprint,
        schedule=setup.schedule.sha256,
    )


def advance(setup: Setup, step: int) -> None:
    """Begin the next phase after ``step`` steps; every rank calls it."""
    state = setup.engine.state()
    phase = setup.schedule.phases[setup.active.phase.index + 1]
    _take_apart(setup)
    setup.resting |= {name: own.master for name, own in state.items()}
    begin(setup, phase)
    awake = [name for name in phase.mask.names if name in setup.resting]
    carried = {name: state.get(name, AdamState(setup.resting[name])) for name in awake}
    setup.engine.adopt(carried, phase.ages(step), step)
    setup.resting = {name: master for name, master in setup.resting.items() if name not in phase.entered}


def resume(setup: Setup, checkpoint: Path) -> int:
    """Go on from a checkpoint, in the phase of its last step; every rank calls it, in the first phase.

    A checkpoint at the end of a phase is continued in that phase, and the loop then changes to the next one as it did
    when the checkpoint was written.

    Returns:
        The steps that are done.

    Raises:
        CheckpointError: it does not fit this run (see ``toolkit.checkpoint.read_fitting``).
    """
    step = read_state(checkpoint).step
    phase = setup.schedule.at(max(step - 1, 0))
    delta = read_fitting(checkpoint, state_of(setup, step), phase.trained, setup.base)
    if phase is not setup.active.phase:
        _take_apart(setup)
        _put_trained(setup, phase, delta.tensors)
        begin(setup, phase)
    setup.engine.load(checkpoint / "engine", delta.tensors)
    if setup.world.is_main:
        setup.resting = {name: master for name, master in delta.tensors.items() if name not in phase.entered}
    return step


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
def _put_trained(setup: Setup, phase: Phase, tensors: dict[str, torch.Tensor]) -> None:
    """Round all that trained up to ``phase`` into the model."""
    assert setup.loaded is not None
    apply_mask(setup.loaded.model, phase.trained, setup.loaded.anatomy)
    for name, parameter in trainable_parameters(setup.loaded.model, phase.trained).items():
        parameter.copy_(tensors[name])
