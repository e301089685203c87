"""metrics.jsonl is a log: whatever a line holds, a run goes on, keeps the bytes and counts what it cannot read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers import metrics, run_here, tiny_flags, train

from toolkit.checkpoint.early_stopping import logged_scores
from toolkit.checkpoint.metrics_log import read_log, read_rows, row_of, rows_of
from toolkit.checkpoint.saver import Saver
from toolkit.report.facts import read_curves
from toolkit.runtime.errors import UsageError
from toolkit.runtime.paths import LineFile
from toolkit.training.monitor import Monitor
from toolkit.training.open_trackers import _logged_after

SHORT = ("--train.max_steps", 2, "--mask.train", "norm", "--output.save_every_steps", 1, "--data.validation", "0.25")
ROWS = [{"step": 1, "loss": 2.0, "learning_rate": 0.1}, {"step": 1, "eval_loss": 3.0}, {"step": 2, "loss": 1.5}]
ODD = {
    "nul": b"\0" * 300 + b"\n",
    "blank": b"\n  \n\r\n",
    "note": b'{"note": "restarted after power cut"}\n',
    "latin": b'{"step": 1, "note": "caf\xe9"}\n',
    "no object": b"null\n[1]\n3\n",
    "no number": b'{"step": "1", "loss": 1}\n{"step": true}\n{"step": 1, "eval_loss": "low"}\n',
    "too large": b'{"step": 1, "eval_loss": 1' + b"0" * 400 + b"}\n",
    "deep": b"[" * 60_000 + b"\n",
    "lines in a line": '{"step": 1, "note": "a\u2028b\x85c"}\n'.encode(),
    "torn": b'{"step": 2, "lo',
    "no end": b"restarted",
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_every_reader_takes_the_rows_and_leaves_the_rest(tmp_path: Path, odd: bytes, place: int) -> None:
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    lines.insert(place, odd if odd.endswith(b"\n") or place == 3 else odd + b"\n")
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(lines))
    with_note = odd == ODD["lines in a line"]
    assert [row for row in read_rows(path) if "note" not in row] == ROWS
    assert logged_scores(read_rows(path), 1)[1].loss == 3.0
    curves = read_curves(path)
    assert (curves.steps, curves.losses) == ((1,), (2.0,))
    assert _logged_after(1, tmp_path) == {("train", 2)}
    with Monitor(tmp_path, True, 2, first_step=1, report_to=()) as monitor:
        assert monitor.logged_scores(2, "loss", False)[1].loss == 3.0
    left = path.read_bytes()
    assert [row for row in read_rows(path) if "note" not in row] == ROWS[:2]
    assert with_note or place == 3 or odd.rstrip(b"\n") in left
    assert (odd in left) is (odd != ODD["torn"]) or not odd.endswith(b"\n")


def test_what_is_no_row_is_counted(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(ODD["nul"] + ODD["blank"] + ODD["note"] + ODD["latin"] + b'{"step": 1}\n')
    assert sum(line.is_unreadable for line in read_log(tmp_path / "metrics.jsonl")) == 3
    Monitor(tmp_path, True, 2, first_step=1, report_to=())
    assert [line for line in said if "3 lines are no rows of a run; they are kept" in line]
    assert row_of(b'{"step": 1}') == {"step": 1}
    assert rows_of(read_log(tmp_path / "missing.jsonl")) == []


def test_a_run_with_an_odd_log_resumes_validates_and_reports(tiny_model: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    flags = ("--train.early_stopping_patience", 5)
    assert train(*tiny_flags(tiny_model, whole, *SHORT, *flags, "--train.max_steps", 3)) == 0
    assert train(*tiny_flags(tiny_model, run, *SHORT, *flags)) == 0
    odd = b"".join(part for name, part in ODD.items() if name not in ("torn", "no end"))
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(odd)
    more = ("--train.max_steps", 3, "--resume-override")
    assert train(*tiny_flags(tiny_model, run, *SHORT, *flags, *more)) == 0
    assert odd in (run / "metrics.jsonl").read_bytes()
    rows, expected = read_rows(run / "metrics.jsonl"), read_rows(whole / "metrics.jsonl")
    assert [row["loss"] for row in rows if "learning_rate" in row] == [
        row["loss"] for row in expected if "learning_rate" in row
    ]
    ended = run_here("report.py", run, "--no-evaluation", "--language", "en")
    assert ended.returncode == 0, ended.stderr


def test_the_log_is_synced_before_a_checkpoint_is_committed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, save = os.fsync, Saver.save

    def synced(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "metrics.jsonl":
            order.append(f"{len(metrics(tmp_path / 'run'))} rows")
        fsync(descriptor)

    def saved(self: Saver, content: object, *more: object) -> None:
        order.append("commit")
        save(self, content, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Saver, "save", saved)
    assert train(*tiny_flags(tiny_model, tmp_path / "run", *SHORT[:-2])) == 0
    assert order == ["1 rows", "commit", "2 rows", "commit"]


def test_of_a_failing_disk_the_first_error_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.runtime import paths
    from toolkit.runtime.errors import DiskError

    def fails(number: int, what: str) -> object:
        def call(*_: object, **__: object) -> object:
            raise OSError(number, what)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fails(5, "the first"))
        patch.setattr(Path, "unlink", fails(30, "the second"))
        patch.setattr(shutil, "disk_usage", fails(30, "the third"))
        with pytest.raises(DiskError, match="the first"), paths.explain_refused_write(tmp_path):
            paths.replace_text(tmp_path / "file", "text")
    file = LineFile(tmp_path / "log")
    with monkeypatch.context() as patch:
        patch.setattr(LineFile, "_append", fails(5, "the first"))
        file.write("a line")
    file.sync()
    assert (tmp_path / "log").read_text() == "a line\n"


@pytest.mark.parametrize("kind", ["fifo", "directory", "link to a directory"])
def test_what_is_no_file_in_the_place_of_the_log_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    log, other = tmp_path / "metrics.jsonl", tmp_path / "other"
    other.mkdir()
    {"fifo": lambda: os.mkfifo(log), "directory": log.mkdir,
     "link to a directory": lambda: log.symlink_to(other)}[kind]()  # fmt: skip
    held = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(UsageError, match=r"metrics.jsonl is no log of a run \(.*\); expected a regular file"):
        read_rows(log)
    assert len(list(Path("/proc/self/fd").iterdir())) == held


def test_a_run_with_a_directory_in_the_place_of_its_log_ends_with_one_message(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(*tiny_flags(tiny_model, run, *SHORT)) == 0
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(tiny_model)
    again = run_here("train.py", *tiny_flags(tiny_model, run, *SHORT, "--train.max_steps", 3), "--resume-override")
    assert (again.returncode, again.stderr.count("Traceback")) == (2, 0), again.stderr
    assert "is no log of a run" in again.stderr
