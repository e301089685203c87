"""Log a run to the progress bar, ``metrics.jsonl`` and TensorBoard, on rank 0 only."""

from __future__ import annotations

import json
import logging
import math
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import torch
from PIL.Image import Image

from toolkit.runtime.paths import LineFile, explain_refused_write, replace_text
from toolkit.runtime.progress_bar import ProgressBar
from toolkit.training.progress import Progress
from toolkit.training.tensorboard_writer import TensorBoardWriter

log = logging.getLogger("frostline")


@dataclass(frozen=True)
class StepMetrics:
    """One line of ``metrics.jsonl``."""

    step: int
    """Optimizer steps done, from 1."""
    epoch: float
    """Passes over the data done, as a fraction."""
    loss: float
    """Mean cross entropy over the supervised tokens of the global batch."""
    learning_rate: float
    """The rate this step used."""
    grad_norm: float
    """Global gradient 2-norm before clipping."""
    supervised_tokens: int
    """Tokens the loss was taken over, all ranks."""
    tokens: int
    """Tokens read, all ranks, without padding."""
    seconds: float
    """Wall-clock time of the step."""
    tokens_per_second: float
    trained_parameters: int
    """Parameters that this step trained; changes with the phases of mask.schedule."""
    peak_memory_gib: float
    """Highest so far of any rank: GPU memory allocated, or resident memory on a CPU."""
    skipped: bool = False
    """Loss or gradient norm was not finite (null here), so the step changed nothing."""
    moved_share: float | None = None
    """Share of the sampled trained weights that were meant to move and that the update changed: 256 a tensor, or of
    each rank's partitions, in float32 masters or their equal (``toolkit.optim.update_monitor``). None at rate 0."""
    cache_hit_share: float | None = None
    """Cache hit rate of rank 0 since the step before: samples that the activation cache held, of those requested; None
    where nothing is cached."""


_CURVES = {
    "train/loss": "loss",
    "train/learning_rate": "learning_rate",
    "train/grad_norm": "grad_norm",
    "train/moved_share": "moved_share",
    "train/tokens_per_second": "tokens_per_second",
    "train/memory_peak_gib": "peak_memory_gib",
    "train/cache_hit_share": "cache_hit_share",
    "train/trained_parameters": "trained_parameters",
}
"""What a step shows. TensorBoard opens two groups of cards at first, in the order of the alphabet: eval and train."""

_OUTCOMES = ("eval/loss", "eval/perplexity", "train/epoch_loss", "train/loss")
"""Curves by whose last points runs are compared."""


_CELL = 400
"""Most characters of a table cell with a sample answer."""


@dataclass(frozen=True)
class Answer:
    """A held-out question, its reference answer, and the answer of the model."""

    prompt: str
    reference: str
    answer: str


class Monitor:
    """Log a run; a context manager. On other ranks than 0 it does nothing.

    Args:
        run: the run directory.
        is_main: true on rank 0.
        total_steps: for the progress bar.
        first_step: steps done before a resume; later rows of an interrupted run are dropped.
    """

    def __init__(self, run: Path, is_main: bool, total_steps: int, first_step: int = 0) -> None:
        self._is_main = is_main
        self.planned_gib: float | None = None
        """The peak that the run was planned to have, of tensors alone; shown beside the measured one."""
        if not is_main:
            return
        self._metrics_path = run / "metrics.jsonl"
        with explain_refused_write(run):
            self._drop_rows_after(first_step)
        self._file = LineFile(self._metrics_path)
        self._board = TensorBoardWriter(run / "tensorboard", first_step + 1 if first_step else 0)
        self._bar = ProgressBar("training", total_steps, "step", first_step)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_main:
            self._bar.close()
            self._board.close()
            self._file.close()

    def texts(self, step: int, **texts: str) -> None:
        """Show Markdown texts in TensorBoard's text tab, as they hold after ``step`` steps."""
        if self._is_main:
            for name, text in texts.items():
                self._board.text(name, text, step)

    def picture(self, step: int, name: str, image: Image) -> None:
        """Show a picture in TensorBoard's image tab."""
        if self._is_main:
            self._board.image(name, image, step)

    def hparams(self, values: Mapping[str, str | float]) -> None:
        """Show what runs are compared by in TensorBoard's HParams tab, beside their last losses."""
        if self._is_main:
            self._board.hparams(values, _OUTCOMES)

    def finish(self) -> None:
        """Mark the run as done."""
        if self._is_main:
            self._board.finish()

    def step(self, metrics: StepMetrics) -> None:
        """Log one optimizer step."""
        if not self._is_main:
            return
        row = asdict(metrics)
        self._write(row)
        for curve, key in _CURVES.items():
            if row.get(key) is not None:
                self._board.scalar(curve, row[key], metrics.step)
        if self.planned_gib is not None:
            self._board.scalar("train/memory_planned_gib", self.planned_gib, metrics.step)
        self._bar.advance(
            loss=f"{metrics.loss:.4f}",
            lr=f"{metrics.learning_rate:.1e}",
            tok_s=f"{metrics.tokens_per_second:.0f}",
        )

    def epoch(self, progress: Progress) -> None:
        """Log the mean of the step losses of the epoch that ends at ``progress``."""
        if self._is_main:
            skipped = int(progress.totals["epoch_skipped"])
            self._board.scalar("train/epoch_loss", progress.epoch_loss, progress.step)
            but = f", {skipped} skipped" if skipped else ""
            steps = int(progress.totals["epoch_finite"])
            self.say(f"epoch {progress.epoch + 1}: mean loss {progress.epoch_loss:.4f} over {steps} steps{but}")

    def evaluation(self, step: int, epoch: float, loss: float, perplexity: float) -> None:
        """Log a validation."""
        if self._is_main:
            self._write({"step": step, "epoch": epoch, "eval_loss": loss, "eval_perplexity": perplexity})
            self._board.scalar("eval/loss", loss, step)
            self._board.scalar("eval/perplexity", perplexity, step)
            self.say(f"step {step}: validation loss {loss:.4f}, perplexity {perplexity:.2f}")

    def answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Show sample answers beside their references in TensorBoard's text tab."""
        if self._is_main and answers:
            rows = [
                f"| {number} | {_cell(one.prompt, end=True)} | {_cell(one.reference)} | {_cell(one.answer)} |"
                for number, one in enumerate(answers, start=1)
            ]
            header = ["| row | question, the end of its prompt | reference | answer |", "|---:|---|---|---|"]
            self._board.text("answers", "\n".join([f"After step {step}:", "", *header, *rows]), step)

    def loss_at(self, step: int) -> float | None:
        """Return on rank 0 the validation loss that is logged after ``step`` steps, NaN if not finite; else None."""
        if not self._is_main:
            return None
        rows = map(json.loads, self._file.lines())
        found = [row["eval_loss"] for row in rows if "eval_loss" in row and row["step"] == step]
        return None if not found else math.nan if found[-1] is None else float(found[-1])

    def say(self, line: str) -> None:
        """Log a line."""
        if self._is_main:
            log.info("%s", line)

    def _write(self, row: dict[str, object]) -> None:
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._file.write(json.dumps(finite))  # JSON has no NaN

    def _drop_rows_after(self, step: int) -> None:
        if self._metrics_path.exists():
            rows = self._metrics_path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step]
            replace_text(self._metrics_path, "".join(kept))


def _cell(text: str, end: bool = False) -> str:
    """Return text as a cell of a Markdown table: one line of at most ``_CELL`` characters, its marks escaped."""
    text = " ".join(text.split())
    if len(text) > _CELL:
        text = f"… {text[-_CELL:]}" if end else f"{text[:_CELL]} …"
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", text)


def peak_memory_gib(device: torch.device) -> float:
    """Return the highest memory use of this process so far, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
