"""The loop: epochs, validation, checkpoints and signals around the training step."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from toolkit import distributed
from toolkit.checkpoint import commit
from toolkit.config.flags import Invocation
from toolkit.config.load import dump
from toolkit.consistency import facts, require_same
from toolkit.data.batches import epoch_order, step_batches
from toolkit.data.prefetch import Prefetcher, on_device
from toolkit.distributed import World
from toolkit.evaluate import evaluate
from toolkit.monitor import Monitor, StepMetrics, peak_memory_gib
from toolkit.prefix.cached import CachedPrefix, read_ahead
from toolkit.rundir import RunDirectory, claim, write_config
from toolkit.train.phases import advance, resume, state_of
from toolkit.train.setup import Setup, save_plan, save_set_up, set_up
from toolkit.train.step import StepResult, seed_step, train_step

log = logging.getLogger("frostline")

STOPPED = 75
"""Exit code of a run that a signal stopped after a committed checkpoint (EX_TEMPFAIL: start it again to go on)."""


def run(invocation: Invocation) -> int:
    """Train as ``invocation`` says; every rank calls it.

    Returns:
        0 when the run is finished, 75 when a signal stopped it after a checkpoint.

    Raises:
        UsageError: recipe, data, model, mask or run directory is at fault.
        FrostlineError: training cannot go on.
    """
    world = distributed.start(engine_needs_group=invocation.deepspeed is not None)
    require_same(world, facts(invocation))
    _announce(invocation)
    code = train(invocation, world)
    world.barrier()
    distributed.stop()  # not after an error: ranks that still wait in a collective would hold it up
    return code


def train(invocation: Invocation, world: World) -> int:
    """As ``run``, in a process group that is up and stays up."""
    setup = set_up(invocation, world)
    with claim(invocation.config, invocation.recipe, world) as directory:
        if not directory.finished:
            return _train(setup, directory)
        log.info("%s: this run is finished, nothing to train", directory.path)
        return 0


def _announce(invocation: Invocation) -> None:
    if not invocation.recipe_was_given:
        log.info("no --config given: using %s", invocation.recipe)
    log.info("recipe %s, engine %s", invocation.recipe, invocation.deepspeed or "torch (no --ds)")


def _train(setup: Setup, directory: RunDirectory) -> int:
    world, run_dir = setup.world, directory.path
    done = 0
    if directory.checkpoint:
        done = resume(setup, directory.checkpoint)
        log.info("continuing %s after step %d of %d", run_dir, done, setup.total_steps)
    if world.is_main:
        write_config(run_dir, setup.config)
        save_set_up(setup, run_dir)
    log.info("writing to %s (watch: tensorboard --logdir %s)", run_dir, run_dir.parent)
    stopped = _StopSignal()
    with Monitor(run_dir, world.is_main, setup.total_steps, done) as monitor, stopped, Prefetcher() as ahead:
        monitor.texts(setup.active.phase.start, mask=setup.audit)
        monitor.texts(0, recipe=f"```yaml\n{dump(setup.config)}```")
        stopped_at = _loop(setup, run_dir, monitor, done, stopped, ahead)
        if stopped_at is not None:
            log.info("stopped by a signal after step %d; start the same command again to go on", stopped_at)
            return STOPPED
        if monitor.epoch_losses:
            log.info("mean loss by epoch: %s", ", ".join(f"{loss:.4f}" for loss in monitor.epoch_losses))
    if isinstance(setup.prefix, CachedPrefix):
        log.info("%s", setup.prefix.close())
    peak = world.max(peak_memory_gib(world.device))
    planned = f" (planned: {setup.cost.memory.peak / 2**30:.2f} GiB of tensors)" if setup.cost else ""
    log.info(
        "done: %d steps, peak memory %.2f GiB%s; next: python launch/export.py %s",
        setup.total_steps,
        peak,
        planned,
        run_dir,
    )
    return 0


def _loop(
    setup: Setup,
    run_dir: Path,
    monitor: Monitor,
    done: int,
    stop_asked: Callable[[World], bool],
    ahead: Prefetcher,
) -> int | None:
    """Train from step ``done`` to the end; the step it stopped after, if a signal asked for that."""
    per_epoch = setup.plan.steps_per_epoch
    step = done
    for epoch in range(done // per_epoch, setup.config.train.epochs):
        order = epoch_order(setup.plan.rows, setup.config.train.seed, epoch)
        first = step - epoch * per_epoch
        steps = step_batches(setup.dataset.train, order, setup.plan, setup.pad_id, first, setup.packed)
        announced = read_ahead(lambda: setup.reading, steps)
        for micro_batches in ahead(on_device(announced, setup.world.device)):
            if step == setup.active.phase.end:
                _change_phase(setup, run_dir, monitor, step)
            seed_step(setup.config.train.seed, step, setup.world)
            result = train_step(micro_batches, setup.prefix, setup.engine, setup.world)
            step += 1
            monitor.step(_metrics(setup, result, step))
            at_end = step == setup.total_steps
            epoch_ends = step % per_epoch == 0 or at_end
            if epoch_ends:
                monitor.epoch(epoch + 1, epoch * per_epoch + 1, step)
            if epoch_ends or _due(step, setup.config.output.evaluate_every_steps):
                _validate(setup, monitor, step)
            stopping = stop_asked(setup.world) and not at_end
            if epoch_ends or stopping or _due(step, setup.config.output.save_every_steps):
                _commit(setup, run_dir, step)
            if stopping:
                return step
            if at_end:
                return None
    return None


def _change_phase(setup: Setup, run_dir: Path, monitor: Monitor, step: int) -> None:
    """Go on to the next phase of the mask's schedule, and show it."""
    advance(setup, step)
    if setup.world.is_main:
        save_plan(setup, run_dir)
    monitor.texts(step, mask=setup.audit)
    monitor.say(f"step {step + 1}: phase {setup.active.phase.index + 1} of {len(setup.schedule.phases)}, "
                f"{setup.mask.parameters:,} parameters train")  # fmt: skip


def _metrics(setup: Setup, result: StepResult, step: int) -> StepMetrics:
    return StepMetrics(
        step=step,
        epoch=step / setup.plan.steps_per_epoch,
        loss=result.loss,
        learning_rate=result.learning_rate,
        grad_norm=result.grad_norm,
        supervised_tokens=result.supervised_tokens,
        tokens=result.tokens,
        seconds=result.seconds,
        tokens_per_second=result.tokens / result.seconds,
        trained_parameters=setup.mask.parameters,
        peak_memory_gib=setup.world.max(peak_memory_gib(setup.world.device)),
        moved_share=setup.engine.moved_share(),
    )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _validate(setup: Setup, monitor: Monitor, step: int) -> None:
    if not setup.dataset.validation:
        return
    setup.engine.train(False)
    if setup.prefix:
        setup.prefix.eval()
    outcome = evaluate(
        setup.engine.forward,
        setup.prefix,
        setup.dataset.validation,
        setup.plan.micro_batch_size,
        setup.pad_id,
        setup.world,
        setup.packed,
    )
    setup.engine.train(True)
    if setup.prefix:
        setup.prefix.train()
    monitor.evaluation(step, step / setup.plan.steps_per_epoch, outcome.loss, outcome.perplexity)


def _commit(setup: Setup, run_dir: Path, step: int) -> None:
    trained = setup.active.phase.trained
    state, keep = state_of(setup, step), setup.config.output.keep
    commit(run_dir, state, setup.engine, setup.resting, trained, setup.base, setup.world, keep)


class _StopSignal:
    """Notes SIGTERM and SIGUSR1 while entered; asking it is a collective, so that all ranks stop at the same step."""

    def __init__(self) -> None:
        self._seen = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._note)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def __call__(self, world: World) -> bool:
        return world.max(float(self._seen)) > 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen = True
