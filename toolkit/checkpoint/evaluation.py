"""The validation loss of a checkpoint: a file beside its manifest, written once the checkpoint is committed.

A checkpoint is whole without it; a run that is continued from such a one validates first. The file names the manifest
it belongs to, so that it never speaks for another checkpoint of the same step.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

from toolkit.checkpoint.manifest import EVALUATION, read_digest, read_sealed, sealed
from toolkit.checkpoint.state import read_state
from toolkit.runtime.errors import CheckpointError
from toolkit.runtime.hashed_files import as_json
from toolkit.runtime.paths import publish

log = logging.getLogger("frostline")


def write_loss(checkpoint: Path, loss: float) -> None:
    """Write the validation loss of a committed checkpoint, whole or not at all.

    Raises:
        CheckpointError: the manifest cannot be read.
        OSError: the disk.
    """
    # JSON has no NaN
    content = {"loss": loss if math.isfinite(loss) else None, "manifest": read_digest(checkpoint)}
    staging = checkpoint.with_name(f".{checkpoint.name}.{EVALUATION}")  # beside it: no part is ever in a checkpoint
    staging.unlink(missing_ok=True)
    publish(as_json(sealed(content)).encode(), checkpoint / EVALUATION, staging)


def read_loss(checkpoint: Path) -> float | None:
    """Return the validation loss of a checkpoint: NaN if it was not finite, None if there is none.

    A file that was damaged, or belongs to another checkpoint, is named in the log and counts as none.
    """
    path = checkpoint / EVALUATION
    try:
        content, _ = read_sealed(path)
        loss = content["loss"]
        if not isinstance(loss, (float, type(None))):
            raise ValueError(f"its loss is {loss!r}")
        if content["manifest"] != read_digest(checkpoint):
            raise ValueError("it belongs to another checkpoint")
    except FileNotFoundError:
        return _loss_in_state(checkpoint)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, CheckpointError) as error:
        log.warning("%s is not used (%s); without it this checkpoint counts as not validated", path, error)
        return None
    return math.nan if loss is None else loss


def _loss_in_state(checkpoint: Path) -> float | None:
    """Return the loss from the state, where version 0.1 kept it."""
    try:
        return read_state(checkpoint).eval_loss
    except CheckpointError:
        return None
