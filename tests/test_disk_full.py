"""The disk refuses: training goes on where it can, ends with one clear error where it cannot, and loses no state."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
from faults import largest_file
from helpers import ENGLISH, metrics, run_here, tiny_flags, train

from toolkit import evaluate
from toolkit.data import token_cache
from toolkit.runtime.errors import CheckpointError, DiskError, UsageError
from toolkit.runtime.paths import LineFile, explain_refused_write, replace_text
from toolkit.training.tensorboard_writer import TensorBoardWriter


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_lines_wait_for_room_and_are_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = LineFile(path)
    file.write("first")
    with largest_file(10):
        file.write("second, which is cut in the middle")
        assert path.read_text() == "first\n"
        file.write("third")
        assert file.pending == ["second, which is cut in the middle", "third"]
    file.write("fourth")
    assert path.read_text().splitlines() == ["first", "second, which is cut in the middle", "third", "fourth"]


def test_lines_that_never_found_room_are_owned_up_to(tmp_path: Path, said: list[str]) -> None:
    file = LineFile(tmp_path / "metrics.jsonl")
    with largest_file(0):
        file.write("lost")
        file.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert [line for line in said if "lacks its last 1 lines" in line]


def test_a_file_that_is_replaced_keeps_its_content_when_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    replace_text(path, "old")
    refused = pytest.raises(DiskError, match=r"cannot be written \(File too large\); \d+ MiB free there")
    with largest_file(2), refused, explain_refused_write(tmp_path):
        replace_text(path, "longer than two bytes")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_a_directory_where_a_file_goes_is_named_and_the_reverse(tmp_path: Path) -> None:
    (tmp_path / "sweep.md").mkdir()
    (tmp_path / "file").touch()
    refused = pytest.raises(UsageError, match=r"/sweep\.md cannot be written: a directory is where a file goes\.")
    with refused, explain_refused_write(tmp_path):
        replace_text(tmp_path / "sweep.md", "table")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        refused = pytest.raises(UsageError, match=rf"{folder} cannot be written: a file is where a directory goes\.")
        with refused, explain_refused_write(tmp_path):
            folder.mkdir(parents=True, exist_ok=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "sweep.md"]


def test_a_run_outlives_full_metrics_and_curves_and_catches_up(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    flags = ("--train.max_steps", 8)
    assert train(*tiny_flags(tiny_model, whole, *flags)) == 0
    append = LineFile._append
    tries = iter(range(100))
    monkeypatch.setattr(LineFile, "_append", lambda *a: full() if 2 <= next(tries) < 6 else append(*a))
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    run = tmp_path / "run"
    assert train(*tiny_flags(tiny_model, run, *flags)) == 0
    assert metrics(run) == metrics(whole)
    assert (run / "checkpoints" / "latest").read_text() == "step-00000008"


def test_a_disk_that_fills_up_under_the_curves_gives_one_warning(
    tmp_path: Path, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    board = TensorBoardWriter(tmp_path, 1)
    with largest_file(2000):
        for step in range(400):
            board.scalar("loss", 1.0, step)
        board.close()
    assert len([line for line in said if "TensorBoard's file" in line]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert 0 < next(tmp_path.iterdir()).stat().st_size <= 2000


def test_curves_end_with_one_word_when_the_disk_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    calls = []
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", lambda *a: calls.append(a) or full())
    board = TensorBoardWriter(tmp_path, 1)
    for step in range(3):
        board.scalar("loss", 1.0, step)
    board.close()
    assert len(calls) == 1
    assert len([line for line in said if "training goes on without it" in line]) == 1
    monkeypatch.setattr("toolkit.training.tensorboard_writer.SummaryWriter", full)
    board = TensorBoardWriter(tmp_path, 1)
    board.scalar("loss", 1.0, 1)
    board.close()


def test_a_run_that_cannot_write_its_files_says_so_before_it_trains(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.training.run.write_config", full)
    with pytest.raises(DiskError, match=r"cannot be written \(No space left on device\); \d+ MiB free.*make room"):
        train(*tiny_flags(tiny_model, tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_directory_that_cannot_be_written_is_found_before_the_model_loads(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.training.run.prepare", lambda *_: pytest.fail("it set up"))
    monkeypatch.setattr("toolkit.training.preflight.tempfile.TemporaryFile", full)
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\).*--output.dir"):
        train(*tiny_flags(tiny_model, tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_the_mask_is_checked_before_the_model_loads(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.training.context.load_for_training", lambda *_: pytest.fail("it loaded"))
    phase = '{"train": "last:9", "until_step": 2}'
    for flags in (["--mask.train", "last:99"], ["--mask.schedule", phase], ["--mask.tied", "error"]):
        with pytest.raises(Exception, match=r"last:99|last:9|share one tensor"):
            train(*tiny_flags(tiny_model, tmp_path / "run", *flags))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_token_store_without_room_is_an_error_that_says_what_to_do(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(token_cache, "encode_all", refuse)
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    folder = token_cache.root()
    for done in (
        run_here("evaluate.py", tiny_model, "--data.path", ENGLISH),
        run_here("train.py", *tiny_flags(tiny_model, tmp_path / "run")),
    ):
        assert (done.returncode, "Traceback" in done.stderr) == (1, False)
        assert re.search(
            rf"{folder} \(\d+ MiB free\) has no room for the tokens of the rows: 4 bytes each, and about 110 a row. "
            "Free some, or set FROSTLINE_CACHE to a directory on another disk",
            done.stderr,
        )
    assert [path.suffix for path in folder.iterdir()] == [".lock"], "one store for both"
    monkeypatch.setattr(token_cache, "_lock", refuse)
    done = run_here("evaluate.py", tiny_model, "--data.path", ENGLISH)
    assert (done.returncode, "has no room" in done.stderr) == (1, True)


def test_a_cache_that_cannot_be_written_gives_way_to_a_temporary_file(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    (tmp_path / "cache").write_text("a file, no directory")
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    assert evaluate(tiny_model, ENGLISH).rows == 20
    assert [line for line in said if "cannot be used" in line and "tokenised for this process alone" in line]
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    done = run_here("evaluate.py", tiny_model, "--data.path", ENGLISH)
    assert (done.returncode, "set TMPDIR to a directory on another disk" in done.stderr) == (1, True)


def test_what_is_in_the_way_of_one_rank_is_told_by_that_rank(tmp_path: Path) -> None:
    """An error that every rank meets is printed by the first alone; a directory of this name may be on one node."""
    (tmp_path / "log").mkdir()
    with pytest.raises(UsageError) as found, explain_refused_write(tmp_path):
        replace_text(tmp_path / "log", "line")
    assert not found.value.on_every_rank
