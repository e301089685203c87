"""``import toolkit``: its public names, what importing it costs, and a model's way through them."""

from __future__ import annotations

import inspect
import json
import logging
import signal
import subprocess
import sys
import threading
import typing
from pathlib import Path
from typing import Any

import pytest
from helpers import ENGLISH, QUICKSTART, ROOT, clean_environment, metrics, run_script

import toolkit
from toolkit.runtime.errors import CheckpointError, ConfigError, DataError, FrostlineError, UsageError

VERBS = ("train", "plan", "data_check", "evaluate", "generate", "export", "sweep")

MASK = ["last:4", "head"]


def overrides(model: Path, run: Path) -> dict[str, Any]:
    return {
        "model.name_or_path": model, "model.dtype": "float32", "data.path": ENGLISH, "data.validation": 0.2,
        "train.max_steps": 2, "train.learning_rate": 1e-3, "output.dir": run, "output.sample_answers": 0,
        "mask.train": MASK,
    }  # fmt: skip


def in_new_process(code: str) -> Any:
    command = [sys.executable, "-c", f"import json, sys\n{code}"]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_public_names_are_these() -> None:
    types = ["Comparison", "FrostlineError", "PlanReport", "RunConfig", "SweepResult", "TrainResult"]
    assert toolkit.__all__ == [*types, *sorted(VERBS)]
    for name in toolkit.__all__:
        assert getattr(toolkit, name).__name__ == name
    assert set(toolkit.__all__) <= set(dir(toolkit))
    with pytest.raises(AttributeError, match="module 'toolkit' has no attribute 'trian'"):
        toolkit.trian  # type: ignore[attr-defined] # noqa: B018


def test_what_type_checkers_are_told_is_what_is_imported() -> None:
    source = (ROOT / "toolkit" / "__init__.py").read_text(encoding="utf-8")
    told = dict.fromkeys(toolkit.__all__, "")
    for line in source.split("if TYPE_CHECKING:\n")[1].split("\n\n")[0].splitlines():
        _, module, _, *names = line.replace(",", "").split()
        told |= dict.fromkeys(names, module)
    assert told == toolkit._MODULES


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_is_typed_and_described(verb: str) -> None:
    function = getattr(toolkit, verb)
    parameters = inspect.signature(function).parameters
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in parameters.values())
    for name in parameters:
        assert f"        {name}: " in function.__doc__, f"{verb} does not describe {name}"


def test_importing_the_package_loads_nothing_heavy_and_changes_no_library() -> None:
    heavy = "[name for name in ('torch', 'transformers', 'pydantic', 'yaml', 'numpy') if name in sys.modules]"
    use = f"[getattr(toolkit, verb) for verb in {VERBS}]"
    code = f"import toolkit\nloaded = {heavy}\n{use}\nprint(json.dumps([loaded, {heavy}]))"
    assert in_new_process(code) == [[], []]


@pytest.mark.slow
def test_importing_every_module_leaves_transformers_as_it_was() -> None:
    code = """
import inspect, pkgutil, importlib, transformers, transformers.masking_utils, transformers.modeling_utils
watched = [transformers.PreTrainedModel, transformers.modeling_utils, transformers.masking_utils]
def state():
    return [{name: id(value) for name, value in vars(one).items()} for one in watched]
before, attention = state(), dict(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping)
import toolkit
for module in pkgutil.walk_packages(toolkit.__path__, "toolkit."):
    importlib.import_module(module.name)
same = attention == transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping
print(json.dumps([same, [sorted(n for n in a if b.get(n) != a[n]) for a, b in zip(before, state())]]))
"""
    assert in_new_process(code) == [True, [[], [], []]]


def test_a_model_goes_from_a_recipe_to_an_export(tiny_model: Path, tmp_path: Path) -> None:
    given, run = overrides(tiny_model, tmp_path / "run"), tmp_path / "run"
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    root = (logging.getLogger().level, list(logging.getLogger().handlers))

    report = toolkit.plan(QUICKSTART, given, world_size=2, gpu_memory="24GiB")
    assert report.fit is not None
    assert report.fit.fits
    assert report.as_dict()["engine"]["ranks"] == 2
    assert "fits: " in str(report)

    result = toolkit.train(QUICKSTART, given)
    assert result == toolkit.TrainResult(run, stopped=False)
    outcome = toolkit.evaluate(run)
    assert outcome.loss == pytest.approx(metrics(run, "eval_loss")[-1], abs=1e-5)
    assert outcome.held_out
    answers = toolkit.generate(run, ["Why?", {"QUESTION": "Who?", "CONTEXTS": ["a", "b"]}], max_new_tokens=3)
    assert len(answers) == 2
    assert toolkit.generate(run, "Why?", max_new_tokens=3) == answers[:1]
    assert toolkit.export(run) == run / "export"
    assert toolkit.export(str(run), delta=True) == run / "export-delta"
    exported = toolkit.evaluate(run / "export", ENGLISH, batch_size=2)
    assert exported.loss == pytest.approx(toolkit.evaluate(run, str(ENGLISH)).loss, abs=1e-4)

    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert (logging.getLogger().level, list(logging.getLogger().handlers)) == root


def test_a_recipe_may_be_a_file_a_mapping_or_a_config(tiny_model: Path) -> None:
    nested: dict[str, Any] = {
        "model": {"name_or_path": tiny_model}, "mask": {"tied": "untie", "train": MASK},
        "data": {"path": ENGLISH, "validation": 0.1}, "train": {"learning_rate": 5e-4},
    }  # fmt: skip
    config = toolkit.RunConfig.model_validate(
        {**nested, "model": {"name_or_path": str(tiny_model)}, "data": {"path": str(ENGLISH), "validation": 0.1}}
    )
    as_file = {"model.name_or_path": tiny_model, "data.path": ENGLISH, "mask.train": MASK}
    reports = [
        toolkit.plan(nested),
        toolkit.plan(config),
        toolkit.plan(QUICKSTART, as_file),
        toolkit.plan(None, as_file),
    ]
    assert len({str(report) for report in reports}) == 1


class SignalBeforeTheFirstStep(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("writing to "):
            signal.raise_signal(signal.SIGTERM)


def test_a_signal_stops_a_run_and_the_same_call_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    given, log = overrides(tiny_model, tmp_path / "run"), logging.getLogger("frostline")
    log.addHandler(SignalBeforeTheFirstStep())
    assert toolkit.train(QUICKSTART, given).stopped
    log.handlers = []
    assert len(metrics(tmp_path / "run")) == 1
    assert not toolkit.train(QUICKSTART, given).stopped
    assert len(metrics(tmp_path / "run")) == 2


@pytest.mark.slow
def test_one_process_trains_with_deepspeed_again_and_again(tiny_model: Path, tmp_path: Path) -> None:
    given = overrides(tiny_model, tmp_path)
    given |= {key: str(given[key]) for key in ("model.name_or_path", "data.path", "output.dir")}
    code = f"""
import os, toolkit
names, found = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), []
for ds in ("ds_configs/zero2.json", "ds_configs/zero2.json", None):
    given = {given!r} | {{"output.dir": {str(tmp_path)!r} + f"/run-{{len(found)}}"}}
    run = toolkit.train("recipes/quickstart.yaml", given, ds=ds).run
    found.append([str(run), *(name for name in names if name in os.environ)])
print(json.dumps(found))
"""
    assert in_new_process(code) == [[f"{tmp_path}/run-{number}"] for number in range(3)]
    first, again, local = (metrics(tmp_path / f"run-{number}") for number in range(3))
    assert again == first
    assert local == pytest.approx(first, rel=1e-5)


FAULTS: dict[str, tuple[typing.Callable[[Path], object], type[FrostlineError], str]] = {
    "unknown key": (lambda tmp: toolkit.train(None, {"train.lr": 1}), ConfigError, "did you mean train.learning_rate"),
    "no section": (lambda tmp: toolkit.train(None, {"epochs": 1}), ConfigError, "epochs: expected section.key"),
    "bad value": (lambda tmp: toolkit.plan({"train": {"epochs": 0}}), ConfigError, "train.epochs is 0"),
    "no such file": (lambda tmp: toolkit.plan(tmp / "x.yaml"), ConfigError, "no such file"),
    "no such run": (lambda tmp: toolkit.evaluate(tmp / "run"), UsageError, "not an existing directory"),
    "nothing to export": (lambda tmp: toolkit.export(tmp / "run"), CheckpointError, "is not a run directory"),
    "rounded delta": (
        lambda tmp: toolkit.export(tmp, delta=True, rounding="nearest"), UsageError, "rounding goes with a whole model"
    ),
    "moved base of a delta": (lambda tmp: toolkit.export(tmp, delta=True, base=tmp), UsageError, "--base and --trust-"),
    "code for a delta": (
        lambda tmp: toolkit.export(tmp, delta=True, trust_remote_code=True), UsageError, "written without the base"
    ),
    "bad question": (lambda tmp: toolkit.generate("x", ["Why?", ""]), DataError, "question 2 is empty; expected text"),
    "bad memory": (lambda tmp: toolkit.plan(gpu_memory="plenty"), ConfigError, "expected a size such as 24GiB"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_at_fault_is_raised_and_ends_no_process(fault: str, tmp_path: Path) -> None:
    call, error, message = FAULTS[fault]
    with pytest.raises(error, match=message):
        call(tmp_path)


def test_training_outside_the_main_thread_is_refused() -> None:
    raised: list[BaseException] = []

    def call() -> None:
        try:
            toolkit.train()
        except UsageError as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "only the main thread can" in str(raised[0])


def test_the_example_trains_evaluates_and_exports(tiny_model: Path, tmp_path: Path) -> None:
    given = overrides(tiny_model, tmp_path / "run") | {"mask.train": "last:2"}
    settings = [f"{key}={value}" for key, value in given.items()]
    done = run_script("examples/api.py", *settings, environ={"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "validation loss" in done.stdout
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
