"""Train a run: join the ranks, claim the run directory, prepare, train, and report."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from toolkit.activation_cache.cached_prefix import CachedPrefix
from toolkit.checkpoint.catalog import finish_pruning
from toolkit.checkpoint.run_directory import OUT_OF_FOLD_FILE, RunDirectory, claim, write_config
from toolkit.checkpoint.saver import Saver
from toolkit.config.flags import Invocation
from toolkit.config.policy import saves_in_background
from toolkit.config.recipe import dump
from toolkit.engine.deepspeed import nvme_files
from toolkit.mask.audit import audit
from toolkit.runtime import signals
from toolkit.runtime.distributed import World, join_ranks
from toolkit.runtime.errors import OutOfMemoryError
from toolkit.runtime.out_of_memory import explain_out_of_memory
from toolkit.runtime.paths import explain_refused_write
from toolkit.runtime.privacy import group_files, make_directory, set_access
from toolkit.runtime.shipped import command_line
from toolkit.runtime.signals import STOPPED, StopRequested
from toolkit.training.context import prepare
from toolkit.training.folds import parent_of_folds, report_folds, save_out_of_fold, train_folds
from toolkit.training.monitor import Monitor
from toolkit.training.open_trackers import open_trackers
from toolkit.training.out_of_memory_advice import advise
from toolkit.training.preflight import check_writable
from toolkit.training.rank_agreement import rank_settings, require_same
from toolkit.training.run_record import MemoryUse, save_facts, save_record, save_tokenizer
from toolkit.training.trackers import Trackers
from toolkit.training.trainer import Trainer

log = logging.getLogger("frostline")


def run(invocation: Invocation, on_directory: Callable[[Path], None] | None = None) -> int:
    """Train as ``invocation`` says; every rank calls it. ``on_directory`` is called with the run directory once known.

    Returns:
        0 when the run is finished, 75 when a signal stopped it with nothing lost.

    Raises:
        UsageError: recipe, data, model, mask or run directory is at fault.
        FrostlineError: training cannot go on.
    """
    with (
        signals.record_signals(),
        group_files(invocation.config.output.share == "group"),
        join_ranks(engine_needs_group=invocation.deepspeed is not None) as world,
    ):
        require_same(world, rank_settings(invocation))
        if not invocation.recipe_was_given:
            log.info("no --config given: using %s", invocation.recipe)
        log.info("recipe %s, engine %s", invocation.recipe, invocation.deepspeed or "torch (no --ds)")
        try:
            return train_in_group(invocation, world, on_directory)
        except StopRequested:
            log.info(
                "stopped by a signal before the first step (%s); start the same command again", signals.stop_reason()
            )
            return STOPPED


def train_in_group(invocation: Invocation, world: World, on_directory: Callable[[Path], None] | None = None) -> int:
    """Train as ``run`` does, in a process group that is up and stays up."""
    if invocation.config.data.folds is None:
        return _train_one(invocation, world, on_directory)
    parent = parent_of_folds(invocation)
    if world.is_main and invocation.config.output.share == "group":
        make_directory(parent, is_shared=True)
        set_access(parent, is_shared=True)
    if on_directory is not None:
        on_directory(parent)
    if code := train_folds(invocation, lambda of_fold: _train_one(of_fold, world)):
        return code
    report_folds(invocation, world)
    return 0


def _train_one(invocation: Invocation, world: World, on_directory: Callable[[Path], None] | None = None) -> int:
    """Train one run, a fold of several or the only one."""
    trainer = None
    try:
        with (
            explain_out_of_memory("the run"),
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
            with open_trackers(invocation.config, directory, world) as trackers:
                with explain_out_of_memory("the set-up"):
                    context, model = prepare(invocation, world, directory.state, directory.path)
                    nvme_files.assign_swap_folders(context.ds_config, directory.path)
                trainer = Trainer(context, model, directory.path)
                code = _train(trainer, directory, trackers)
                trackers.stopped = code == STOPPED
            nvme_files.remove_swap_folders(context.ds_config, world)
            return code
    except OutOfMemoryError as error:
        raise advise(error, trainer, invocation.config) from None


def _train(trainer: Trainer, directory: RunDirectory, trackers: Trackers) -> int:
    """Begin or resume, train with monitor and saver open, and report; return the exit code, ``STOPPED`` or 0."""
    context, run_dir = trainer.context, directory.path
    world, output = context.world, context.config.output
    trainer.begin(directory.checkpoint)
    steps_done = trainer.progress.step
    if directory.checkpoint:
        log.info("continuing %s after step %d of %d", run_dir, steps_done, context.total_steps)
    if world.is_main:
        with explain_refused_write(run_dir):
            write_config(run_dir, context.config)
            (run_dir / OUT_OF_FOLD_FILE).unlink(missing_ok=True)  # of a shorter run that this one goes on with
            save_record(run_dir, context.schedule, context.dataset, trainer.plan)
            mask, anatomy = context.schedule.phases[-1].delta_mask, trainer.state.suffix.anatomy
            save_facts(run_dir, audit(mask, anatomy), context.dataset, world.device)
            if context.config.model.add_tokens:
                save_tokenizer(run_dir, context.tokenizer)
    watch = f" (watch: tensorboard --logdir {run_dir.parent})" if "tensorboard" in output.report_to else ""
    log.info("writing to %s%s", run_dir, watch)
    with (
        Monitor(run_dir, world.is_main, context.total_steps, steps_done, output.report_to, trackers) as monitor,
        Saver(
            run_dir, world, output.keep, saves_in_background(output.async_save, world.device.type == "cuda")
        ) as saver,
    ):
        monitor.board.hparams(_hparams(trainer))
        if not steps_done:
            monitor.board.text("recipe", f"```yaml\n{dump(context.config)}```", 0)
        if steps_done <= trainer.state.phase.start:  # a resume in the middle of a phase has shown its mask before
            trainer.show_phase(monitor)
        monitor.planned_gib = trainer.planned_gib
        if not trainer.run(monitor, saver):
            step, why = trainer.progress.step, signals.stop_reason()
            log.info("stopped by a signal after step %d (%s); start the same command again to go on", step, why)
            return STOPPED
        if context.config.data.fold is not None:
            try:
                save_out_of_fold(context, trainer.state, run_dir)
            except StopRequested:
                log.info(
                    "stopped by a signal before the held-out rows were read; start the same command again to go on"
                )
                return STOPPED
        monitor.board.finish()
    _report(trainer, run_dir)
    return 0


def _report(trainer: Trainer, run_dir: Path) -> None:
    """Log mean losses by epoch, cache use and peak memory of the finished run; every rank calls it."""
    context, prefix = trainer.context, trainer.state.prefix
    losses = trainer.progress.epoch_losses()
    if len(losses) > 1:
        shown = ", ".join("unknown" if loss is None else f"{loss:.4f}" for loss in losses)
        log.info("mean loss by epoch: %s", shown)
    if isinstance(prefix, CachedPrefix):
        log.info("%s", prefix.close())
    uses = context.world.all_gather_object(MemoryUse.measure(context.world.device, context.library_bytes))
    memory = max(uses, key=lambda use: use.peak).text(trainer.planned_gib)
    log.info("done: %d steps, %s; next: %s %s", trainer.progress.step, memory, command_line("export"), run_dir)


def _hparams(trainer: Trainer) -> dict[str, str | float]:
    """Return the settings that TensorBoard's HParams tab compares runs by."""
    context, state = trainer.context, trainer.state
    config, train = context.config, context.config.train
    return {
        "model": config.model.name_or_path,
        "mask": ", ".join(map(str, config.mask.train))
        + (f"; {rotation}" if (rotation := config.mask.rotation) else ""),
        "boundary": state.mask.boundary,
        "learning_rate": train.learning_rate,
        "optimizer": config.optim.name,
        "engine": state.engine.name,
        "ranks": context.world.size,
        "batch": context.batch_plan.global_batch,
        "epochs": train.epochs,
        "seed": train.seed,
        "prefix_precision": config.prefix.precision,
        "cached": "yes" if isinstance(state.prefix, CachedPrefix) else "no",
    }
