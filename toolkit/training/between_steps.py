"""Save, validate and show sample answers between two steps, in an order in which nothing can be lost.

First the checkpoint is committed; then validation runs, and its score is saved with that checkpoint; then old
checkpoints are removed, once the score tells which one is best; sample answers that no metric needs come last, and may
fail.
"""

from __future__ import annotations

import logging
import math

from toolkit.checkpoint.early_stopping import has_stopped_improving
from toolkit.checkpoint.saver import Saver
from toolkit.checkpoint.validation_score import ValidationScore
from toolkit.runtime import malloc
from toolkit.runtime.out_of_memory import explain_out_of_memory
from toolkit.runtime.signals import StopRequested
from toolkit.training.context import RunContext
from toolkit.training.guard import StepGuard
from toolkit.training.monitor import Answer, Monitor
from toolkit.training.phases import PhaseState, content_of
from toolkit.training.progress import Progress
from toolkit.training.validation import compute_metrics, sample_answers, validate, without_dropout

log = logging.getLogger("frostline")


class BetweenSteps:
    """Save checkpoints, validate and show sample answers between steps; every rank makes the same calls.

    The epoch and ``score`` of ``progress`` are updated.
    """

    def __init__(
        self, context: RunContext, monitor: Monitor, progress: Progress, saver: Saver, guard: StepGuard
    ) -> None:
        self._context, self._monitor, self._progress, self._saver, self._guard = (
            context, monitor, progress, saver, guard,
        )  # fmt: skip
        self._committed = progress.step or None
        """The step of the newest checkpoint that this process committed or resumed from."""
        self._answers_failed = False
        self._ends_early = False

    def catch_up(self, state: PhaseState) -> bool:
        """Complete the validation that was due at the checkpoint a run resumed from; called before the first step.

        Validates, or copies a loss that only one of checkpoint and ``metrics.jsonl`` has to the other. Returns False
        if a signal stopped the validation.
        """
        progress, world = self._progress, self._context.world
        at_end = progress.step == self._context.total_steps
        if not progress.step or not self._is_validation_due(epoch_ends=progress.cursor == 0 or at_end):
            return True
        step = progress.step
        saved, logged = world.on_main(lambda: (self._saver.saved_score(step), self._logged_scores(step).get(step)))
        if saved is not None and saved.metric != self._metric:
            saved = None  # the recipe was changed
        if saved is None and logged is None:
            is_done = self._validate(state, may_stop=not at_end)
            self._judge(state)
            return is_done
        if saved is None and logged is not None:
            self._saver.record_score(step, logged)
        if logged is None and saved is not None:
            values = {} if saved.value is None else {saved.metric: saved.value}
            self._monitor.evaluation(step, progress.passes, saved.loss, values)
        self._judge(state)
        return True

    def after_step(self, state: PhaseState, is_stopping: bool) -> bool:
        """Save and validate if due after a step; return True if a signal stops the run, with a checkpoint saved.

        ``is_stopping`` is whether a signal had come to any rank when the step ended. The ranks ask one another again
        only after work that takes long.
        """
        progress, world = self._progress, self._context.world
        at_end = progress.step == self._context.total_steps
        epoch_ends = progress.is_epoch_done or at_end
        if epoch_ends:
            self._monitor.epoch(progress)
        if progress.is_epoch_done:
            progress.next_epoch()
        due = self._is_validation_due(epoch_ends)
        stopping = world.any_stop_requested() if world.size == 1 else is_stopping  # alone there is nobody to ask
        is_saved = epoch_ends or stopping or is_due(progress.step, self._context.config.output.save_every_steps)
        if is_saved:
            self._commit_if_changed(state, validation_follows=due)
            stopping = world.any_stop_requested()
        if due and (at_end or not stopping):
            self._validate(state, may_stop=not at_end)
            is_saved = self._judge(state) or is_saved
            stopping = world.any_stop_requested()
        if self._ends_early and not epoch_ends:
            self._monitor.epoch(progress)
        if (stopping or self._ends_early) and not is_saved:
            self._commit_with_score(state, due)
        return stopping and not at_end and not self._ends_early

    def _judge(self, state: PhaseState) -> bool:
        """See what the validations say of early stopping; return True if the best one got a checkpoint now."""
        progress, train = self._progress, self._context.config.train
        if train.early_stopping_patience is None:
            return False
        scores = self._context.world.on_main(lambda: self._logged_scores(progress.step))
        ranks = [score.rank for score in scores.values()]
        best = min(filter(math.isfinite, ranks), default=math.nan)
        self._ends_early = has_stopped_improving(ranks, train)
        if self._ends_early:
            sign = -1 if self._higher_is_better else 1
            log.info(
                "early stopping after step %d: in %d validations the %s was not %s than before by over %g; best %.4f",
                progress.step, train.early_stopping_patience, self._metric, "higher" if sign < 0 else "lower",
                train.early_stopping_threshold, sign * best,
            )  # fmt: skip
        if progress.score is None or progress.score.rank != best or self._committed == progress.step:
            return False
        if not self._guard.has_changed:
            return False
        self._commit_with_score(state, due=True)
        return True

    def _commit_with_score(self, state: PhaseState, due: bool) -> None:
        """Save a checkpoint, with the validation score if this step has one."""
        self._commit_if_changed(state, validation_follows=due)
        if self._progress.score is not None and self._committed == self._progress.step:
            self._saver.record_score(self._progress.step, self._progress.score)

    @property
    def _metric(self) -> str:
        """Return the name of the metric that the best checkpoint is chosen by."""
        return self._context.config.train.metric_for_best_model

    @property
    def _higher_is_better(self) -> bool:
        return self._context.metrics is not None and self._context.metrics.higher_is_better

    def _logged_scores(self, until: int) -> dict[int, ValidationScore]:
        """Return the validation scores up to a step, by step; on rank 0."""
        return self._monitor.logged_scores(until, self._metric, self._higher_is_better)

    def has_ended_early(self) -> bool:
        """Return whether the validations so far end the run (``train.early_stopping_patience``)."""
        return self._ends_early

    def _is_validation_due(self, epoch_ends: bool) -> bool:
        """Return True if there are validation rows and an epoch or an evaluation interval ends at this step."""
        every = self._context.config.output.evaluate_every_steps
        return bool(self._context.dataset.validation) and (epoch_ends or is_due(self._progress.step, every))

    def require_learning(self) -> None:
        """Check at the end that the run has a checkpoint, of this process or of one that it resumed from.

        Raises:
            TrainingStoppedError: every step was skipped, and nothing was learned.
        """
        if self._committed is None and self._progress.step:
            raise self._guard.nothing_learned(self._progress.step)

    def _commit_if_changed(self, state: PhaseState, validation_follows: bool) -> None:
        """Save a checkpoint, unless every step since the last one was skipped: it would only take a better one's place.

        The weights are those of the last checkpoint then, and a resume does the skipped steps again.
        """
        if self._guard.has_changed:
            self._commit(state, validation_follows)
        else:
            log.warning("step %d: no checkpoint is written, because every step since the last one was skipped",
                        self._progress.step)  # fmt: skip

    def _commit(self, state: PhaseState, validation_follows: bool) -> None:
        """Check the weights, then save a checkpoint; with validation to follow, older checkpoints stay until then."""
        vocabulary = int(state.suffix.model.config.get_text_config().vocab_size)
        with without_dropout(state):
            self._guard.require_sound(
                self._progress.step, state.engine.forward_loss, state.prefix, state.engine.fragments(), vocabulary
            )
        self._monitor.sync()
        with explain_out_of_memory("the checkpoint"):
            self._saver.save(content_of(self._context, state, self._progress), validation_follows)
        self._committed = self._progress.step
        self._guard.committed()
        malloc.release_free_memory()

    def _validate(self, state: PhaseState, may_stop: bool) -> bool:
        """Compute the validation loss and metrics, save them with this step's checkpoint, show sample answers.

        Returns False if a signal stopped it.
        """
        progress, metrics = self._progress, self._context.metrics
        answers: list[Answer] | None = None
        values: dict[str, float] = {}
        if not self._saver.commits_alone:
            self._saver.wait()  # commit first, so that a failing validation cannot lose the checkpoint
        with without_dropout(state):
            try:
                outcome = validate(self._context, state, may_stop)
                if metrics is not None:
                    if metrics.needs_answers:
                        answers = sample_answers(self._context, state, may_stop, self._epoch_seconds())
                    values = compute_metrics(self._context, state, answers or [])
            except StopRequested:
                return False
        self._saver.wait()  # before the loss is told, which belongs to a checkpoint
        progress.score = ValidationScore(
            outcome.loss, self._metric, values.get(self._metric), self._higher_is_better
        )  # fmt: skip
        self._monitor.evaluation(progress.step, progress.passes, outcome.loss, values)
        committed = self._committed
        if committed is not None and (committed == progress.step or not self._guard.has_changed):
            self._saver.record_score(committed, progress.score)  # the weights are those of that checkpoint
        if answers is None:
            self._show_answers(state)
        else:
            self._monitor.answers(progress.step, answers)
        return True

    def _epoch_seconds(self) -> float:
        """Return the seconds that the steps of an epoch take, by those so far."""
        seconds, steps = self._progress.totals["seconds"], self._progress.step
        return seconds / max(steps, 1) * self._context.batch_plan.steps_per_epoch

    def _show_answers(self, state: PhaseState) -> None:
        """Generate and show sample answers; after a failure, warn once and generate no more."""
        world, failure = self._context.world, None
        if self._answers_failed or not self._context.config.output.sample_answers:
            return
        try:
            with without_dropout(state):
                answers = sample_answers(self._context, state, True, self._epoch_seconds())
            self._monitor.answers(self._progress.step, answers)
        except StopRequested:  # on every rank
            return
        except Exception as error:
            failure = " ".join(f"{type(error).__name__}: {error}".split())
        if failures := [text for text in world.all_gather_object(failure) if text is not None]:
            self._answers_failed = True
            malloc.release_free_memory()
            log.warning("sample answers failed (%s); training goes on, and none are shown any more", failures[0])


def is_due(step: int, every: int | None) -> bool:
    """Return True after each ``every`` steps; always False if ``every`` is None."""
    return every is not None and step % every == 0
