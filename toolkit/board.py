"""TensorBoard's event file, which may fail without harm to the training it shows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("frostline")


class Board:
    """Writes curves and texts until the disk refuses; then it says so once and writes no more."""

    def __init__(self, directory: Path, first_step: int) -> None:
        """
        Args:
            directory: of the event file.
            first_step: what an earlier run wrote from this step on is hidden.
        """  # noqa: D205, D212
        self._directory = directory
        self._writer: SummaryWriter | None = None
        self._attempt(lambda: self._open(first_step))

    def scalar(self, curve: str, value: float, step: int) -> None:
        """Add a point; one that is not finite leaves a gap."""
        writer = self._writer
        if writer is not None and math.isfinite(value):
            self._attempt(lambda: writer.add_scalar(curve, value, step))

    def text(self, name: str, text: str, step: int) -> None:
        """Add a Markdown text."""
        writer = self._writer
        if writer is not None:
            self._attempt(lambda: writer.add_text(name, text, step))

    def close(self) -> None:
        """Write what is left."""
        writer = self._writer
        if writer is not None:
            self._attempt(writer.close)

    def _open(self, first_step: int) -> None:
        self._writer = SummaryWriter(str(self._directory), purge_step=first_step)

    def _attempt(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:  # also what the writer's own thread met before
            self._writer = None
            log.warning("TensorBoard's file in %s cannot be written (%s); training goes on without it, and "
                        "metrics.jsonl has the same numbers", self._directory, error.strerror or error)  # fmt: skip
