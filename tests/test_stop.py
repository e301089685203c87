"""A run that is signalled stops with nothing lost: in the set-up, the first pass, a validation or a checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import metrics, tiny_flags, train

from toolkit.activation_cache import cached_prefix
from toolkit.checkpoint import saver
from toolkit.inference import evaluation
from toolkit.runtime import signals
from toolkit.runtime.distributed import World
from toolkit.training import context, validation


def signal_before(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, number: int = signal.SIGUSR1
) -> Callable[[], int]:
    """Send a signal to this process just before the given call of a function; returns what counts the calls."""
    original, calls = getattr(owner, name), 0

    def signalled(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, signalled)
    return lambda: calls


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Flags of a run with validation, and its directory."""
    run = tmp_path_factory.mktemp("whole") / "run"
    flags = ["--data.validation", "0.25", "--train.max_steps", "6", "--output.evaluate_every_steps", "3"]
    flags += ["--output.save_every_steps", "3", "--prefix.cache", "off"]
    assert train(*tiny_flags(tiny_model, run, *flags)) == 0
    return flags, run


def signals_are_default() -> bool:
    given = {number: signal.getsignal(number) for number in signals.SIGNALS}
    return given == {**dict.fromkeys(signals.SIGNALS, signal.SIG_DFL), signal.SIGINT: signal.default_int_handler}


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_in_the_set_up_stops_before_anything_is_written(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    signal_before(monkeypatch, context, "load_tokenizer_of", 1, number)
    loads = signal_before(monkeypatch, context, "load_for_training", 0)
    assert train(*tiny_flags(tiny_model, tmp_path / "run")) == 75
    assert loads() == 0
    assert not (tmp_path / "run").exists()
    assert signals_are_default()


def test_a_signal_in_the_first_pass_keeps_what_was_computed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_prefix, "CPU_FILL_TOKENS", 1)  # a batch is one row
    flags = tiny_flags(tiny_model, tmp_path / "run", "--prefix.cache_dir", tmp_path / "cache", "--train.max_steps", 21)
    with monkeypatch.context() as patch:
        signal_before(patch, cached_prefix.CachedPrefix, "_run_prefix", 4)
        assert train(*flags) == 75
    with monkeypatch.context() as patch:
        computed = signal_before(patch, cached_prefix.CachedPrefix, "_run_prefix", 0)
        assert train(*flags) == 0
        assert computed() == 20 - 4
    assert len(metrics(tmp_path / "run")) == 21


@pytest.mark.parametrize(
    ("owner", "name", "call", "after", "evaluated"),
    [
        (evaluation, "supervised_loss", 3, 3, []),
        (saver, "_files_of_rank", 1, 3, []),
        (validation, "evaluate_rows", 2, 6, [3, 6]),
    ],
    ids=["the first validation", "the first checkpoint", "the last validation"],
)
def test_a_signal_between_steps_loses_no_step_and_no_validation(
    tiny_model: Path,
    tmp_path: Path,
    whole: tuple[list[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    after: int,
    evaluated: list[int],
) -> None:
    flags, expected = whole
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_before(patch, owner, name, call)
        code = train(*tiny_flags(tiny_model, run, *flags))
    assert code == (0 if after == 6 else 75)
    assert metrics(run, "step")[-1] == after
    assert [int(step) for step, key in zip(metrics(run, "step"), evaluations(run), strict=True) if key] == evaluated
    assert train(*tiny_flags(tiny_model, run, *flags)) == 0
    for key in ("loss", "eval_loss"):
        assert metrics(run, key) == metrics(expected, key)


def evaluations(run: Path) -> list[bool]:
    return ["eval_loss" in line for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_signal_is_noted_from_the_start_and_forgotten_at_the_end() -> None:
    with signals.record_signals({}):
        assert not World().any_stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert World().any_stop_requested()
        assert signals.stop_reason() == "SIGTERM"
        with signals.record_signals({}), pytest.raises(signals.StopRequested):
            World().raise_if_stopping()
    assert signals_are_default()
    with signals.record_signals({}):
        assert not signals.stop_requested()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_when_the_run_began_stays_ignored(number: int) -> None:
    former = signal.signal(number, signal.SIG_IGN)  # as nohup does, and a script's background
    try:
        with signals.record_signals({}):
            os.kill(os.getpid(), number)
            assert not signals.stop_requested()
    finally:
        signal.signal(number, former)


def test_only_launchers_are_watched() -> None:
    parent = os.getppid()
    assert signals._launchers({}) == ()
    assert signals._launchers({"TORCHELASTIC_RUN_ID": "x"}) == (parent,)
    assert signals._launchers({"CROSS_RANK": "0"})[0] == parent
    assert len(signals._launchers({"CROSS_RANK": "0"})) == 2
