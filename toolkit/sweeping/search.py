"""Choose the next trial of a sweep by what the last ones gave, by optuna's tree-structured Parzen estimator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.config.schema import RunConfig
from toolkit.runtime.errors import ConfigError, UsageError
from toolkit.sweeping.definition import (
    MOST_TRIALS,
    Settings,
    SweepDefinition,
    check_keys,
    describe,
    read_values,
    trial_configs,
)
from toolkit.sweeping.frost_lines import lines_and_faults

MISSING_OPTUNA = 'a search needs optuna: pip install optuna (pip install -e ".[search]")'
FORM = (
    "search: {trials: 20, over: {train.learning_rate: {low: 1e-5, high: 1e-3, log: true}, "
    "mask.train: [last:4, lora last:8]}}"
)
NOTHING_HELD_OUT = "data.validation is none; expected rows to compare the trials on, as 0.1 or a file"
_SEARCH_KEYS, _RANGE_KEYS = {"trials", "over"}, {"low", "high", "log"}
_RANDOM_TRIALS = 10
"""Trials with a score that are drawn at random before what they gave decides."""
_MOST_DRAWS = 100
"""Draws in a row of settings that were tried, after which nothing is taken to be left."""


@dataclass(frozen=True)
class Dimension:
    """One key of a search: a range, or a list of values."""

    key: str
    values: tuple[Any, ...]
    """As the recipe holds them: the choices, or both ends of the range."""
    is_range: bool = False
    is_log: bool = False

    @property
    def is_whole(self) -> bool:
        """Return whether whole numbers alone are drawn: both ends of the range are."""
        return all(isinstance(value, int) for value in self.values)

    def distribution(self) -> Any:
        """Return it as optuna draws from it; of a list, a place in it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if not self.is_range:
            return CategoricalDistribution(range(len(self.values)))
        low, high = self.values
        return (IntDistribution if self.is_whole else FloatDistribution)(low, high, log=self.is_log)

    def place(self, value: Any) -> Any:
        """Return what optuna would have drawn for a value of the recipe; None if that cannot be drawn."""
        if not self.is_range:
            return self.values.index(value) if value in self.values else None
        is_number = isinstance(value, int if self.is_whole else int | float) and not isinstance(value, bool)
        return value if is_number and self.values[0] <= value <= self.values[1] else None

    def value(self, drawn: Any) -> Any:
        """Return the value of the recipe for what optuna drew."""
        return drawn if self.is_range else self.values[drawn]


@dataclass(frozen=True)
class Search:
    """Names what a sweep searches over, and with how many trials."""

    count: int
    dimensions: tuple[Dimension, ...]

    @property
    def keys(self) -> set[str]:
        """Return the keys that its trials differ in."""
        return {dimension.key for dimension in self.dimensions}

    @property
    def corners(self) -> list[tuple[str, Any]]:
        """Return every choice and both ends of every range, each with its key."""
        return [(one.key, value) for one in self.dimensions for value in one.values]

    @property
    def first(self) -> Settings:
        """Return the first choice of every list and the lower end of every range."""
        return {one.key: one.values[0] for one in self.dimensions}

    def takes(self, settings: Settings) -> bool:
        """Return whether these settings, as the recipe holds them, may be drawn."""
        if set(settings) != self.keys:
            return False
        return all(one.place(settings[one.key]) is not None for one in self.dimensions)

    def next_settings(self, tried: Sequence[tuple[Settings, float | None]], higher: bool, seed: int) -> Settings | None:
        """Return settings that were not tried; None if there are none left to find.

        The first ten are drawn at random, the others by the Parzen estimator (2304.11127): where the better of the
        values tried are dense, those of the worse are not.

        Args:
            tried: settings and score of earlier trials; None of one that failed. Those outside of the ranges are left
                out.
            higher: whether more of the score is better.
            seed: together with the number of trials it decides the draw.

        Raises:
            UsageError: optuna is not installed.
        """
        try:
            import optuna
        except ImportError:
            raise UsageError(MISSING_OPTUNA) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        distributions = {one.key: one.distribution() for one in self.dimensions}
        sampler = optuna.samplers.TPESampler(n_startup_trials=_RANDOM_TRIALS, seed=(seed + len(tried)) % 2**32)
        study = optuna.create_study(direction="maximize" if higher else "minimize", sampler=sampler)

        def state(score: float | None) -> optuna.trial.TrialState:
            return optuna.trial.TrialState.FAIL if score is None else optuna.trial.TrialState.COMPLETE

        for settings, score in tried:
            if self.takes(settings):
                places = {one.key: one.place(settings[one.key]) for one in self.dimensions}
                study.add_trial(
                    optuna.trial.create_trial(
                        state=state(score), params=places, distributions=distributions, value=score
                    )
                )
        for _ in range(_MOST_DRAWS):
            trial = study.ask(distributions)
            drawn = {one.key: one.value(trial.params[one.key]) for one in self.dimensions}
            same = [score for settings, score in tried if settings == drawn]
            if not same:
                return drawn
            study.tell(trial, same[0], state=state(same[0]))
        return None


def read_search(content: Any, base: RunConfig, source: str) -> Search:
    """Return a search of ``trials`` and ``over``, its values read and checked as those of a grid.

    Raises:
        ConfigError: it has another form, or keys or values are invalid; lists all faults.
    """
    if not isinstance(content, Mapping) or set(content) != _SEARCH_KEYS:
        raise ConfigError([f"search is {content!r}; expected its trials and over, as {FORM}"], source)
    count, over, faults = content["trials"], content["over"], list[str]()
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_TRIALS:
        faults.append(f"search.trials is {count!r}; expected a number from 1 to {MOST_TRIALS:,}")
    if not isinstance(over, Mapping) or not over:
        raise ConfigError(
            [*faults, f"search.over is {over!r}; expected keys with a range or a list, as {FORM}"], source
        )
    dimensions = []
    for key, given in over.items():
        if unfit := check_keys([key]):
            faults += unfit
            continue
        try:
            dimensions.append(_dimension(key, given, base))
        except ConfigError as error:
            faults += [f"search.over: {fault}" for fault in error.faults]
    if faults:
        raise ConfigError(faults, source)
    return Search(count, tuple(dimensions))


def check_values(search: Search, base: RunConfig, source: str) -> None:
    """Check every choice and both ends of every range: by the recipe's form, and against the model's config.json.

    Raises:
        ConfigError: a value is valid neither beside the first values of the other keys nor beside those of the recipe;
            lists the faults of all.
    """
    wanted = [one for key, value in search.corners for one in ({**search.first, key: value}, {key: value})]
    valid, faults = dict[int, tuple[Settings, RunConfig]](), dict[int, list[str]]()
    for number, settings in enumerate(wanted):
        try:
            (valid[number],) = trial_configs(base, SweepDefinition(trials=[settings]), source)
        except ConfigError as error:
            faults[number] = [fault.removeprefix("trial 1: ") for fault in error.faults]
    faults |= {number: [NOTHING_HELD_OUT] for number, (_, config) in valid.items() if config.data.validation is None}
    for number, fault in lines_and_faults(valid)[1].items():
        faults.setdefault(number, [f"{describe(*valid[number])}: {fault}"])
    of_both = dict[str, None]()
    for beside in range(0, len(wanted), 2):  # each value beside the first ones, then alone
        if beside in faults and beside + 1 in faults:
            of_both |= dict.fromkeys(faults[beside + 1])
    if of_both:
        raise ConfigError([f"search.over: {fault}" for fault in of_both], source)


def _dimension(key: str, given: Any, base: RunConfig) -> Dimension:
    if isinstance(given, list | tuple) and given:
        values = tuple(read_values(key, given, base))
        if again := [value for at, value in enumerate(values) if value in values[:at]]:
            raise ConfigError([f"{key}: {again[0]!r} is there twice; leave one out"])
        return Dimension(key, values)
    if not isinstance(given, Mapping) or not {"low", "high"} <= set(given) <= _RANGE_KEYS:
        raise ConfigError(
            [f"{key} is {given!r}; expected a list of values, or low and high and perhaps log, as {FORM}"]
        )
    low, high = read_values(key, [given["low"], given["high"]], base)
    is_log = given.get("log", False)
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
    if not numbers or not math.isfinite(low) or not math.isfinite(high) or low >= high:
        raise ConfigError([f"{key}: low is {low!r} and high {high!r}; expected two numbers, the lower one first"])
    if not isinstance(is_log, bool) or (is_log and low <= 0):
        raise ConfigError([f"{key}: log is {is_log!r} from {low!r} on; expected true, with low above 0, or false"])
    return Dimension(key, (low, high), is_range=True, is_log=is_log)
