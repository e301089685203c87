"""Write TensorBoard's event file, which may fail without harm to the training it shows."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter, summary

log = logging.getLogger("frostline")

_hparams: Callable[[dict[str, Any], dict[str, float]], Sequence[Any]] = summary.hparams


class TensorBoardWriter:
    """Write curves, texts and pictures until the disk refuses; then warn once and write no more.

    All writes go through a queue to a thread of their own; nothing waits for the disk.

    Args:
        directory: of the event file.
        first_step: what an earlier run wrote from this step on is hidden.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        self._directory = directory
        self._writer: SummaryWriter | None = None
        self._original_hook = threading.excepthook
        threading.excepthook = self._on_thread_error
        self._try_write(lambda: self._open(first_step))

    def scalar(self, curve: str, value: float, step: int) -> None:
        """Add a point; one that is not finite leaves a gap."""
        writer = self._writer
        if writer is not None and math.isfinite(value):
            self._try_write(lambda: writer.add_scalar(curve, value, step))

    def text(self, name: str, text: str, step: int) -> None:
        """Add a Markdown text."""
        writer = self._writer
        if writer is not None:
            self._try_write(lambda: writer.add_text(name, text, step))

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Add a picture."""
        writer = self._writer
        if writer is not None:
            self._try_write(lambda: writer.add_image(name, np.asarray(image), step, dataformats="HWC"))

    def hparams(self, values: Mapping[str, str | float], outcomes: Sequence[str]) -> None:
        """Show what the run is compared by in the HParams tab.

        ``SummaryWriter.add_hparams`` would open a run beside this one, with a point for every outcome; these are the
        same records in the run itself, whose own curves are the outcomes.

        Args:
            values: settings by name.
            outcomes: curves whose last points are shown beside them.
        """
        writer = self._writer
        if writer is not None:
            self._add_records(writer, _hparams(dict(values), dict.fromkeys(outcomes, 0.0))[:2])

    def finish(self) -> None:
        """Mark the run as finished in the HParams tab."""
        writer = self._writer
        if writer is not None:
            self._add_records(writer, _hparams({}, {})[2:])

    def close(self) -> None:
        """Write what is left."""
        writer = self._writer
        if writer is not None:
            self._try_write(writer.close)
        if threading.excepthook == self._on_thread_error:
            threading.excepthook = self._original_hook

    def _add_records(self, writer: SummaryWriter, records: Sequence[Any]) -> None:
        file: Any = writer.file_writer
        self._try_write(lambda: [file.add_summary(record) for record in records])

    def _open(self, first_step: int) -> None:
        self._writer = SummaryWriter(str(self._directory), purge_step=first_step, flush_secs=20)

    def _on_thread_error(self, failed: threading.ExceptHookArgs) -> None:
        """Keep quiet about an OSError of the writer's own thread: the next call raises it again here."""
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__name__ == "_AsyncWriterThread"):
            self._original_hook(failed)

    def _try_write(self, write: Callable[[], object]) -> None:
        """Call ``write``; on an OSError warn and write no more."""
        try:
            write()
        except OSError as error:  # also what the writer's own thread met before
            self._writer = None
            log.warning("TensorBoard's file in %s cannot be written (%s); training goes on without it, and "
                        "metrics.jsonl has the same numbers", self._directory, error.strerror or error)  # fmt: skip
