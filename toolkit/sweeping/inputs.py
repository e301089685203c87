"""What trials of a sweep are computed from: rows and model, which must be the same for their scores to be compared."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from toolkit.checkpoint.catalog import latest_checkpoint
from toolkit.checkpoint.state import CheckpointState, input_differences, read_state
from toolkit.config.schema import RunConfig
from toolkit.runtime.errors import CheckpointError
from toolkit.sweeping.trials import Sweep, Trial


def held_out(config: RunConfig) -> str:
    """Return a digest of what decides which rows a trial holds out."""
    data = config.data
    drawn = isinstance(data.validation, float) or isinstance(data.test, float) or data.limit is not None
    return _digest(data.model_dump(mode="json"), config.train.seed if drawn else None)


def base_key(config: RunConfig) -> str:
    """Return a digest of what decides the score of the model before training: the rows held out, and the model."""
    return _digest(held_out(config), config.model.model_dump(mode="json"))


def require_same_inputs(sweep: Sweep, trial: Trial) -> None:
    """Check that a finished trial had the rows and the model of the first of those that name the same ones.

    Raises:
        CheckpointError: a file has changed between the two.
    """
    state = _state_of(trial)
    for other in sorted(sweep.trials, key=lambda one: one.number):
        if other is trial:
            return
        if base_key(other.config) != base_key(trial.config) or other.config.train.seed != trial.config.train.seed:
            continue
        first = _state_of(other) if other.is_done else None
        if state is None or first is None:
            continue
        if differences := list(input_differences(first, state)):
            raise CheckpointError(
                f"trial {trial.number} was not computed from what trial {other.number} was: {'; '.join(differences)}. "
                f"Their scores cannot be compared: put the files back and remove {trial.directory}, or begin a sweep "
                "in another --output.dir"
            )
        return


def _state_of(trial: Trial) -> CheckpointState | None:
    checkpoint = latest_checkpoint(trial.directory)
    return None if checkpoint is None else read_state(checkpoint)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
