"""Write TensorBoard's event file, which may fail without harm to the training it shows."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter, summary

from toolkit.runtime.own_files import NotOwnError

log = logging.getLogger("frostline")

_OUTCOMES = ("eval/loss", "eval/perplexity", "train/epoch_loss", "train/loss")
"""Curves by whose last points runs are compared."""
_hparams: Callable[[dict[str, Any], dict[str, float]], Sequence[Any]] = summary.hparams


class TensorBoardWriter:
    """Write curves, texts and pictures until the disk refuses; then warn once and write no more.

    All writes go through a queue to a thread of their own; nothing waits for the disk.
    Without a ``directory``, on other ranks than 0, it writes nothing. What an earlier run wrote from ``first_step`` on
    is hidden.
    """

    def __init__(self, directory: Path | None, first_step: int) -> None:
        self._directory = directory
        self._writer: SummaryWriter | None = None
        self._original_hook = threading.excepthook
        if directory is not None:
            threading.excepthook = self._on_thread_error
            with self._warn_once():
                if directory.is_symlink():
                    raise NotOwnError(directory, "is a symbolic link")
                self._writer = SummaryWriter(str(directory), purge_step=first_step, flush_secs=20)

    def scalar(self, curve: str, value: float, step: int) -> None:
        """Add a point; one that is not finite leaves a gap."""
        if math.isfinite(value):
            self._write(lambda writer: writer.add_scalar(curve, value, step))

    def text(self, name: str, text: str, step: int) -> None:
        """Add a Markdown text, as it holds after ``step`` steps."""
        self._write(lambda writer: writer.add_text(name, text, step))

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Add a picture."""
        self._write(lambda writer: writer.add_image(name, np.asarray(image), step, dataformats="HWC"))

    def hparams(self, values: Mapping[str, str | float]) -> None:
        """Show the settings that runs are compared by in the HParams tab, beside their last losses.

        ``SummaryWriter.add_hparams`` would open a run beside this one, with a point for every outcome; these are the
        same records in the run itself, whose own curves are the outcomes.
        """
        self._add_records(_hparams(dict(values), dict.fromkeys(_OUTCOMES, 0.0))[:2])

    def finish(self) -> None:
        """Mark the run as finished in the HParams tab."""
        self._add_records(_hparams({}, {})[2:])

    def close(self) -> None:
        """Write what is left."""
        self._write(lambda writer: writer.close())
        if threading.excepthook == self._on_thread_error:
            threading.excepthook = self._original_hook

    def _add_records(self, records: Sequence[Any]) -> None:
        def add(writer: Any) -> None:
            for record in records:
                writer.file_writer.add_summary(record)

        self._write(add)

    def _on_thread_error(self, failed: threading.ExceptHookArgs) -> None:
        """Keep quiet about an OSError of the writer's own thread: the next call raises it again here."""
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__name__ == "_AsyncWriterThread"):
            self._original_hook(failed)

    def _write(self, write: Callable[[SummaryWriter], object]) -> None:
        """Call ``write`` unless the disk has refused an earlier one."""
        if self._writer is not None:
            with self._warn_once():
                write(self._writer)

    @contextmanager
    def _warn_once(self) -> Iterator[None]:
        """On an OSError of the body warn, and write no more."""
        try:
            yield
        except OSError as error:  # also what the writer's own thread met before
            self._writer = None
            log.warning("TensorBoard's file in %s cannot be written (%s); training goes on without it, and "
                        "metrics.jsonl has the same numbers", self._directory, error.strerror or error)  # fmt: skip
