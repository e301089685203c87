"""Keep what a sweep is and what came of each trial, in its directory; find which trials are left."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.checkpoint.catalog import latest_checkpoint
from toolkit.checkpoint.early_stopping import ended_early
from toolkit.checkpoint.own_directory import require_run_or_unused
from toolkit.checkpoint.run_directory import write_config
from toolkit.checkpoint.state import read_state
from toolkit.checkpoint.validation_score import read_validation_score
from toolkit.config.flags import Invocation
from toolkit.config.recipe import read_saved
from toolkit.config.schema import RunConfig
from toolkit.runtime.errors import CheckpointError, ConfigError
from toolkit.runtime.file_lock import RunLock
from toolkit.runtime.json_text import to_json
from toolkit.runtime.paths import explain_refused_write, replace_text
from toolkit.runtime.privacy import group_files, make_directory
from toolkit.slurm.submission import queued_job
from toolkit.sweeping.definition import Settings, SweepDefinition, describe, trial_configs
from toolkit.sweeping.frost_lines import find_lines
from toolkit.sweeping.search import NOTHING_HELD_OUT, Search, check_values, read_search
from toolkit.sweeping.state_file import FORMAT, STATE_FILE, read_state_file, recipe_of

log = logging.getLogger("frostline")


@dataclass
class Trial:
    """One run of a sweep."""

    number: int
    """From 1, in the order in which the trials were first named; it names the directory."""
    settings: Settings
    """What is its own, by dotted key."""
    config: RunConfig
    """Its recipe, ``output.dir`` included."""
    boundary: int | None = None
    """Frost line of its first phase; None if that cannot be told without weights."""
    code: int | None = None
    """Exit code of its last run; None if it has not run or was stopped."""
    seconds: float = 0.0
    """Wall-clock seconds of its processes, those that were stopped included."""
    fault: str | None = None
    """Why it has no scores though it ran, as a phrase."""
    result: dict[str, Any] = field(default_factory=dict)
    """What ``toolkit.sweeping.results`` makes of the run; empty until it is scored."""

    @property
    def directory(self) -> Path:
        """Return its run directory."""
        return Path(str(self.config.output.dir))

    @property
    def text(self) -> str:
        """Return its settings as a short text."""
        return describe(self.settings, self.config)

    @property
    def is_done(self) -> bool:
        """Return whether the run has done all its steps and its last validation, here or as a job."""
        return _is_finished(self.directory, self.config)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return {
            "trial": self.number, "directory": str(self.directory), "settings": self.settings,
            "boundary": self.boundary, "code": self.code, "wall_seconds": self.seconds, "fault": self.fault,
            **self.result,
        }  # fmt: skip


@dataclass
class Sweep:
    """A sweep in its directory, which this process holds."""

    directory: Path
    recipe: dict[str, Any]
    """The recipe that the trials change, as JSON values, without ``output.dir``."""
    trials: list[Trial]
    """In the order of their definition."""
    others: list[dict[str, Any]]
    """Trials of earlier commands that this one does not name; they are kept."""
    base: dict[str, Any] = field(default_factory=dict)
    """Scores of the model before training, by what was held out."""
    search: Search | None = None
    """What chooses further trials, if anything does."""
    refused: list[dict[str, Any]] = field(default_factory=list)
    """Settings that searches chose and that do not go together, each with its faults."""

    def add(self, settings: Settings, base: RunConfig, source: str) -> Trial:
        """Add a trial of a recipe; raises ConfigError if ``settings`` are not valid together."""
        ((own, config),) = _settings_of(base, [settings], source)
        numbers = [*(trial.number for trial in self.trials), *(other["trial"] for other in self.others), 0]
        trial = _trial(self.directory, max(numbers) + 1, own, config)
        _find_lines([trial])
        self.trials.append(trial)
        self.save()
        return trial

    @property
    def in_running_order(self) -> list[Trial]:
        """Return the trials, those of the lowest frost line first: the others continue from its hidden states."""
        return sorted(self.trials, key=lambda trial: -1 if trial.boundary is None else trial.boundary)

    def save(self) -> None:
        """Write the state; the file is whole at any moment."""
        trials = [*self.others, *(trial.as_dict() for trial in self.trials)]
        state = {"format": FORMAT, "recipe": self.recipe, "base": self.base, "refused": self.refused}
        text = to_json({**state, "trials": sorted(trials, key=lambda one: one["trial"])}, ensure_ascii=False, indent=1)
        with explain_refused_write(self.directory):
            replace_text(self.directory / STATE_FILE, f"{text}\n")


@contextmanager
def open_sweep(
    invocation: Invocation, definition: SweepDefinition, source: str, writes: bool = True
) -> Iterator[Sweep]:
    """Begin a sweep or open the one in its directory, and hold it within the context, unless nothing is written.

    The directory is ``output.dir``, or ``runs/RECIPE-sweep``. Trials that are known keep number and outcome.

    Raises:
        ConfigError: recipe or trials are invalid, or nothing is held out to compare trials on.
        CheckpointError: the directory holds something else, the sweep of another recipe, or is in use.
    """
    base = invocation.config
    if base.data.folds is not None:
        raise ConfigError(["data.folds is set, and a trial is one run; hold out data.validation instead"], source)
    search = None if definition.search is None else read_search(definition.search, base, source)
    if search:
        check_values(search, base, source)
        found: list[tuple[Settings, RunConfig]] = []
    else:
        found = trial_configs(base, definition, source)
        _require_held_out([config for _, config in found], source)
    directory = Path(base.output.dir) if base.output.dir else Path("runs") / f"{invocation.recipe.stem}-sweep"
    recipe = recipe_of(base)
    state = read_state_file(directory, recipe)
    known = {json.dumps(one["settings"], sort_keys=True): one for one in state.get("trials", ())}
    if search:
        earlier = [one["settings"] for one in known.values() if search.takes(one["settings"])]
        found = _settings_of(base, earlier, source) if earlier else []
        if beyond := len(known) - len(earlier):
            log.info("sweep: %d earlier trials are not among what the search draws from; they do not count", beyond)
    numbers = iter(range(max((one["trial"] for one in known.values()), default=0) + 1, 10**9))
    trials = []
    for settings, config in found:
        before = known.pop(json.dumps(settings, sort_keys=True), None)
        number = before["trial"] if before else next(numbers)
        trial = _trial(directory, number, settings, config)
        if before:
            trial.code, trial.seconds, trial.fault = before["code"], before["wall_seconds"], before["fault"]
            if trial.is_done:
                trial.result = {key: value for key, value in before.items() if key not in trial.as_dict()}
        trials.append(trial)
    _find_lines(trials)
    others, refused = list(known.values()), state.get("refused", [])
    sweep = Sweep(directory, recipe, trials, others, state.get("base", {}), search, refused)
    if not writes:
        yield sweep
        return
    is_shared = base.output.share == "group"
    with group_files(is_shared), _held(directory, is_shared):
        sweep.save()
        yield sweep


def _settings_of(base: RunConfig, trials: Sequence[Settings], source: str) -> list[tuple[Settings, RunConfig]]:
    return trial_configs(base, SweepDefinition(trials=trials), source)


def _trial(directory: Path, number: int, settings: Settings, config: RunConfig) -> Trial:
    output = config.output.model_copy(update={"dir": str(directory / f"trial-{number:03}"), "resume": "auto"})
    return Trial(number, settings, config.model_copy(update={"output": output}))


def _find_lines(trials: Sequence[Trial]) -> None:
    """Find the frost line of each trial; raises as ``find_lines``."""
    lines = find_lines({trial.number: (trial.settings, trial.config) for trial in trials})
    for trial in trials:
        trial.boundary = lines.get(trial.number)


def _require_held_out(configs: Sequence[RunConfig], source: str) -> None:
    """Raise ConfigError if a trial holds no rows out."""
    without = [number for number, config in enumerate(configs, start=1) if config.data.validation is None]
    if not without:
        return
    which = "" if len(without) == len(configs) else f"trial {', '.join(map(str, without))}: "
    raise ConfigError([f"{which}{NOTHING_HELD_OUT}"], source)


def prepare_run(trial: Trial) -> Path:
    """Write the recipe of a trial into its directory; return the file, which ``train.py --config`` takes.

    Raises:
        CheckpointError: another process, such as one that a killed sweep left, trains it, or a job is to; the directory
            is a link, or holds something else than this trial.
        DiskError: the directory cannot be written.
    """
    if holder := queued_job(trial.directory):
        raise CheckpointError(f"{trial.directory} belongs to {holder}; wait for it, or cancel it")
    _require_own(trial)
    with explain_refused_write(trial.directory), _held(trial.directory, trial.config.output.share == "group"):
        write_config(trial.directory, trial.config)
    return trial.directory / "config.yaml"


def _require_own(trial: Trial) -> None:
    """Raise CheckpointError if a trial's directory is a link, or holds what is not a run of its recipe."""
    if trial.directory.is_symlink():
        raise CheckpointError(
            f"{trial.directory} is a symbolic link, and trials are written within the sweep's own directory; remove it"
        )
    require_run_or_unused(trial.directory)
    written = trial.directory / "config.yaml"
    if written.exists() and recipe_of(read_saved(written)) != recipe_of(trial.config):
        raise CheckpointError(
            f"{trial.directory} holds a run of another recipe; move it away, or choose another --output.dir"
        )


@contextmanager
def _held(directory: Path, is_shared: bool) -> Iterator[None]:
    """Make a directory and hold its lock within the context; CheckpointError if another process has it."""
    try:
        make_directory(directory, is_shared)
        lock = RunLock.take(directory)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written ({error}); choose another --output.dir") from None
    if isinstance(lock, str):
        raise CheckpointError(f"{directory} is being written by {lock}. Wait for it, or stop it")
    try:
        yield
    finally:
        lock.release()


def _is_finished(directory: Path, config: RunConfig) -> bool:
    try:
        checkpoint = latest_checkpoint(directory)
        if checkpoint is None or read_validation_score(checkpoint) is None:
            return False
        state = read_state(checkpoint)
    except CheckpointError:
        return False
    return state.step >= state.total_steps or ended_early(directory, checkpoint, config.train)
