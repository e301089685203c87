"""Read which trials a sweep has: a grid of values, a list of trials, or both, as data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from toolkit.config.flags import parse_flag_value, takes_list
from toolkit.config.recipe import build_config, did_you_mean, field_paths, merge, read_recipe
from toolkit.config.schema import RunConfig
from toolkit.runtime.errors import ConfigError

Settings = dict[str, Any]
"""Values by dotted recipe key."""

FLAG = "--sweep."
"""What precedes the keys of a grid on the command line."""
_NOT_SWEPT = {
    "output.dir": "each trial has a directory of its own in that of the sweep",
    "output.resume": "a sweep that is started again goes on where it was",
    "data.fold": "a trial holds out data.validation",
    "data.folds": "a trial holds out data.validation",
    "train.metric_for_best_model": "it is what the trials are compared by",
}
"""Keys that trials cannot differ in, and why."""
MOST_TRIALS = 1000
"""Most trials of a sweep; a grid of some keys soon has more combinations than anyone waits for."""
_SECTIONS = ("grid", "trials", "search")
_FORM = "grid: {train.learning_rate: [1e-5, 1e-4]}, or trials: [{mask.train: last:4 head, train.learning_rate: 1e-5}]"


@dataclass(frozen=True)
class SweepDefinition:
    """Names what trials differ in."""

    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Values of each key; every combination of them is a trial."""
    trials: Sequence[Mapping[str, Any]] = ()
    """Settings of single trials; each is combined with every combination of ``grid``."""
    search: Any = None
    """What ``toolkit.sweeping.search.read_search`` takes, in place of both."""

    @property
    def keys(self) -> list[str]:
        """Return the keys that trials differ in, those of ``trials`` first."""
        return list(dict.fromkeys([*(key for trial in self.trials for key in trial), *self.grid]))

    @property
    def count(self) -> int:
        """Return the number of trials."""
        return max(1, len(self.trials)) * math.prod(map(len, self.grid.values()))

    def combinations(self) -> Iterator[Settings]:
        """Yield the settings of each trial, the last key of the grid changing fastest."""
        for trial in self.trials or [{}]:
            for values in product(*self.grid.values()):
                yield {**trial, **dict(zip(self.grid, values, strict=True))}


def read_definition(path: Path) -> SweepDefinition:
    """Read a sweep from a YAML file with ``grid``, ``trials`` or both, or with ``search``.

    Raises:
        ConfigError: the file cannot be read, or has another form.
    """
    values, source = read_recipe(path), f"sweep {path}"
    if other := [key for key in values if key not in _SECTIONS]:
        raise ConfigError([f"{key}: unknown; expected {_FORM}, or search (docs/sweep.md)" for key in other], source)
    return definition_of(values.get("grid") or {}, values.get("trials") or [], source, values.get("search"))


def definition_of(grid: Any, trials: Any, source: str, search: Any = None) -> SweepDefinition:
    """Return a sweep, once its form is checked; values are checked by ``trial_configs``.

    Raises:
        ConfigError: ``grid`` is no mapping of keys to lists, or ``trials`` no list of mappings, or ``search`` is not
            alone.
    """
    faults = []
    if search is not None:
        if grid or trials:
            faults.append(
                "search stands beside grid or trials; a search names its values itself, so leave out the others"
            )
    elif not isinstance(grid, Mapping):
        faults.append(f"grid is a {type(grid).__name__}; expected {_FORM}")
    else:
        faults += [
            f"grid.{key} is {value!r}; expected a list of values, as {_FORM}"
            for key, value in grid.items()
            if not isinstance(value, list | tuple) or not value
        ]
    if not isinstance(trials, list | tuple) or not all(isinstance(trial, Mapping) and trial for trial in trials):
        faults.append(f"trials: expected a list of mappings, as {_FORM}")
    if not faults:
        keys = SweepDefinition(grid, trials).keys
        faults += [f"{key!r} is no text; expected a recipe key, as {_FORM}" for key in keys if not isinstance(key, str)]
    if not faults and (both := [key for trial in trials for key in trial if key in grid]):
        faults.append(f"{both[0]}: stands in grid and in trials; leave it out of one of them")
    if faults:
        raise ConfigError(faults, source)
    return SweepDefinition(grid, trials, search)


def take_flags(words: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Take ``--sweep.KEY VALUE …`` from a command line; return the words of each key, and the other words.

    Raises:
        ConfigError: a key has no value, or is given twice.
    """
    grid, rest, into = dict[str, list[str]](), list[str](), None
    for word in words:
        if word.startswith(FLAG):
            key, equals, value = word.removeprefix(FLAG).partition("=")
            if key in grid:
                raise ConfigError([f"{FLAG}{key} is given twice; name all its values after it"], "command line")
            into = grid.setdefault(key, [value] if equals else [])
        elif word.startswith("--") or into is None:
            into = None
            rest.append(word)
        else:
            into.append(word)
    if empty := [key for key, values in grid.items() if not values]:
        raise ConfigError([f"{FLAG}{key} has no value; expected some, as {FLAG}{key} A B" for key in empty])
    return grid, rest


def trial_configs(base: RunConfig, definition: SweepDefinition, source: str) -> list[tuple[Settings, RunConfig]]:
    """Return the settings of each trial, as the recipe holds them, and its recipe.

    A value of ``mask.train`` may be text, as ``plan.py --compare`` takes it: ``last:4 head``, ``lora last:8``.

    Raises:
        ConfigError: keys or values are invalid, there are no trials, or two are the same; lists all faults.
    """
    faults = check_keys(definition.keys)
    if not definition.keys:
        faults.append(f"nothing to sweep over; expected {FLAG}train.learning_rate 1e-5 1e-4, or a file with {_FORM}")
    if definition.count > MOST_TRIALS:
        faults.append(f"{definition.count:,} trials; expected at most {MOST_TRIALS:,}: name fewer values of each key")
    if faults:
        raise ConfigError(faults, source)
    seen = dict[str, int]()
    found: list[tuple[Settings, RunConfig]] = []
    for number, settings in enumerate(definition.combinations(), start=1):
        try:
            own, config = _resolve(settings, base, source)
        except ConfigError as error:
            faults += [f"trial {number}: {fault}" for fault in error.faults]
            continue
        key = json.dumps(config.model_dump(mode="json"), sort_keys=True)  # what it leaves out has the recipe's value
        same = seen.setdefault(key, number)
        if same != number:
            faults.append(f"trial {number} is trial {same} again: {describe(own, config)}")
        found.append((own, config))
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)), source)
    return found


def check_keys(keys: Sequence[str]) -> list[str]:
    """Return what is wrong with the keys that trials are to differ in."""
    known = field_paths()
    faults = [f"{key}: unknown key{did_you_mean(str(key), known)}" for key in keys if key not in known]
    return faults + [f"{key}: {_NOT_SWEPT[key]}; leave it out" for key in keys if key in _NOT_SWEPT]


def read_values(key: str, values: Sequence[Any], base: RunConfig) -> list[Any]:
    """Return values of one key as the recipe holds them.

    Raises:
        ConfigError: the recipe does not take one of them; lists all faults.
    """
    found, faults = [], []
    for value in values:
        try:
            found.append(_resolve({key: value}, base, key)[0][key])
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    return found


def _resolve(settings: Mapping[str, Any], base: RunConfig, source: str) -> tuple[Settings, RunConfig]:
    """Return settings as the recipe holds them, and the recipe with them; ConfigError if it does not take them."""
    read = {key: _read(key, value, base) for key, value in settings.items()}
    config = build_config(merge(base.model_dump(mode="json"), read), source)
    dumped = config.model_dump(mode="json")
    return {key: dumped[key.split(".")[0]][key.split(".")[1]] for key in settings}, config


def _read(key: str, value: Any, base: RunConfig) -> Any:
    """Return a value as the recipe takes it, of one that may be a word of the command line."""
    if not isinstance(value, str):
        return value
    if key == "mask.train":
        from toolkit.planning.comparison import parse_mask  # imports torch

        mask = base.mask.model_copy(update={"schedule": [], "rotation": None})  # the trial may have others
        return parse_mask(value, mask, "mask.train").model_dump(mode="json")["train"]
    faults: list[str] = []
    annotation = field_paths()[key].annotation
    is_list = takes_list(annotation) and value.startswith(("[", "{"))
    read = parse_flag_value(key, annotation, [value] if is_list else value, faults)
    if faults:
        raise ConfigError(faults)
    return read


def describe(settings: Mapping[str, Any], config: RunConfig) -> str:
    """Return the settings of a trial as a short text: the last part of each key, and masks as words."""
    return ", ".join(
        f"{key.rpartition('.')[2]} {_value_text(value)}"
        if key != "mask.train"
        else " ".join(map(str, config.mask.train))
        for key, value in settings.items()
    )


def _value_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
