"""Run the training loop: batches, steps, phases, and what is due between steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from toolkit.activation_cache.cached_prefix import CachedPrefix, HiddenStates, prefetch_cached
from toolkit.checkpoint.saver import Saver
from toolkit.data.batches import Batch, epoch_order, step_batches
from toolkit.data.prefetch import Prefetcher, on_device
from toolkit.mask.diagram import draw_mask
from toolkit.planning.planner import Plan
from toolkit.runtime.out_of_memory import explain_out_of_memory
from toolkit.training.between_steps import BetweenSteps
from toolkit.training.context import ModelHandle, RunContext
from toolkit.training.guard import StepGuard
from toolkit.training.monitor import Monitor, StepMetrics, peak_memory_gib
from toolkit.training.phases import Handover, PhaseState, build_phase, end_phase, resume
from toolkit.training.progress import Progress
from toolkit.training.run_record import save_plan
from toolkit.training.step import StepResult, seed_step, train_step

log = logging.getLogger("frostline")


class Trainer:
    """Train a run from its current position to its end.

    Args:
        context: context of the run.
        model: handle of the whole model, as loaded.
        run_dir: the run directory.
    """

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
        """Return the plan of the run; None for an architecture that cannot be planned."""
        return self.context.combined_plan(self.state.plans)

    @property
    def planned_gib(self) -> float | None:
        """GiB of tensors at the planned peak; None for an architecture that cannot be planned."""
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
        with Prefetcher() as ahead:
            for micro_batches in self._batches(ahead):
                if progress.step == self.state.phase.end:
                    self._change_phase(monitor)
                seed_step(context.config.train.seed, progress.step, world)
                result = train_step(micro_batches, self.state.prefix, self.state.engine, world)
                progress.add(result, context.batch_plan.global_batch)
                monitor.step(self._metrics(result))
                guard.check_step(progress.step, result, micro_batches)
                saver.poll()
                if between.after_step(self.state):
                    return False
        return True

    def next_phase(self) -> None:
        """Free the current phase of the mask's schedule and build the next one; every rank calls it."""
        phase = self.context.schedule.phases[self.state.phase.index + 1]
        self.current = build_phase(self.context, self._model, phase, self._end_phase())

    def show_phase(self, monitor: Monitor) -> None:
        """Show the mask of the phase that begins, as a table and as a picture."""
        monitor.texts(self.state.phase.start, mask=self.state.audit)
        if self.context.world.is_main:
            monitor.picture(self.state.phase.start, "train/mask", draw_mask(self.state.audit_rows))

    def _batches(self, ahead: Prefetcher) -> Iterator[list[Batch]]:
        """Yield this rank's micro batches of each step that is left, from the exact row where the run stands."""
        context, progress = self.context, self.progress
        for epoch in range(progress.epoch, context.config.train.epochs):
            if progress.step == context.total_steps:
                return
            order = epoch_order(progress.rows, context.config.train.seed, epoch)[progress.cursor :]
            plan = replace(context.batch_plan, rows=len(order))
            packed = self.state.packing.on
            steps = step_batches(context.dataset.train, order, plan, context.pad_id, packed=packed)
            requested = prefetch_cached(self._prefix, steps)
            for micro_batches in ahead(on_device(requested, context.world.device)):
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
        if context.world.is_main:
            try:
                save_plan(self._run_dir, self.plan)
            except OSError as error:  # it is for people only
                log.warning("%s/plan.json cannot be written (%s); training goes on", self._run_dir, error.strerror)
        self.show_phase(monitor)
        monitor.planned_gib = self.planned_gib
        phase = self.state.phase
        monitor.say(f"step {self.progress.step + 1}: phase {phase.index + 1} of {len(context.schedule.phases)}, "
                    f"{phase.mask.parameters:,} parameters train")  # fmt: skip

    def _end_phase(self) -> Handover:
        """Free the current phase: no variable refers to it when the next one is built."""
        state, self.current = self.state, None
        return end_phase(self.context, self._model, state)

    def _metrics(self, result: StepResult) -> StepMetrics:
        """Return the metrics of a step for the log; every rank calls it, because memory is the maximum over ranks."""
        state, progress, world = self.state, self.progress, self.context.world
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
            peak_memory_gib=world.max(peak_memory_gib(world.device)),
            moved_share=state.engine.moved_share(),
            cache_hit_share=state.prefix.hit_rate() if isinstance(state.prefix, CachedPrefix) else None,
        )
