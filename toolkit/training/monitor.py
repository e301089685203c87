"""Log a run to the progress bar, ``metrics.jsonl``, TensorBoard and other trackers, on rank 0 only."""

from __future__ import annotations

import logging
import os
import re
import resource
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from toolkit.checkpoint.early_stopping import logged_scores
from toolkit.checkpoint.metrics_log import METRICS_FILE, LogLine, read_log, row_of, rows_of
from toolkit.checkpoint.validation_score import ValidationScore
from toolkit.inference.evaluation import perplexity
from toolkit.runtime.json_text import to_json
from toolkit.runtime.own_files import NotOwnError, is_real_file
from toolkit.runtime.paths import LineFile, explain_refused_write, replace_bytes
from toolkit.runtime.progress_bar import ProgressBar
from toolkit.training.progress import Progress
from toolkit.training.tensorboard_writer import TensorBoardWriter
from toolkit.training.trackers import Trackers

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

_CELL = 400
"""Most characters of a table cell with a sample answer."""


@dataclass(frozen=True)
class Answer:
    """A held-out question, its reference answer, and the answer of the model."""

    prompt: str
    reference: str
    answer: str


class Monitor:
    """Log a run; a context manager. Without ``is_main``, on other ranks than 0, it does nothing.

    ``first_step`` counts the steps done before a resume; later rows of an interrupted run are dropped. ``report_to`` is
    that of the recipe, and ``trackers`` are those in it beside TensorBoard, which the caller closes.
    """

    def __init__(
        self, run: Path, is_main: bool, total_steps: int, first_step: int = 0,
        report_to: Collection[str] = ("tensorboard",), trackers: Trackers | None = None,
    ) -> None:  # fmt: skip
        self._is_main, self._trackers = is_main, trackers or Trackers()
        self.planned_gib: float | None = None
        """The peak that the run was planned to have, of tensors alone; shown beside the measured one."""
        if is_main:
            with explain_refused_write(run):
                _drop_rows_after(first_step, run / METRICS_FILE)
            self._file = LineFile(run / METRICS_FILE)
            self._bar = ProgressBar("training", total_steps, "step", first_step)
        has_board = is_main and "tensorboard" in report_to
        self.board = TensorBoardWriter(run / "tensorboard" if has_board else None, first_step + 1 if first_step else 0)
        """TensorBoard's curves, texts and pictures."""

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_main:
            self._bar.close()
            self.board.close()
            self._file.close()

    def step(self, metrics: StepMetrics) -> None:
        """Log one optimizer step."""
        if not self._is_main:
            return
        row = asdict(metrics)
        self._write(row)
        curves = {curve: row[key] for curve, key in _CURVES.items() if row.get(key) is not None}
        if self.planned_gib is not None:
            curves["train/memory_planned_gib"] = self.planned_gib
        self._show(metrics.step, curves)
        self._bar.advance(
            loss=f"{metrics.loss:.4f}",
            lr=f"{metrics.learning_rate:.1e}",
            tok_s=f"{metrics.tokens_per_second:.0f}",
        )

    def epoch(self, progress: Progress) -> None:
        """Log the mean of the step losses of the epoch that ends at ``progress``."""
        if self._is_main:
            skipped = int(progress.totals["epoch_skipped"])
            self._show(progress.step, {"train/epoch_loss": progress.epoch_loss})
            but = f", {skipped} skipped" if skipped else ""
            steps = int(progress.totals["epoch_finite"])
            log.info("epoch %d: mean loss %.4f over %d steps%s", progress.epoch + 1, progress.epoch_loss, steps, but)

    def evaluation(self, step: int, epoch: float, loss: float, metrics: Mapping[str, float]) -> None:
        """Log a validation: its loss, and the metrics that ``output.evaluate_metrics`` asks for."""
        if self._is_main:
            values = {"loss": loss, "perplexity": perplexity(loss), **metrics}
            self._write({"step": step, "epoch": epoch, **{f"eval_{name}": value for name, value in values.items()}})
            self._show(step, {f"eval/{name}": value for name, value in values.items()})
            more = "".join(f", {name} {value:.4f}" for name, value in metrics.items())
            log.info("step %d: validation loss %.4f, perplexity %.2f%s", step, loss, values["perplexity"], more)

    def answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Show sample answers beside their references in TensorBoard's text tab."""
        if self._is_main and answers:
            rows = [
                f"| {number} | {_cell(one.prompt, end=True)} | {_cell(one.reference)} | {_cell(one.answer)} |"
                for number, one in enumerate(answers, start=1)
            ]
            header = ["| row | question, the end of its prompt | reference | answer |", "|---:|---|---|---|"]
            self.board.text("answers", "\n".join([f"After step {step}:", "", *header, *rows]), step)

    def logged_scores(self, until: int, metric: str, higher_is_better: bool) -> dict[int, ValidationScore]:
        """Return the validation scores up to a step, by step; on rank 0. See ``early_stopping.logged_scores``."""
        pending = (LogLine(line.encode(), row_of(line.encode()), is_whole=True) for line in self._file.pending)
        rows = rows_of([*read_log(self._file.path), *pending])
        return logged_scores(rows, until, metric, higher_is_better)

    def sync(self) -> None:
        """Let what is logged survive a power cut, before the checkpoint that a resume goes on from is committed."""
        if self._is_main:
            self._file.sync()

    def _show(self, step: int, curves: Mapping[str, float]) -> None:
        """Show the values of some curves after a step in TensorBoard and at the other trackers."""
        for curve, value in curves.items():
            self.board.scalar(curve, value, step)
        self._trackers.scalars(step, curves)

    def _write(self, row: dict[str, object]) -> None:
        self._file.write(to_json(row))


def _drop_rows_after(step: int, path: Path) -> None:
    """Remove from ``metrics.jsonl`` what an interrupted run logged after its last checkpoint; all else stays.

    Lines that are no rows of a run are counted, and kept byte for byte. A part of a row at the end is dropped.
    """
    if not os.path.lexists(path):
        return
    if not is_real_file(path):
        raise NotOwnError(path, "is no regular file")
    kept, unreadable = [], 0
    for line in read_log(path):
        if line.row is not None and line.row["step"] > step:
            continue
        if not line.is_whole and line.row is None and line.content.startswith(b'{"step": '):
            continue
        kept.append(line.content + b"\n")
        unreadable += line.is_unreadable
    if unreadable:
        log.warning("%s: %d lines are no rows of a run; they are kept and not read", path, unreadable)
    replace_bytes(path, b"".join(kept))


def _cell(text: str, end: bool = False) -> str:
    """Return text as a cell of a Markdown table: one line of at most ``_CELL`` characters, its marks escaped."""
    text = " ".join(text.split())
    if len(text) > _CELL:
        text = f"… {text[-_CELL:]}" if end else f"{text[:_CELL]} …"
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", text)


def peak_memory_gib(device: torch.device) -> float:
    """Return the highest memory use of this process so far, in GiB.

    On Linux ``ru_maxrss`` begins at that of the process which started this one; ``VmHWM`` does not.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE):
            return int(found[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
