"""Write and read what the validation of a checkpoint gave: a file beside its manifest, written after the commit.

A checkpoint is complete without it; a run that resumes from such a checkpoint validates first. The file holds the
digest of the manifest, so that it is never read for another checkpoint of the same step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.checkpoint.manifest import EVALUATION_FILE, read_manifest, read_sealed, sealed
from toolkit.checkpoint.state import read_state
from toolkit.runtime.errors import CheckpointError
from toolkit.runtime.hashed_files import as_json
from toolkit.runtime.own_files import remove_own_file
from toolkit.runtime.paths import publish

log = logging.getLogger("frostline")

LOSS = "loss"
"""Name of the validation loss, as a metric to choose checkpoints by."""


@dataclass(frozen=True)
class ValidationScore:
    """The validation loss, and the metric that the best checkpoint is chosen by (``train.metric_for_best_model``)."""

    loss: float
    """NaN if it was not finite."""
    metric: str = LOSS
    value: float | None = None
    """Of the metric, NaN if it was not defined; None if that is the loss."""
    higher_is_better: bool = False

    @property
    def rank(self) -> float:
        """Return the number by which checkpoints are compared, the lower the better; NaN if there is none."""
        if self.value is None:
            return self.loss
        return -self.value if self.higher_is_better else self.value

    @property
    def text(self) -> str:
        """Return a description such as ``validation loss 0.9060, accuracy 0.8100``."""
        loss = f"validation loss {self.loss:.4f}" if math.isfinite(self.loss) else "no validation loss"
        return loss if self.value is None else f"{loss}, {self.metric} {self.value:.4f}"

    @property
    def deciding(self) -> str:
        """Return the value that decides: ``0.9060``, or ``accuracy 0.8100``."""
        return f"{self.loss:.4f}" if self.value is None else f"{self.metric} {self.value:.4f}"

    def as_json(self) -> dict[str, Any]:
        """Return the score as JSON takes it, which has no NaN."""
        content: dict[str, Any] = {"loss": _finite(self.loss)}
        if self.value is not None:
            by = {"metric": self.metric, "value": _finite(self.value), "higher_is_better": self.higher_is_better}
            content["metric_for_best_model"] = by
        return content

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> ValidationScore:
        """Read what ``as_json`` returned.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
        """
        loss = _number(content["loss"], "loss")
        by = content.get("metric_for_best_model")
        if by is None:
            return cls(loss)
        if not isinstance(by["metric"], str) or not isinstance(by["higher_is_better"], bool):
            raise ValueError(f"its metric is {by!r}")
        return cls(loss, by["metric"], _number(by["value"], by["metric"]), by["higher_is_better"])


def write_validation_score(checkpoint: Path, score: ValidationScore) -> None:
    """Write the validation score of a committed checkpoint, atomically.

    Raises:
        CheckpointError: the manifest cannot be read.
        OSError: the file cannot be written.
    """
    _, manifest_sha256 = read_manifest(checkpoint)
    content = {**score.as_json(), "manifest": manifest_sha256}
    # outside, so that no partial file is ever in a checkpoint
    staging = checkpoint.with_name(f".{checkpoint.name}.{EVALUATION_FILE}")
    with suppress(FileNotFoundError):
        remove_own_file(staging)
    publish(as_json(sealed(content)).encode(), checkpoint / EVALUATION_FILE, staging)


def read_validation_score(checkpoint: Path) -> ValidationScore | None:
    """Return the validation score of a checkpoint; None if it was not computed.

    A file that is damaged or belongs to another checkpoint is reported in the log and ignored.
    """
    path = checkpoint / EVALUATION_FILE
    try:
        content, _ = read_sealed(path)
        score = ValidationScore.of_json(content)
        if content["manifest"] != read_manifest(checkpoint)[1]:
            raise ValueError("it belongs to another checkpoint")
    except FileNotFoundError:
        try:
            loss = read_state(checkpoint).eval_loss  # version 0.1 stored it there
        except CheckpointError:
            return None
        return None if loss is None else ValidationScore(loss)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, CheckpointError) as error:
        log.warning("%s is not used (%s); without it this checkpoint counts as not validated", path, error)
        return None
    return score


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: Any, name: str) -> float:
    """Return a number, NaN for None."""
    if not isinstance(value, float | None):
        raise ValueError(f"its {name} is {value!r}")
    return math.nan if value is None else value
