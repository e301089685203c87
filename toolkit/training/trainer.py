"""Run the training loop: batches, steps, phases, and what is due between steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from toolkit.activation_cache.cached_prefix import CachedPrefix, HiddenStates, prefetch_cached, read_ahead
from toolkit.activation_cache.read_ahead import HiddenReader
from toolkit.checkpoint.saver import Saver
from toolkit.data.batches import Batch, epoch_order, step_batches
from toolkit.data.prefetch import Prefetcher, on_device
from toolkit.mask.audit import audit, audit_markdown
from toolkit.mask.diagram import draw_mask
from toolkit.planning.phase_plans import combine_plans
from toolkit.planning.planner import Plan
from toolkit.runtime import signals
from toolkit.runtime.out_of_memory import explain_out_of_memory
from toolkit.training.between_steps import BetweenSteps
from toolkit.training.context import ModelHandle, RunContext
from toolkit.training.guard import StepGuard
from toolkit.training.monitor import Monitor, StepMetrics, peak_memory_gib
from toolkit.training.phases import PhaseState, build_phase, end_phase, resume
from toolkit.training.progress import Progress
from toolkit.training.rank_status import RankStatus
from toolkit.training.run_record import save_plan
from toolkit.training.step import StepResult, seed_step, train_step

log = logging.getLogger("frostline")


class Trainer:
    """Train a run from its current position to its end."""

    def __init__(self, context: RunContext, model: ModelHandle, run_dir: Path) -> None:
        self.context = context
        self.progress = Progress(len(context.dataset.train))
        self.current: PhaseState | None = None
        """The phase that trains; None before ``begin`` and between two phases, when the old one's memory is freed."""
        self._model, self._run_dir = model, run_dir

    @property
    def state(self) -> PhaseState:
        """The phase that trains; fails between phases."""
        assert self.current is not None
        return self.current

    @property
    def plan(self) -> Plan | None:
        """The plan of the run, combined from those of its phases; None if one of them cannot be planned."""
        plans = [plan for plan in self.state.plans if plan is not None]
        is_complete = len(plans) == len(self.state.plans)
        return combine_plans(plans, self.context.config.mask) if is_complete else None

    @property
    def planned_gib(self) -> float | None:
        """GiB of tensors at the planned peak; None if it cannot be planned."""
        return self.plan.memory.peak / 2**30 if self.plan else None

    def begin(self, checkpoint: Path | None) -> None:
        """Build the first phase, or resume from a verified checkpoint."""
        if checkpoint is None:
            with explain_out_of_memory("the set-up"):
                self.current = build_phase(self.context, self._model, self.context.schedule.phases[0])
            return
        with explain_out_of_memory("reading the checkpoint"):
            self.current, self.progress = resume(self.context, self._model, checkpoint)

    def run(self, monitor: Monitor, saver: Saver) -> bool:
        """Train to the end; return False if a signal stopped the run, with its state committed."""
        context, progress, world = self.context, self.progress, self.context.world
        guard = StepGuard(self._run_dir, context.config.train.max_skipped_steps, world)
        between = BetweenSteps(context, monitor, progress, saver, guard)
        if not between.catch_up(self.state):
            return False
        if between.has_ended_early():  # by the losses before an interruption
            return True
        with HiddenReader(world.device) as reader, Prefetcher() as prefetcher:
            for micro_batches in self._batches(prefetcher, reader):
                if progress.step == self.state.phase.end:
                    self._change_phase(monitor)
                seed_step(context.config.train.seed, progress.step, world)
                result = train_step(
                    micro_batches, self.state.prefix, self.state.engine, world, partial(self._rank_status, saver)
                )
                progress.add(result, context.batch_plan.global_batch)
                monitor.step(self._metrics(result))
                guard.check_step(progress.step, result, micro_batches)
                saver.poll(bool(result.status.has_written))
                if between.after_step(self.state, bool(result.status.is_stopping)):
                    return False
                if between.has_ended_early():
                    break
        between.require_learning()
        return True

    def next_phase(self) -> None:
        """Free the current phase of the mask's schedule and build the next one; every rank calls it."""
        ended, self.current = self.state, None
        phase = self.context.schedule.phases[ended.phase.index + 1]
        handover = end_phase(self.context, self._model, ended)
        del ended  # nothing may refer to the ended phase while the next one is built
        self.current = build_phase(self.context, self._model, phase, handover)

    def show_phase(self, monitor: Monitor) -> None:
        """Show the mask of the phase that begins, as a table and as a picture."""
        phase, anatomy = self.state.phase, self.state.suffix.anatomy
        if self.context.world.is_main:
            mask = self.context.schedule.shown(phase)
            monitor.board.text("mask", audit_markdown(mask, anatomy), phase.start)
            monitor.board.image("train/mask", draw_mask(audit(mask, anatomy)), phase.start)

    def _batches(self, prefetcher: Prefetcher, reader: HiddenReader) -> Iterator[list[Batch]]:
        """Yield this rank's micro batches of each step that is left, from the exact row where the run stands."""
        context, progress = self.context, self.progress
        for epoch in range(progress.epoch, context.config.train.epochs):
            if progress.step == context.total_steps:
                return
            order = epoch_order(progress.rows, context.config.train.seed, epoch)[progress.cursor :]
            plan = replace(context.batch_plan, rows=len(order))
            steps = step_batches(context.dataset.train, order, plan, context.pad_id, packed=self.state.packing.on)
            cached = read_ahead(self._prefix, prefetch_cached(self._prefix, steps), reader)
            for micro_batches in prefetcher(on_device(cached, context.world.device)):
                yield micro_batches
                if progress.step == context.total_steps:
                    return

    def _prefix(self) -> HiddenStates | None:
        """Return the prefix to read ahead from, for the thread that makes batches; None between two phases."""
        current = self.current
        return current.prefix if current else None

    def _change_phase(self, monitor: Monitor) -> None:
        """Go on to the next phase, and show it."""
        context = self.context
        with explain_out_of_memory("the change of phase"):
            self.next_phase()
        if context.schedule.rotation is not None:  # planned and shown once
            return
        if context.world.is_main:
            try:
                save_plan(self._run_dir, self.plan)
            except OSError as error:  # it is for people only
                log.warning("%s/plan.json cannot be written (%s); training goes on", self._run_dir, error.strerror)
        self.show_phase(monitor)
        monitor.planned_gib = self.planned_gib
        phase = self.state.phase
        log.info("step %d: phase %d of %d, %s parameters train", self.progress.step + 1, phase.index + 1,
                 len(context.schedule.phases), f"{phase.mask.parameters:,}")  # fmt: skip

    def _rank_status(self, saver: Saver) -> RankStatus:
        """Return what this rank tells the others at the end of a step."""
        memory = peak_memory_gib(self.context.world.device)
        return RankStatus(memory, signals.stop_requested(), saver.has_written)

    def _metrics(self, result: StepResult) -> StepMetrics:
        """Return the metrics of a step for the log."""
        state, progress = self.state, self.progress
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
            trained_parameters=state.mask.parameters,
            peak_memory_gib=result.status.peak_memory_gib,
            moved_share=result.moved_share,
            cache_hit_share=state.prefix.hit_rate() if isinstance(state.prefix, CachedPrefix) else None,
        )
