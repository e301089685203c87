"""A sweep whose trials are chosen by what earlier ones gave."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import invocation, run_here
from test_sweep import base, here  # noqa: F401

from toolkit.runtime import signals
from toolkit.runtime.errors import ConfigError, UsageError
from toolkit.sweeping import running
from toolkit.sweeping.definition import Settings, SweepDefinition, definition_of
from toolkit.sweeping.search import Search, read_search
from toolkit.sweeping.trials import Sweep, Trial, open_sweep

RATE, MASK = "train.learning_rate", "mask.train"
OVER = {RATE: {"low": "1e-5", "high": "1e-2", "log": True}, MASK: ["last:1", "lora last:2"]}
SEED = 42


def search_over(model: Path, tmp_path: Path, content: Any) -> Search:
    return read_search(content, invocation(*base(model, tmp_path / "sweep")).config, "sweep")


@pytest.fixture
def search(tiny_model: Path, tmp_path: Path) -> Search:
    return search_over(tiny_model, tmp_path, {"trials": 40, "over": OVER})


def distance(settings: Settings) -> float:
    """A loss that is lowest at a rate of 3e-4, and with adapters."""
    rate: float = settings[RATE]
    return abs(math.log10(rate / 3e-4)) + (settings[MASK] == ["last:1"])


def searched(search: Search, count: int, higher: bool = False) -> list[tuple[Settings, float | None]]:
    tried: list[tuple[Settings, float | None]] = []
    while len(tried) < count:
        settings = search.next_settings(tried, higher, SEED)
        assert settings is not None
        tried.append((settings, -distance(settings) if higher else distance(settings)))
    return tried


@pytest.mark.parametrize("higher", [False, True])
def test_later_trials_are_nearer_to_the_best_than_those_drawn_at_random(search: Search, higher: bool) -> None:
    tried = [distance(settings) for settings, _ in searched(search, 30, higher)]
    assert sum(tried[-10:]) < 0.5 * sum(tried[:10])


def test_what_earlier_trials_gave_decides_the_next_and_the_same_results_the_same_one(search: Search) -> None:
    tried = searched(search, 15)
    again = search.next_settings(tried, False, SEED)
    assert again == search.next_settings(list(tried), False, SEED)
    turned = [(settings, -float(score or 0)) for settings, score in tried]
    assert again != search.next_settings(turned, False, SEED)
    assert again != search.next_settings(tried, False, SEED + 1)
    assert search.next_settings([({MASK: ["last:1"], RATE: 7.0}, 0.1)], False, SEED) is not None, "outside of the range"


def test_settings_are_drawn_as_the_recipe_holds_them(tiny_model: Path, tmp_path: Path) -> None:
    over = {"train.epochs": {"low": 1, "high": 3}, "train.seed": [1, 2], "train.warmup_ratio": {"low": 0, "high": 0.5}}
    search = search_over(tiny_model, tmp_path, {"trials": 9, "over": over})
    drawn = [search.next_settings([({}, None)] * number, False, SEED) for number in range(20)]
    assert {settings["train.epochs"] for settings in drawn if settings} == {1, 2, 3}
    assert {settings["train.seed"] for settings in drawn if settings} == {1, 2}
    assert len({settings["train.warmup_ratio"] for settings in drawn if settings}) == 20


def test_nothing_is_tried_twice_and_a_search_ends_when_nothing_is_left(tiny_model: Path, tmp_path: Path) -> None:
    search = search_over(
        tiny_model, tmp_path, {"trials": 9, "over": {MASK: ["last:1", "last:2"], "train.seed": [1, 2]}}
    )
    tried: list[tuple[Settings, float | None]] = []
    while settings := search.next_settings(tried, False, SEED):
        assert settings not in [before for before, _ in tried]
        tried.append((settings, None if len(tried) == 1 else 1.0))
    assert len(tried) == 4


FAULTS: list[tuple[Any, str]] = [
    ([1], "expected its trials and over"),
    ({"trials": 3}, "expected its trials and over"),
    ({"trials": 0, "over": OVER}, "search.trials is 0; expected a number from 1 to 1,000"),
    ({"trials": True, "over": OVER}, "search.trials is True"),
    ({"trials": 3, "over": []}, r"search.over is \[\]; expected keys"),
    ({"trials": 3, "over": {"train.learnin_rate": [1]}}, "train.learnin_rate: unknown key.*train.learning_rate"),
    ({"trials": 3, "over": {"output.dir": ["a"]}}, "output.dir: each trial has a directory of its own"),
    ({"trials": 3, "over": {RATE: []}}, "train.learning_rate is .*; expected a list of values, or low and high"),
    ({"trials": 3, "over": {RATE: 1e-3}}, "expected a list of values, or low and high"),
    ({"trials": 3, "over": {RATE: {"low": 1e-3}}}, "expected a list of values, or low and high"),
    ({"trials": 3, "over": {RATE: {"low": 1e-3, "high": 1e-4}}}, "expected two numbers, the lower one first"),
    ({"trials": 3, "over": {RATE: {"low": 1e-5, "high": 1e-4, "log": "yes"}}}, "log is 'yes'"),
    ({"trials": 3, "over": {"train.warmup_ratio": {"low": 0.0, "high": 0.5, "log": True}}}, "with low above 0"),
    ({"trials": 3, "over": {"train.epochs": {"low": 1, "high": "many"}}}, "search.over: .*train.epochs is 'many'"),
    ({"trials": 3, "over": {"model.dtype": {"low": "bfloat16", "high": "float32"}}}, "expected two numbers"),
    ({"trials": 3, "over": {MASK: ["last:1", "last:1"]}}, r"\['last:1'\] is there twice"),
]


def test_all_faults_of_a_search_are_said_at_once(tiny_model: Path, tmp_path: Path) -> None:
    over = {"train.learnin_rate": [1], RATE: [], "train.epochs": {"low": 3, "high": 1}, MASK: ["last:1"]}
    with pytest.raises(ConfigError) as refused:
        search_over(tiny_model, tmp_path, {"trials": 0, "over": over})
    assert len(refused.value.faults) == 4


@pytest.mark.parametrize(("content", "fault"), FAULTS, ids=range(len(FAULTS)))
def test_faults_of_a_search_are_said(tiny_model: Path, tmp_path: Path, content: Any, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        search_over(tiny_model, tmp_path, content)


def test_a_search_stands_alone_and_masks_are_checked_against_the_model(tiny_model: Path, tmp_path: Path) -> None:
    content = {"trials": 3, "over": OVER}
    with pytest.raises(ConfigError, match="search stands beside grid or trials"):
        definition_of({RATE: [1e-3]}, [], "sweep", content)
    given = invocation(*base(tiny_model, tmp_path / "sweep"))
    wrong = definition_of({}, [], "sweep", {"trials": 3, "over": {**OVER, MASK: ["last:1", "last:99"]}})
    with pytest.raises(ConfigError, match="last:99"), open_sweep(given, wrong, "sweep"):
        pass
    assert not (tmp_path / "sweep").exists()
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"search": content}))
    words = [*base(tiny_model, tmp_path / "sweep"), "--sweep", tmp_path / "sweep.yaml"]
    refused = run_here("sweep.py", *words, "--slurm", "--time", "01:00:00")
    assert refused.returncode == 2
    assert "each trial waits for the results of the last; leave out --slurm" in refused.stderr
    refused = run_here("sweep.py", *words, "--table")
    assert refused.returncode == 2
    assert "no trial of the search in" in refused.stderr
    refused = run_here("sweep.py", *words, "--sweep.train.seed", "1", "2")
    assert refused.returncode == 2
    assert "search stands beside grid or trials" in refused.stderr


def test_without_optuna_it_says_what_to_install(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        UsageError, match=r'a search needs optuna: pip install optuna \(pip install -e "\.\[search\]"\)'
    ):
        search.next_settings([], False, SEED)


def trials_of(directory: Path) -> list[dict[str, Any]]:
    trials: list[dict[str, Any]] = json.loads((directory / "sweep.json").read_text())["trials"]
    return trials


def test_a_stopped_search_goes_on_and_may_be_given_more_trials(
    tiny_model: Path,
    tmp_path: Path,
    here: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The directory ends as that of a search that nothing stopped, a failed trial among them."""
    started: list[int] = []
    train = running.in_processes([], None, 1)

    def start(trial: Trial) -> int:
        started.append(trial.number)
        return 7 if trial.number == 2 else train(trial)

    def stops(trial: Trial) -> int:
        return signals.STOPPED if trial.number == 3 else start(trial)

    def command(name: str, trials: int, start: Any) -> int:
        monkeypatch.setattr(running, "in_processes", lambda *given: start)
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"search": {"trials": trials, "over": OVER}}))
        words = [*base(tiny_model, tmp_path / name), "--sweep", tmp_path / "sweep.yaml"]
        return run_here("sweep.py", *words).returncode

    assert command("stopped", 3, stops) == signals.STOPPED
    assert started == [1, 2]
    assert command("stopped", 3, start) == 1, "a trial failed"
    assert started == [1, 2, 2, 3], "a failed one is tried again, and the stopped one goes on"
    assert command("stopped", 4, start) == 1
    assert command("whole", 4, start) == 1
    both = [trials_of(tmp_path / name) for name in ("stopped", "whole")]
    assert [one["settings"] for one in both[0]] == [one["settings"] for one in both[1]]
    assert [one.get("validation") for one in both[0]] == [one.get("validation") for one in both[1]]
    assert len({json.dumps(one["settings"]) for one in both[0]}) == 4
    assert (tmp_path / "stopped" / "sweep.md").read_text().count("failed with exit code 7") == 1


def test_settings_that_do_not_go_together_count_as_trials_and_end_no_search(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Sweep, settings: Settings, *given: Any) -> Trial:
        raise ConfigError(["they do not go together"])

    monkeypatch.setattr(Sweep, "add", refuse)
    definition = definition_of({}, [], "sweep", {"trials": 3, "over": OVER})
    given = invocation(*base(tiny_model, tmp_path / "sweep"))
    with open_sweep(given, definition, "sweep") as sweep:
        assert running.run_search(sweep, given.config, lambda trial: 0, lambda: True)
        assert sweep.trials == []
        assert len(sweep.refused) == 3
    monkeypatch.undo()
    with open_sweep(given, definition, "sweep") as sweep:
        assert running.run_search(sweep, given.config, lambda trial: pytest.fail("started again"), lambda: True)


ROTATION = {"method": "frostline", "every_steps": 1, "blocks": 1}


def test_a_search_of_which_nothing_goes_together_says_why(
    tiny_model: Path,
    tmp_path: Path,
    here: None,  # noqa: F811
) -> None:
    """Adapters do not rotate; that is found for the two keys together alone."""
    over = {"mask.train": ["lora last:3", "lora last:2"], "mask.rotation": [ROTATION]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"search": {"trials": 2, "over": over}}))
    words = [*base(tiny_model, tmp_path / "sweep"), "--sweep", tmp_path / "sweep.yaml", "--mask.train", "last:3"]
    result = run_here("sweep.py", *words)
    assert result.returncode == 2
    assert "search: nothing that it chose goes together" in result.stderr


def test_trials_of_other_ranges_do_not_count(tiny_model: Path, tmp_path: Path) -> None:
    def sweep_over(low: float, high: float) -> SweepDefinition:
        over = {"train.learning_rate": {"low": low, "high": high}}
        return definition_of({}, [], "sweep", {"trials": 2, "over": over})

    given = invocation(*base(tiny_model, tmp_path / "sweep"))
    with open_sweep(given, sweep_over(1e-5, 1e-4), "sweep") as sweep:
        first = sweep.add({"train.learning_rate": 5e-5}, given.config, "search")
    with open_sweep(given, sweep_over(1e-3, 1e-2), "sweep") as sweep:
        assert sweep.trials == []
        started: list[float] = []
        assert running.run_search(
            sweep, given.config, lambda trial: started.append(trial.settings["train.learning_rate"]) or 0, lambda: True
        )
    assert len(started) == 2
    assert min(started) >= 1e-3
    with open_sweep(given, sweep_over(1e-5, 1e-2), "sweep") as sweep:
        assert [trial.number for trial in sweep.trials] == [first.number, 2, 3]


def test_a_value_that_is_valid_beside_others_alone_is_searched(tiny_model: Path, tmp_path: Path) -> None:
    """The head is tied, which the recipe's mask.tied does not allow and each of the two values does."""
    over = {"mask.train": ["last:2 head", "last:1 head"], "mask.tied": ["untie", "both"]}
    definition = definition_of({}, [], "sweep", {"trials": 2, "over": over})
    given = invocation(*base(tiny_model, tmp_path / "sweep", "--mask.tied", "error"))
    with open_sweep(given, definition, "sweep") as sweep:
        assert sweep.search is not None
    drawn = {"data.validation": [0.25, 0.5]}
    definition = definition_of({}, [], "sweep", {"trials": 2, "over": drawn})
    given = invocation(*base(tiny_model, tmp_path / "drawn", "--data.validation", "none"))
    with open_sweep(given, definition, "sweep") as sweep:
        assert sweep.search is not None
    wrong = {"mask.train": ["last:2", "last:90"], "train.epochs": [1, 0]}
    definition = definition_of({}, [], "sweep", {"trials": 2, "over": wrong})
    with pytest.raises(ConfigError, match=r"search\.over: train\.epochs is 0"), open_sweep(given, definition, "sweep"):
        pass
