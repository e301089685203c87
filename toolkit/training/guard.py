"""Guard a run against bad steps: name their rows, never save broken weights, stop after too many skipped steps."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from toolkit.activation_cache.cached_prefix import HiddenStates
from toolkit.checkpoint.catalog import latest_checkpoint
from toolkit.data.batches import Batch
from toolkit.models.weight_files import join_names
from toolkit.optim.state_fragments import MASTER, Fragment
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import TrainingStoppedError
from toolkit.runtime.out_of_memory import explain_out_of_memory
from toolkit.split.supervised_loss import SuffixLoss
from toolkit.training.step import StepResult

log = logging.getLogger("frostline")

_MAX_NAMED = 16
"""Most rows of a rank that a message names."""


class SpikeDetector:
    """Detect loss spikes: losses far above the recent ones.

    A loss is a spike if it exceeds ``median + threshold * max(1.4826 * MAD, 0.05 * median)`` of the last ``window``
    finite losses, where MAD is the median distance from their median; 1.4826 MAD is the standard deviation of normal
    noise (Rousseeuw and Croux 1993, doi 10.1080/01621459.1993.10476408). Both medians ignore the spikes themselves.
    The first ``least`` losses are none.
    """

    def __init__(self, window: int = 64, least: int = 16, threshold: float = 6.0) -> None:
        self._losses: deque[float] = deque(maxlen=window)
        self._least, self._threshold = least, threshold

    def spiked(self, loss: float) -> float | None:
        """Return the median of recent losses if ``loss`` is a spike, else None; add ``loss`` to the recent ones."""
        recent = list(self._losses)
        self._losses.append(loss)
        if len(recent) < self._least:
            return None
        middle = median(recent)
        spread = 1.4826 * median(abs(other - middle) for other in recent)
        return middle if loss > middle + self._threshold * max(spread, 0.05 * middle) else None


class StepGuard:
    """Watch the results of a run's steps. Every rank calls each method at the same step.

    The step itself skips an update that is not finite; the guard warns of it and of loss spikes, and ends the run.

    Args:
        run_dir: run directory, whose last checkpoint the messages name.
        max_skipped: number of skipped steps in a row at which the run ends.
        world: all ranks.
    """

    def __init__(self, run_dir: Path, max_skipped: int, world: World) -> None:
        self._run_dir, self._max_skipped, self._world = run_dir, max_skipped, world
        self._skipped_in_a_row = 0
        self._spikes = SpikeDetector()
        self._batch_to_recheck: Batch | None = None
        """First micro batch of the last step that was not skipped, on which ``require_sound`` computes the loss again
        before a checkpoint; None until such a step."""
        self._loss_before = math.inf
        """Its loss before that step."""
        self._losses: list[float] = []
        """Of the steps since the last commit that were not skipped; the first is that of the committed weights."""
        self._last_rows = ""
        """Rows of the last skipped step."""

    @property
    def has_changed(self) -> bool:
        """Return whether any step since the last commit, or in this process, changed the weights."""
        return bool(self._losses)

    def committed(self) -> None:
        """Begin to count anew: the weights as they are now are in a checkpoint."""
        self._losses.clear()

    def nothing_learned(self, steps: int) -> TrainingStoppedError:
        """Return the error of a run whose ``steps`` steps were all skipped, so that there is nothing to keep."""
        return TrainingStoppedError(
            f"all {steps} steps were skipped: nothing was learned, and there is no checkpoint. Lower "
            f"train.learning_rate, or look at the rows: {self._last_rows or 'named above'}"
        )

    def check_step(self, step: int, result: StepResult, micro_batches: Sequence[Batch]) -> None:
        """Check the result of step number ``step``: warn of a loss spike or a skipped step.

        Raises:
            TrainingStoppedError: too many steps in a row were skipped.
        """
        if not result.skipped:
            self._skipped_in_a_row = 0
            self._batch_to_recheck = micro_batches[0]
            self._losses.append(result.loss)
            self._loss_before = _own_loss(result, micro_batches)
            median_loss = self._spikes.spiked(result.loss)
            if median_loss is not None:
                rows = self._describe_step_rows(result, micro_batches)
                log.warning("step %d: loss %.4f spikes above the usual %.4f; its rows: %s",
                            step, result.loss, median_loss, rows)  # fmt: skip
            return
        self._skipped_in_a_row += 1
        rows = self._last_rows = self._describe_step_rows(result, micro_batches)
        what = f"loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}"
        log.warning("step %d is skipped on all ranks: %s; no weight has changed. Its rows: %s", step, what, rows)
        if self._skipped_in_a_row >= self._max_skipped:
            raise TrainingStoppedError(
                f"{self._skipped_in_a_row} steps in a row were skipped, the last of them step {step} ({what}), and "
                f"train.max_skipped_steps is {self._max_skipped}. {self._last_checkpoint_text()}. "
                f"Lower train.learning_rate, or look at the rows: {rows}"
            )

    @torch.no_grad()
    def require_sound(
        self,
        step: int,
        forward: SuffixLoss,
        prefix: HiddenStates | None,
        fragments: Sequence[Fragment],
        vocabulary: int,
    ) -> None:
        """Check the weights before a checkpoint; every rank calls it. The caller turns dropout off.

        A far too high learning rate can break weights that stay finite; such weights must not replace the last good
        checkpoint. So the loss on the last micro batch is computed again. It has to be finite, and not to have risen to
        ln(``vocabulary``), which a model has that knows nothing; and all float32 masters have to be finite.

        Raises:
            TrainingStoppedError: they are not sound on some rank.
        """
        if self._batch_to_recheck is None:
            return
        self._require_finite(step, fragments)
        with explain_out_of_memory("the check before a checkpoint", self._batch_to_recheck.shape_text):
            batch = self._batch_to_recheck.to(self._world.device)
            loss = float(forward(prefix(batch) if prefix else None, batch))
        if self._world.max(float(not math.isfinite(loss))):
            rows = self._describe_rows([(_row_names(self._batch_to_recheck), loss)])
            raise TrainingStoppedError(
                f"the weights after step {step} give no finite loss on rows they learned from, so they are not saved. "
                f"{self._last_checkpoint_text()}. Lower train.learning_rate, or look at the rows: {rows}"
            )
        mean = loss / max(self._batch_to_recheck.supervised_tokens, 1)
        if self._world.max(float(self._is_ruined(mean, math.log(vocabulary)))):
            rows = self._describe_rows([(_row_names(self._batch_to_recheck), loss)])
            raise TrainingStoppedError(
                f"the weights after step {step} have lost what they knew: loss {mean:.4f} on rows of that step, which "
                f"was {self._loss_before:.4f} before it; a model that knows nothing has {math.log(vocabulary):.4f}. "
                f"They are not saved. {self._last_checkpoint_text()}. Lower train.learning_rate, or look at the rows: "
                f"{rows}"
            )

    def _require_finite(self, step: int, fragments: Sequence[Fragment]) -> None:
        """Raise TrainingStoppedError if a master of some rank is not finite; one wait for the device."""
        bad = [(part.name, ~part.state.read()[MASTER].isfinite().all()) for part in fragments]
        is_bad = bool(bad) and bool(torch.stack([flag for _, flag in bad]).any())
        names = [name for name, flag in bad if bool(flag)] if is_bad else []
        if found := sorted({name for of_rank in self._world.all_gather_object(names) for name in of_rank}):
            raise TrainingStoppedError(
                f"the weights after step {step} hold NaN or infinity in {join_names(found, 4)}, so they are not saved. "
                f"{self._last_checkpoint_text()}. Lower train.learning_rate; or they were so in the base model"
            )

    def _is_ruined(self, loss: float, uniform: float) -> bool:
        """Return whether a loss after a step says that the weights lost what the last checkpoint's knew.

        It is as high as that of a uniform distribution over the vocabulary, and the same rows had a lower one before
        the step, or the weights of the last commit did and most steps since then are as bad.
        """
        if loss < 0.999 * uniform:
            return False
        first, *later = self._losses or [math.inf]
        fell = len(later) > 1 and median(later) >= 0.999 * uniform and first < 0.95 * uniform
        return self._loss_before < 0.95 * uniform or fell

    def _last_checkpoint_text(self) -> str:
        """Return the sentence that names the last checkpoint."""
        checkpoint = latest_checkpoint(self._run_dir)
        return f"The last good checkpoint, {checkpoint}, is kept" if checkpoint else "There is no checkpoint yet"

    def _describe_step_rows(self, result: StepResult, micro_batches: Sequence[Batch]) -> str:
        """Describe the rows of a step on all ranks; every rank calls it."""
        own = zip(micro_batches, result.shares, strict=True)
        return self._describe_rows([(_row_names(batch), share) for batch, share in own if not batch.is_filler])

    def _describe_rows(self, own: list[tuple[list[str], float]]) -> str:
        """Describe the rows of all ranks, given names and loss of each micro batch; not finite losses come first."""
        ranks = []
        for rank, micro_batches in enumerate(self._world.all_gather_object(own)):
            names: list[str] = []
            for rows, share in sorted(micro_batches, key=lambda pair: math.isfinite(pair[1])):
                names += rows if math.isfinite(share) else [f"{row} (loss {share})" for row in rows]
            more = [f"and {len(names) - _MAX_NAMED} more"] if len(names) > _MAX_NAMED else []
            ranks.append(f"rank {rank}: {', '.join([*names[:_MAX_NAMED], *more]) or 'none'}")
        return "; ".join(ranks)


def _own_loss(result: StepResult, micro_batches: Sequence[Batch]) -> float:
    """Return the mean loss over the supervised tokens of a step's first micro batch, before the update."""
    first = micro_batches[0]
    if first.is_filler or not first.supervised_tokens or not result.shares:
        return math.inf
    return result.shares[0] * result.supervised_tokens / first.supervised_tokens


def _row_names(batch: Batch) -> list[str]:
    """Return where each row of a micro batch comes from, such as file and line."""
    return [example.origin or "a row without a name" for example in batch.examples]
