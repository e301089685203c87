"""The loop: epochs, validation, checkpoints and signals around the training step."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from toolkit import distributed, peers, stop
from toolkit.checkpoint import commit
from toolkit.config.flags import Invocation
from toolkit.config.load import dump
from toolkit.consistency import facts, require_same
from toolkit.data.batches import epoch_order, step_batches
from toolkit.data.prefetch import Prefetcher, on_device
from toolkit.distributed import World
from toolkit.mask.picture import draw_mask
from toolkit.monitor import Monitor, StepMetrics, peak_memory_gib
from toolkit.prefix.cached import CachedPrefix, read_ahead
from toolkit.rundir import RunDirectory, claim, write_config
from toolkit.stop import STOPPED, StopRequested
from toolkit.train.phases import advance, resume, state_of
from toolkit.train.setup import Setup, save_plan, save_set_up, set_up
from toolkit.train.step import StepResult, seed_step, train_step
from toolkit.train.validation import is_owed, validate

log = logging.getLogger("frostline")


def run(invocation: Invocation) -> int:
    """Train as ``invocation`` says; every rank calls it.

    Returns:
        0 when the run is finished, 75 when a signal stopped it with nothing lost.

    Raises:
        UsageError: recipe, data, model, mask or run directory is at fault.
        FrostlineError: training cannot go on.
    """
    with stop.listening():
        world = distributed.start(engine_needs_group=invocation.deepspeed is not None)
        if trouble := peers.join(world.rank, world.size, os.environ.get("MASTER_ADDR", ""), world.share):
            log.error("%s; if another rank fails, this one hears of it from its launcher only", trouble)
        require_same(world, facts(invocation))
        _announce(invocation)
        try:
            code = train(invocation, world)
        except StopRequested:
            log.info("stopped by a signal before the first step (%s); start the same command again", stop.reason())
            code = STOPPED
        world.barrier()
        peers.part()
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
    with Monitor(run_dir, world.is_main, setup.total_steps, done) as monitor, Prefetcher() as ahead:
        monitor.hparams(_hparams(setup))
        if not done:
            monitor.texts(0, recipe=f"```yaml\n{dump(setup.config)}```")
        if done <= setup.active.phase.start:
            _show_mask(setup, monitor)
        monitor.planned_gib = _planned_gib(setup)
        stopped_at = _loop(setup, run_dir, monitor, done, ahead)
        if stopped_at is not None:
            why = stop.reason()
            log.info("stopped by a signal after step %d (%s); start the same command again to go on", stopped_at, why)
            return STOPPED
        monitor.finish()
        if monitor.epoch_losses:
            log.info("mean loss by epoch: %s", ", ".join(f"{loss:.4f}" for loss in monitor.epoch_losses))
    if isinstance(setup.prefix, CachedPrefix):
        log.info("%s", setup.prefix.close())
    peak = world.max(peak_memory_gib(world.device))
    planned = f" (planned: {_planned_gib(setup):.2f} GiB of tensors)" if setup.cost else ""
    log.info(
        "done: %d steps, peak memory %.2f GiB%s; next: python launch/export.py %s",
        setup.total_steps,
        peak,
        planned,
        run_dir,
    )
    return 0


def _loop(setup: Setup, run_dir: Path, monitor: Monitor, done: int, ahead: Prefetcher) -> int | None:
    """Train from step ``done`` to the end; the step it stopped after, if a signal asked for that."""
    per_epoch = setup.plan.steps_per_epoch
    step = done
    if is_owed(setup, monitor, done) and not validate(setup, monitor, done):
        return done
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
            due = epoch_ends or _due(step, setup.config.output.evaluate_every_steps)
            validated = not due or validate(setup, monitor, step)
            stopping = stop.agreed(setup.world)
            if epoch_ends or stopping or _due(step, setup.config.output.save_every_steps):
                _commit(setup, run_dir, step)
                stopping = stop.agreed(setup.world)  # a signal may have come meanwhile
            if at_end:
                if not validated:
                    validate(setup, monitor, step, may_stop=False)  # nothing can be lost any more
                return None
            if stopping:
                return step
    return None


def _change_phase(setup: Setup, run_dir: Path, monitor: Monitor, step: int) -> None:
    """Go on to the next phase of the mask's schedule, and show it."""
    advance(setup, step)
    if setup.world.is_main:
        save_plan(setup, run_dir)
    _show_mask(setup, monitor)
    monitor.planned_gib = _planned_gib(setup)
    monitor.say(f"step {step + 1}: phase {setup.active.phase.index + 1} of {len(setup.schedule.phases)}, "
                f"{setup.mask.parameters:,} parameters train")  # fmt: skip


def _show_mask(setup: Setup, monitor: Monitor) -> None:
    """The mask of the phase that begins, as a table and as a picture."""
    start = setup.active.phase.start
    monitor.texts(start, mask=setup.active.audit)
    if setup.world.is_main:
        monitor.picture(start, "train/mask", draw_mask(setup.active.parts))


def _planned_gib(setup: Setup) -> float | None:
    return setup.cost.memory.peak / 2**30 if setup.cost else None


def _hparams(setup: Setup) -> dict[str, str | float]:
    """What runs are compared by."""
    train = setup.config.train
    return {
        "model": setup.config.model.name_or_path,
        "mask": ", ".join(s if isinstance(s, str) else "+".join(s.select) for s in setup.config.mask.train),
        "boundary": setup.mask.boundary,
        "learning_rate": train.learning_rate,
        "optimizer": getattr(setup.config.optim, "name", "adamw"),
        "engine": setup.engine.name,
        "ranks": setup.world.size,
        "batch": setup.plan.global_batch,
        "epochs": train.epochs,
        "seed": train.seed,
        "prefix_precision": setup.config.prefix.precision,
        "cached": "yes" if isinstance(setup.prefix, CachedPrefix) else "no",
    }


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
        cache_hit_share=setup.prefix.hit_share() if isinstance(setup.prefix, CachedPrefix) else None,
    )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _commit(setup: Setup, run_dir: Path, step: int) -> None:
    trained = setup.active.phase.trained
    state, keep = state_of(setup, step), setup.config.output.keep
    commit(run_dir, state, setup.engine, setup.resting, trained, setup.base, setup.world, keep)
