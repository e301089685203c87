"""Read ``sweep.json``, which says what a sweep is and what came of each trial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from toolkit.config.schema import RunConfig
from toolkit.runtime.errors import CheckpointError
from toolkit.runtime.file_lock import LOCK_FILE_NAME
from toolkit.runtime.paths import read_regular

STATE_FILE = "sweep.json"
"""In a sweep's directory: its recipe, its trials and what came of them. It is the table as JSON."""
_Format = Literal["frostline-sweep-1"]
(FORMAT,) = get_args(_Format)
_MOST_BYTES = 2**26

Number = float | None
"""A number; null if it is not finite."""


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _ScoresForm(_Form):
    """Checks scores of a trial, or of the model before training (``toolkit.sweeping.results.Scores``)."""

    value: Number
    low: Number
    high: Number
    higher_is_better: bool
    rows: int
    metric: str


class _TrialForm(_Form):
    """Checks a trial as ``Trial.as_dict`` returns it."""

    trial: Annotated[int, Field(ge=1, le=10**6)]
    settings: dict[str, Any]
    wall_seconds: float
    code: int | None
    fault: str | None
    checkpoint: str = ""
    digest: str = ""
    base: str = ""
    seconds: Number = None
    memory_gib: Number = None
    trained: Number = None
    validation: _ScoresForm | None = None
    test: _ScoresForm | None = None


class _RefusedForm(_Form):
    """Checks settings that a search chose and that do not go together."""

    settings: dict[str, Any]
    faults: list[str]


class _SweepForm(_Form):
    """Checks what ``Sweep.save`` writes, as far as it is read again."""

    format: _Format
    recipe: dict[str, dict[str, Any]]
    base: dict[str, dict[str, _ScoresForm]]
    trials: list[_TrialForm]
    refused: list[_RefusedForm] = Field(default=[])


def recipe_of(config: RunConfig) -> dict[str, Any]:
    """Return a recipe as JSON values, without where its runs are written."""
    values: dict[str, Any] = config.model_dump(mode="json")
    del values["output"]["dir"], values["output"]["resume"]
    return values


def read_state_file(directory: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the state of the sweep in a directory; nothing for one that is not used yet.

    Raises:
        CheckpointError: it holds something else, or the sweep of another recipe.
    """
    if not directory.exists():
        return {}
    try:
        held = [path.name for path in directory.iterdir() if path.name != LOCK_FILE_NAME]
        state = json.loads(read_regular(directory / STATE_FILE, _MOST_BYTES)) if held else {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{directory} holds no sweep ({error}); expected a directory that is empty, does not exist, or holds one. "
            "Choose another --output.dir"
        ) from None
    if held:
        _check_form(state, directory / STATE_FILE)
    then: dict[str, Any] = state.get("recipe", recipe)  # of a new directory there is none
    differences = [
        f"{section}.{key} is {recipe.get(section, {}).get(key)!r}, and was {then.get(section, {}).get(key)!r}"
        for section in {**then, **recipe}
        for key in {**then.get(section, {}), **recipe.get(section, {})}
        if then.get(section, {}).get(key) != recipe.get(section, {}).get(key)
    ]
    if differences:
        raise CheckpointError(
            f"{directory} holds a sweep of another recipe: {'; '.join(differences)}. Choose another --output.dir"
        )
    return dict(state)


def _check_form(state: Any, path: Path) -> None:
    """Raise CheckpointError if a JSON value is not what a sweep writes."""
    try:
        numbers = [trial.trial for trial in _SweepForm.model_validate(state).trials]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{path} is of no sweep that this version reads ({f'{where}: ' if where else ''}{first['msg']}); choose "
            "another --output.dir"
        ) from None
    if len(set(numbers)) < len(numbers):
        raise CheckpointError(f"{path} has two trials of one number; choose another --output.dir")
