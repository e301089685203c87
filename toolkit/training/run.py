"""The loop: epochs, validation, checkpoints and signals around the training step."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from toolkit.activation_cache.cached_prefix import CachedPrefix, prefetch_cached
from toolkit.checkpoint.catalog import finish_pruning
from toolkit.checkpoint.run_directory import RunDirectory, claim, write_config
from toolkit.checkpoint.saver import Saver
from toolkit.config.flags import Invocation
from toolkit.config.recipe import dump
from toolkit.data.batches import epoch_order, step_batches
from toolkit.data.prefetch import Prefetcher, on_device
from toolkit.engine.deepspeed import nvme_files
from toolkit.mask.diagram import draw_mask
from toolkit.runtime import distributed, failure_broadcast, signals
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import OutOfMemoryError
from toolkit.runtime.out_of_memory import during
from toolkit.runtime.paths import writing
from toolkit.runtime.shipped import command_line
from toolkit.runtime.signals import STOPPED, StopRequested
from toolkit.training.between_steps import BetweenSteps
from toolkit.training.consistency import facts, require_same
from toolkit.training.guard import StepGuard
from toolkit.training.monitor import Monitor, StepMetrics, peak_memory_gib
from toolkit.training.out_of_memory_advice import advise
from toolkit.training.phase_change import advance, resume
from toolkit.training.preflight import check_writable
from toolkit.training.progress import Progress
from toolkit.training.run_record import save_plan, save_set_up
from toolkit.training.setup import Setup, begin, prepare
from toolkit.training.step import StepResult, seed_step, train_step
from toolkit.training.summary import MemoryUse, highest

log = logging.getLogger("frostline")


def run(invocation: Invocation, on_directory: Callable[[Path], None] | None = None) -> int:
    """Train as ``invocation`` says; every rank calls it.

    Args:
        invocation: the recipe and how it is to be trained.
        on_directory: called with the run directory once it is chosen.

    Returns:
        0 when the run is finished, 75 when a signal stopped it with nothing lost.

    Raises:
        UsageError: recipe, data, model, mask or run directory is at fault.
        FrostlineError: training cannot go on.
    """
    with signals.listening():
        world = distributed.start(engine_needs_group=invocation.deepspeed is not None)
        if trouble := failure_broadcast.join(
            world.rank, world.size, os.environ.get("MASTER_ADDR", ""), world.broadcast_object
        ):
            log.error("%s; if another rank fails, this one hears of it from its launcher only", trouble)
        require_same(world, facts(invocation))
        _announce(invocation)
        try:
            code = train(invocation, world, on_directory)
        except StopRequested:
            log.info("stopped by a signal before the first step (%s); start the same command again", signals.reason())
            code = STOPPED
        world.barrier()
        failure_broadcast.part()
        distributed.stop()  # not after an error: ranks that still wait in a collective would hold it up
        return code


def train(invocation: Invocation, world: World, on_directory: Callable[[Path], None] | None = None) -> int:
    """As ``run``, in a process group that is up and stays up."""
    setup = None
    try:
        with (
            during("the run"),
            claim(invocation.config, invocation.recipe, world, override=invocation.resume_override) as directory,
        ):
            if on_directory is not None:
                on_directory(directory.path)
            check_writable(directory.path, world)
            if directory.finished:
                log.info("%s: this run is finished, nothing to train", directory.path)
                if world.is_main:
                    finish_pruning(directory.path, invocation.config.output.keep)
                return 0
            with during("the set-up"):
                setup = prepare(invocation, world, directory.state, directory.path)
                nvme_files.give_folders(setup.ds_config, directory.path)
            code = _train(setup, directory)
            nvme_files.clear(setup.ds_config, world)
            return code
    except OutOfMemoryError as error:
        raise advise(error, setup, invocation.config) from None


def _announce(invocation: Invocation) -> None:
    if not invocation.recipe_was_given:
        log.info("no --config given: using %s", invocation.recipe)
    log.info("recipe %s, engine %s", invocation.recipe, invocation.deepspeed or "torch (no --ds)")


def _train(setup: Setup, directory: RunDirectory) -> int:
    world, run_dir = setup.world, directory.path
    progress = Progress(len(setup.dataset.train))
    if directory.checkpoint:
        with during("reading the checkpoint"):
            progress = resume(setup, directory.checkpoint)
        log.info("continuing %s after step %d of %d", run_dir, progress.step, setup.total_steps)
    else:
        with during("the set-up"):
            begin(setup, setup.schedule.phases[0])
    if world.is_main:
        with writing(run_dir):
            write_config(run_dir, setup.config)
            save_set_up(setup, run_dir)
    log.info("writing to %s (watch: tensorboard --logdir %s)", run_dir, run_dir.parent)
    saver = Saver(run_dir, world, setup.config.output.keep, setup.config.output.async_save)
    with (
        Monitor(run_dir, world.is_main, setup.total_steps, progress.step) as monitor,
        Prefetcher() as ahead,
        saver,
    ):
        monitor.hparams(_hparams(setup))
        if not progress.step:
            monitor.texts(0, recipe=f"```yaml\n{dump(setup.config)}```")
        if progress.step <= setup.active.phase.start:
            _show_mask(setup, monitor)
        monitor.planned_gib = _planned_gib(setup)
        stopped_at = _loop(setup, run_dir, monitor, progress, saver, ahead)
        if stopped_at is not None:
            why = signals.reason()
            log.info("stopped by a signal after step %d (%s); start the same command again to go on", stopped_at, why)
            return STOPPED
        monitor.finish()
        if len(losses := monitor.epoch_losses()) > 1:
            log.info("mean loss by epoch: %s", ", ".join(f"{loss:.4f}" for loss in losses))
    if isinstance(setup.prefix, CachedPrefix):
        log.info("%s", setup.prefix.close())
    memory = highest(world.all_gather_object(MemoryUse.now(world.device, setup.libraries))).text(_planned_gib(setup))
    log.info("done: %d steps, %s; next: %s %s", setup.total_steps, memory, command_line("export"), run_dir)
    return 0


def _loop(
    setup: Setup, run_dir: Path, monitor: Monitor, progress: Progress, saver: Saver, ahead: Prefetcher
) -> int | None:
    """Train from ``progress`` to the end; the step it stopped after, if a signal asked for that."""
    seed = setup.config.train.seed
    guard = StepGuard(run_dir, setup.config.train.max_skipped_steps, setup.world)
    between = BetweenSteps(setup, monitor, progress, saver, guard)
    if not between.make_up():
        return progress.step
    for epoch in range(progress.epoch, setup.config.train.epochs):
        if progress.step == setup.total_steps:
            return None
        order = epoch_order(progress.rows, seed, epoch)[progress.cursor :]
        plan = replace(setup.plan, rows=len(order))
        steps = step_batches(setup.dataset.train, order, plan, setup.pad_id, packed=setup.packed)
        announced = prefetch_cached(lambda: setup.reading, steps)
        for micro_batches in ahead(on_device(announced, setup.world.device)):
            if progress.step == setup.active.phase.end:
                _change_phase(setup, run_dir, monitor, progress.step)
            seed_step(seed, progress.step, setup.world)
            result = train_step(micro_batches, setup.prefix, setup.engine, setup.world)
            progress.add(result, plan.global_batch)
            monitor.step(_metrics(setup, result, progress))
            guard.look(progress.step, result, micro_batches)
            saver.poll()
            at_end = progress.step == setup.total_steps
            if progress.is_epoch_done or at_end:
                monitor.epoch(epoch + 1, progress.step - int(progress.totals["epoch_steps"]) + 1, progress.step)
            stopping = between.after_step()
            if at_end:
                return None
            if stopping:
                return progress.step
    return None


def _change_phase(setup: Setup, run_dir: Path, monitor: Monitor, step: int) -> None:
    """Go on to the next phase of the mask's schedule, and show it."""
    with during("the change of phase"):
        advance(setup, step)
    if setup.world.is_main:
        try:
            save_plan(setup, run_dir)
        except OSError as error:  # it is for people only
            log.warning("%s/plan.json cannot be written (%s); training goes on", run_dir, error.strerror)
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
        "optimizer": setup.config.optim.name,
        "engine": setup.engine.name,
        "ranks": setup.world.size,
        "batch": setup.plan.global_batch,
        "epochs": train.epochs,
        "seed": train.seed,
        "prefix_precision": setup.config.prefix.precision,
        "cached": "yes" if isinstance(setup.prefix, CachedPrefix) else "no",
    }


def _metrics(setup: Setup, result: StepResult, progress: Progress) -> StepMetrics:
    return StepMetrics(
        step=progress.step,
        epoch=progress.passes,
        loss=result.loss,
        learning_rate=result.learning_rate,
        grad_norm=result.grad_norm,
        supervised_tokens=result.supervised_tokens,
        tokens=result.tokens,
        seconds=result.seconds,
        tokens_per_second=result.tokens / result.seconds,
        skipped=result.skipped,
        trained_parameters=setup.mask.parameters,
        peak_memory_gib=setup.world.max(peak_memory_gib(setup.world.device)),
        moved_share=setup.engine.moved_share(),
        cache_hit_share=setup.prefix.hit_rate() if isinstance(setup.prefix, CachedPrefix) else None,
    )
