"""What wandb and MLflow are given, what they are not, and that a run does not depend on them.

Both are large to install, so that most tests have a wandb of a few lines. Those of the libraries themselves run where
the extras are: pip install -c constraints.txt -e ".[wandb,mlflow]"
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_wandb
import pytest
import stub_wandb
from helpers import ENGLISH, ROOT, invocation, metrics, run_script, tiny_flags, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from toolkit.config.recipe import build_config
from toolkit.runtime.errors import ConfigError, UsageError
from toolkit.training import open_trackers, trackers
from toolkit.training import run as run_module
from toolkit.training.monitor import Monitor
from toolkit.training.preflight import preflight

NEEDS_WANDB = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason='needs wandb: pip install -c constraints.txt -e ".[wandb]"'
)
NEEDS_MLFLOW = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("mlflow", "sqlalchemy", "alembic"))),
    reason='needs mlflow: pip install -c constraints.txt -e ".[mlflow]"',
)
OF_ITS_OWN = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
"""MLflow and SQLAlchemy warn of each other, and leave connections to the garbage collection."""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Any]]:
    """What a wandb that is not the library was called with, by the name of the function."""
    path = fake_wandb.install(tmp_path, monkeypatch)
    return lambda name: [given for called, given in fake_wandb.calls(path) if called == name]


def flags(model: Path, folder: Path, *report_to: str) -> list[str]:
    """19 steps of 15 rows with 5 validations; a checkpoint every 4 steps."""
    return tiny_flags(
        model, folder / "run", "--data.validation", "0.25", "--train.max_steps", 19, "--output.save_every_steps", 4,
        "--output.evaluate_every_steps", 6, "--prefix.cache_dir", folder / "cache", "--output.report_to", *report_to,
    )  # fmt: skip


def failing_at(patch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Let ``act`` happen once a validation of a step is logged."""
    original = Monitor.evaluation

    def evaluation(self: Monitor, at: int, *values: Any) -> None:
        original(self, at, *values)
        if at == step:
            act()

    patch.setattr(Monitor, "evaluation", evaluation)


def kill() -> None:
    raise RuntimeError("killed")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("wandb", ["wandb"]), ("none", []), (["none"], []), (None, []), ([], []),
        (["mlflow", "tensorboard"], ["mlflow", "tensorboard"]),
    ],
)  # fmt: skip
def test_one_name_a_list_or_none(given: Any, expected: list[str]) -> None:
    assert build_config({"output": {"report_to": given}}, "test").output.report_to == expected


def test_flags_say_the_same_and_tensorboard_is_the_default(tmp_path: Path) -> None:
    def of(*given: str) -> list[str]:
        return list(invocation("--output.sample_answers", "0", *given).config.output.report_to)

    assert of() == ["tensorboard"]
    assert of("--output.report_to", "none") == []
    assert of("--output.report_to", "tensorboard", "wandb") == ["tensorboard", "wandb"]
    assert of("--output.report_to", "[mlflow, wandb]") == ["mlflow", "wandb"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"report_to": "all"}, "report_to.* is 'all'; expected 'tensorboard', 'wandb' or 'mlflow'"),
        ({"report_to": ["wandb", "wandb"]}, "'wandb' is there twice"),
        ({"report_to": "wandb", "sample_answers": 2}, "sample_answers is 2, but report_to leaves out tensorboard"),
    ],
)
def test_what_is_unknown_twice_or_without_effect_is_refused(output: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config({"output": output}, "test")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_an_extra_that_is_missing_ends_the_run_before_anything_is_loaded(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(open_trackers, "_is_installed", lambda module: module != name)
    monkeypatch.setattr(run_module, "prepare", lambda *_: pytest.fail("it was loaded"))
    given = flags(tiny_model, tmp_path, name)
    for start in (lambda: train(*given), lambda: preflight(invocation(*given), 1)):
        with pytest.raises(UsageError, match=rf'run `pip install -c constraints.txt -e "\.\[{name}\]"`') as caught:
            start()
        assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_a_directory_that_wandb_made_for_its_files_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "xwandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not open_trackers._is_installed("xwandb")
    assert open_trackers._is_installed("json")


def test_wandb_gets_tensorboards_numbers_the_recipe_and_nothing_else(
    tiny_model: Path, tmp_path: Path, calls: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "a-long-secret")
    given = [*flags(tiny_model, tmp_path, "tensorboard", "wandb"), "--output.sample_answers", "2"]
    parsed = invocation(*given)
    secret = parsed.config.model_copy(update={"data": parsed.config.data.model_copy(update={"name": "a-long-secret"})})
    assert open_trackers.redacted(secret)["data"]["name"] == "***"

    hooks = sys.exit, sys.excepthook
    assert train(*given) == 0
    assert (sys.exit, sys.excepthook) == hooks

    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    shown = {(tag, e.step): e.value for tag in board.Tags()["scalars"] for e in board.Scalars(tag)}
    sent = {(tag, row["step"]): v for row in calls("log") for tag, v in row.items() if tag != "step"}
    assert sent == {key: pytest.approx(value, rel=1e-6) for key, value in shown.items()}
    assert len(calls("log")) == 19 + 5 + 2, "steps, validations and epochs, each once"

    (begun,) = calls("init")
    assert (begun["name"], begun["project"], begun["dir"]) == ("run", "frostline", str(tmp_path / "run"))
    assert begun["config"] == json.loads(json.dumps(open_trackers.redacted(parsed.config)))
    off = {"console": "off", "disable_git": True, "disable_code": True, "x_disable_meta": True,
           "x_disable_machine_info": True, "x_disable_stats": True, "x_save_requirements": False}  # fmt: skip
    assert off.items() <= begun["settings"].items()
    assert calls("finish") == [0]
    assert not holds_rows((tmp_path / "calls.jsonl").read_bytes())


def holds_rows(content: bytes) -> bool:
    """Whether any of the rows' longer texts is there, as UTF-8 or as JSON writes it."""
    rows = [json.loads(line) for line in ENGLISH.read_text(encoding="utf-8").splitlines()]
    texts = [text[:40] for row in rows for text in (row["QUESTION"], row["LONG_ANSWER"], *row["CONTEXTS"])]
    assert len(texts) > 40
    return any(text.encode() in content or json.dumps(text)[1:-1].encode() in content for text in texts)


def test_a_failed_run_goes_on_in_the_same_run_and_no_step_is_sent_twice(
    tiny_model: Path, tmp_path: Path, calls: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = flags(tiny_model, tmp_path, "wandb")
    with monkeypatch.context() as patch:
        failing_at(patch, 18, kill)
        with pytest.raises(RuntimeError, match="killed"):
            train(*given)
    assert calls("finish") == [1]
    assert train(*given) == 0
    assert calls("finish") == [1, 0]
    first, second = calls("init")
    kept = json.loads((tmp_path / "run" / "trackers.json").read_text())
    assert (first["id"], first["resume"]) == (None, None)
    assert (second["id"], second["resume"]) == (kept["wandb"], "allow")
    assert [row["step"] for row in calls("log") if "train/loss" in row] == list(range(1, 20))
    assert [row["step"] for row in calls("log") if "eval/loss" in row] == [6, 12, 15, 18, 19]
    assert [row["train/loss"] for row in calls("log") if "train/loss" in row] == metrics(tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists(), "report_to leaves it out"


def test_a_stopped_run_is_marked_so_and_its_late_validation_arrives(
    tiny_model: Path, tmp_path: Path, calls: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = flags(tiny_model, tmp_path, "wandb")
    step = Monitor.step

    def stop_at_15(self: Monitor, row: Any) -> None:
        step(self, row)
        if row.step == 15:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "step", stop_at_15)
        assert train(*given) == 75
    assert (len(calls("mark_preempting")), calls("finish")) == (1, [75])
    assert [row["step"] for row in calls("log") if "eval/loss" in row] == [6, 12], "the epoch's validation is due"
    assert train(*given) == 0
    assert [row["step"] for row in calls("log") if "eval/loss" in row] == [6, 12, 15, 18, 19]
    assert [row["step"] for row in calls("log") if "train/loss" in row] == list(range(1, 20))


def test_a_run_without_a_checkpoint_begins_anew(
    tiny_model: Path, tmp_path: Path, calls: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*flags(tiny_model, tmp_path, "wandb"), "--output.save_every_steps", "100"]
    with monkeypatch.context() as patch:
        failing_at(patch, 6, kill)
        with pytest.raises(RuntimeError, match="killed"):
            train(*given)
    assert train(*given) == 0
    assert [begun["id"] for begun in calls("init")] == [None, None]
    assert [row["step"] for row in calls("log") if "train/loss" in row] == [*range(1, 7), *range(1, 20)]


def test_a_tracker_that_is_named_later_gets_every_step_from_there(
    tiny_model: Path, tmp_path: Path, calls: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing_at(patch, 18, kill)
        with pytest.raises(RuntimeError, match="killed"):
            train(*flags(tiny_model, tmp_path, "none"))
    assert calls("init") == []
    assert train(*flags(tiny_model, tmp_path, "wandb")) == 0
    assert [row["step"] for row in calls("log") if "train/loss" in row] == [17, 18, 19]


def test_a_tracker_that_fails_ends_no_run(
    tiny_model: Path,
    tmp_path: Path,
    calls: Callable[[str], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
) -> None:
    monkeypatch.setenv("FAKE_WANDB_FAILS_AT", "7")
    assert train(*flags(tiny_model, tmp_path, "wandb")) == 0
    assert metrics(tmp_path / "run", "step")[-1] == 19
    assert max(row["step"] for row in calls("log")) == 6
    warned = [line for line in said if line.startswith("wandb") and "the server is gone, token ***" in line]
    assert "can no longer be written" in warned[0]
    assert len(warned) == 2
    assert "training goes on without it" in warned[0]
    assert warned[1].startswith("wandb lacks what followed step 6")
    assert calls("finish") == [0]


def test_a_tracker_that_does_not_answer_is_waited_for_only_so_long(
    monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    from threading import Event

    class Hangs:
        run_id, place, answered = "1", "nowhere", Event()

        def send(self, points: Any) -> None:
            self.answered.wait()

        def finish(self, outcome: str) -> None:
            pass

    monkeypatch.setattr(trackers, "_CLOSE_SECONDS", 0)
    with trackers.Trackers() as several:
        several.add("wandb", Hangs(), frozenset())
        several.scalars(1, {"train/loss": 1.0, "train/grad_norm": float("nan")})
    Hangs.answered.set()
    assert any("wandb has nothing of this start (it has not answered for 0 s)" in line for line in said)


def test_a_tracker_that_cannot_be_begun_is_bad_usage(
    tiny_model: Path, tmp_path: Path, calls: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "prepare", lambda *_: pytest.fail("it was loaded"))
    with monkeypatch.context() as patch:
        patch.setenv("FAKE_WANDB_REFUSES", "yes")
        with pytest.raises(UsageError, match=r"wandb cannot be begun \(no such project\)"):
            train(*flags(tiny_model, tmp_path, "wandb"))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UsageError, match="which has no key; run `wandb login`"):
        train(*flags(tiny_model, tmp_path, "wandb"))
    assert calls("init") == []


def test_ids_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert open_trackers._read_ids(tmp_path) == {}
    (tmp_path / "trackers.json").write_text('{"wandb": 3}')
    with pytest.raises(UsageError, match=r"trackers\.json cannot be read .* remove it"):
        open_trackers._read_ids(tmp_path)


@pytest.mark.distributed
def test_of_several_ranks_the_first_alone_writes(
    tiny_model: Path, tmp_path: Path, calls: Callable[[str], list[Any]]
) -> None:
    result = run_script(
        "launch/train.py", *flags(tiny_model, tmp_path, "wandb"), launcher=("torchrun", "--nproc_per_node", "2")
    )
    assert result.returncode == 0, result.stderr
    assert (len(calls("init")), calls("finish")) == (1, [0])
    assert [row["step"] for row in calls("log") if "train/loss" in row] == list(range(1, 20))


def records(path: Path) -> Iterator[Any]:
    """The records of wandb's offline file: a header of 7 bytes, then LevelDB's log format with protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part, at = part + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            yield record
            part = b""


@NEEDS_WANDB
def test_wandb_itself_keeps_the_numbers_and_neither_rows_nor_anything_of_the_machine(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    given, run = flags(tiny_model, tmp_path, "wandb"), tmp_path / "run"
    hooks = sys.exit, sys.excepthook, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        failing_at(patch, 18, kill)
        with pytest.raises(RuntimeError, match="killed"):
            train(*given)
    assert train(*given) == 0
    assert (sys.exit, sys.excepthook, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == hooks

    import wandb

    wandb.teardown()  # waits for wandb's own process, which closes the file
    run_id = json.loads((run / "trackers.json").read_text())["wandb"]
    files = sorted((run / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert len(files) == 2, "one of each start, of the same run"
    found = [record for file in files for record in records(file)]
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 20))
    assert [row["train/loss"] for row in rows if "train/loss" in row] == metrics(run)
    assert [row["eval/loss"] for row in rows if "eval/loss" in row] == metrics(run, "eval_loss")
    exits = [record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"]
    assert exits == [1, 0]
    kinds = {record.WhichOneof("record_type") for record in found}
    assert not kinds & {"output", "output_raw", "stats", "environment", "files"}
    (about,) = {record.run.display_name for record in found if record.WhichOneof("record_type") == "run"}
    assert about == "run"
    content = b"".join(file.read_bytes() for file in files)
    assert not holds_rows(content)
    for text in (socket.gethostname(), sys.executable, sys.argv[0]):
        assert len(text) < 4 or text.encode() not in content
    assert [path for folder in files for path in (folder.parent / "files").iterdir()] == []


@NEEDS_WANDB
def test_on_the_wire_wandb_sends_the_numbers_and_nothing_of_the_machine(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    with stub_wandb.serve() as (address, received):
        result = run_script(
            "launch/train.py", *flags(tiny_model, tmp_path, "wandb"),
            environ={"WANDB_MODE": "online", "WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40},
        )  # fmt: skip
    assert result.returncode == 0, result.stderr
    streams = [json.loads(text.split("\n\n", 1)[1]) for path, text in received if path.endswith("file_stream")]
    files = [stream["files"].get("wandb-history.jsonl", {"content": []}) for stream in streams if "files" in stream]
    rows = [json.loads(line) for file in files for line in file["content"]]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == metrics(tmp_path / "run")
    assert [row["eval/loss"] for row in rows if "eval/loss" in row] == metrics(tmp_path / "run", "eval_loss")
    assert [(s["complete"], s["exitcode"]) for s in streams if "complete" in s] == [(True, 0)]
    sent = "\n".join(text for _, text in received)
    assert not holds_rows(sent.encode())
    for text in (socket.gethostname(), "train.py", sys.executable, sys.prefix, "psutil"):
        assert len(text) < 4 or text not in sent, text
    assert {path.rpartition("/")[2] for path, _ in received} == {"graphql", "file_stream"}


KILLS_WANDB = """
import logging, sys
import psutil
from test_trackers import failing_at, pytest, train

def kill_service():
    for process in psutil.Process().children(recursive=True):
        if "wandb-core" in process.name():
            process.kill()
            process.wait()
            logging.warning("killed wandb-core")

logging.basicConfig()
failing_at(pytest.MonkeyPatch(), 6, kill_service)
sys.exit(train(*sys.argv[1:]))
"""


@NEEDS_WANDB
def test_a_run_goes_on_where_wandbs_own_process_is_killed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # which wandb sets once it has started its process
    result = subprocess.run(
        [sys.executable, "-c", KILLS_WANDB, *flags(tiny_model, tmp_path, "wandb")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("killed wandb-core") == 1
    assert result.stderr.count("wandb can no longer be written") == 1
    assert "wandb lacks what followed step" in result.stderr
    assert metrics(tmp_path / "run", "step")[-1] == 19


@NEEDS_MLFLOW
@OF_ITS_OWN
def test_mlflow_itself_has_the_numbers_of_the_run_that_went_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    given, run = flags(tiny_model, tmp_path, "mlflow"), tmp_path / "run"
    with monkeypatch.context() as patch:
        failing_at(patch, 18, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(*given) == 75

    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow.db'}")
    run_id = json.loads((run / "trackers.json").read_text())["mlflow"]
    assert client.get_run(run_id).info.status == "KILLED"
    changed = [*given, "--train.learning_rate", "2e-3"]
    parsed = invocation(*changed, "--resume-override")
    assert run_module.run(parsed) == 0

    of_run = client.get_run(run_id)
    assert of_run.info.status == "FINISHED"
    assert client.get_experiment(of_run.info.experiment_id).name == "frostline"
    assert len(client.search_runs([of_run.info.experiment_id])) == 1

    def history(curve: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in client.get_metric_history(run_id, curve)]

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, validations = ([row for row in rows if key in row] for key in ("loss", "eval_loss"))
    for key in ("loss", "grad_norm", "learning_rate", "tokens_per_second"):
        assert history(f"train/{key}") == [(row["step"], row[key]) for row in steps]
    assert history("eval/loss") == [(row["step"], row["eval_loss"]) for row in validations]
    assert [step for step, _ in history("train/epoch_loss")] == [15, 19]

    assert of_run.data.params["train.learning_rate"] == "0.001"
    assert of_run.data.params["mask.train"] == '["last:4", "head"]'
    assert of_run.data.tags["train.learning_rate"] == "0.002", "parameters cannot change"
    assert set(of_run.data.tags) == {"mlflow.runName", "train.learning_rate"}
    assert not holds_rows((run / "mlflow.db").read_bytes())


@NEEDS_MLFLOW
@OF_ITS_OWN
def test_mlflows_own_variables_hold_and_a_server_that_is_not_there_is_bad_usage(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"sqlite:///{tmp_path / 'all.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "wards")
    with monkeypatch.context() as patch:
        failing_at(patch, 6, kill)
        with pytest.raises(RuntimeError, match="killed"):
            train(*flags(tiny_model, tmp_path, "mlflow"))

    import mlflow

    client = mlflow.MlflowClient(tracking_uri=place)
    (of_run,) = client.search_runs([client.get_experiment_by_name("wards").experiment_id])
    assert (of_run.info.run_name, of_run.info.status) == ("run", "FAILED")
    assert not (tmp_path / "run" / "mlflow.db").exists()

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    with pytest.raises(UsageError, match=rf"was written to MLflow's run {of_run.info.run_id}, which .*other\.db"):
        train(*flags(tiny_model, tmp_path, "mlflow"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UsageError, match=r"mlflow cannot be begun .*127\.0\.0\.1"):
        train(*flags(tiny_model, tmp_path / "anew", "mlflow"))
