"""What trials of a sweep are computed from: rows and model, which must be the same for their scores to be compared."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from toolkit.checkpoint.catalog import latest_checkpoint
from toolkit.checkpoint.state import CheckpointState, input_differences, read_state
from toolkit.config.schema import RunConfig
from toolkit.runtime.errors import CheckpointError
from toolkit.sweeping.trials import Sweep, Trial


def held_out(config: RunConfig) -> str:
    """Return a digest of what decides which rows a trial holds out."""
    return _data_digest(config, {"packing", "oversample"})


def _data_digest(config: RunConfig, left_out: set[str]) -> str:
    data = config.data
    drawn = isinstance(data.validation, float) or isinstance(data.test, float) or data.limit is not None
    return _digest(data.model_dump(mode="json", exclude=left_out), config.train.seed if drawn else None)


def base_key(config: RunConfig, checkpoint: Path) -> str:
    """Return a digest of what decides the score of the model before training: the rows held out, and the model.

    Both by their names in a trial's recipe and by their content, which its ``checkpoint`` has fingerprints of.
    """
    content = {name: value for name, value in read_state(checkpoint).fingerprints.items() if name != "schedule"}
    return _digest(_named_base(config), content)


def _named_base(config: RunConfig) -> str:
    """Return a digest of what names the rows, those to train on among them, and the model."""
    return _digest(_data_digest(config, {"packing"}), config.model.model_dump(mode="json"))


def require_same_inputs(sweep: Sweep, trial: Trial) -> None:
    """Check that a finished trial had the rows and the model of the first of those that name the same ones.

    Raises:
        CheckpointError: a file has changed between the two.
    """
    before = (one for one in sorted(sweep.trials, key=lambda one: one.number) if one.number < trial.number)
    alike = (one for one in before if _named_inputs(one.config) == _named_inputs(trial.config))
    first = next((one for one in alike if one.is_done), None)
    if first is None:
        return
    if differences := list(input_differences(_state_of(first), _state_of(trial))):
        raise CheckpointError(
            f"trial {trial.number} was not computed from what trial {first.number} was: {'; '.join(differences)}. "
            f"Their scores cannot be compared: put the files back and remove {trial.directory}, or begin a sweep in "
            "another --output.dir"
        )


def _named_inputs(config: RunConfig) -> tuple[str, int]:
    """Return what names the rows and the model of a recipe, and draws among the rows."""
    return _named_base(config), config.train.seed


def _state_of(trial: Trial) -> CheckpointState:
    """Return the state of a finished trial."""
    checkpoint = latest_checkpoint(trial.directory)
    assert checkpoint is not None
    return read_state(checkpoint)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
