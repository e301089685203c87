"""Write and read the validation loss of a checkpoint: a file beside its manifest, written after the commit.

A checkpoint is complete without it; a run that resumes from such a checkpoint validates first. The file holds the
digest of the manifest, so that it is never read for another checkpoint of the same step.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

from toolkit.checkpoint.manifest import EVALUATION_FILE, read_manifest, read_sealed, sealed
from toolkit.checkpoint.state import read_state
from toolkit.runtime.errors import CheckpointError
from toolkit.runtime.hashed_files import as_json
from toolkit.runtime.paths import publish

log = logging.getLogger("frostline")


def write_validation_loss(checkpoint: Path, loss: float) -> None:
    """Write the validation loss of a committed checkpoint, atomically.

    Raises:
        CheckpointError: the manifest cannot be read.
        OSError: the file cannot be written.
    """
    _, manifest_sha256 = read_manifest(checkpoint)
    content = {"loss": loss if math.isfinite(loss) else None, "manifest": manifest_sha256}  # JSON has no NaN
    # outside, so that no partial file is ever in a checkpoint
    staging = checkpoint.with_name(f".{checkpoint.name}.{EVALUATION_FILE}")
    staging.unlink(missing_ok=True)
    publish(as_json(sealed(content)).encode(), checkpoint / EVALUATION_FILE, staging)


def read_validation_loss(checkpoint: Path) -> float | None:
    """Return the validation loss of a checkpoint: NaN if it was not finite, None if it was not computed.

    A file that is damaged or belongs to another checkpoint is reported in the log and ignored.
    """
    path = checkpoint / EVALUATION_FILE
    try:
        content, _ = read_sealed(path)
        loss = content["loss"]
        if not isinstance(loss, (float, type(None))):
            raise ValueError(f"its loss is {loss!r}")
        if content["manifest"] != read_manifest(checkpoint)[1]:
            raise ValueError("it belongs to another checkpoint")
    except FileNotFoundError:
        try:
            return read_state(checkpoint).eval_loss  # version 0.1 stored it there
        except CheckpointError:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, CheckpointError) as error:
        log.warning("%s is not used (%s); without it this checkpoint counts as not validated", path, error)
        return None
    return math.nan if loss is None else loss
