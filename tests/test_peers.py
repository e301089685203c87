"""A rank that goes takes the others along at once, with its error and its exit code, and a stop reaches all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, clean_environment

LIMIT = 30
"""Seconds after which a rank counts as hanging; a rank that waits for others waits 60."""


def run_ranks(folder: Path, *deeds: str) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each of several ranks, which do what ``deeds`` say."""
    command = [sys.executable, str(ROOT / "tests" / "peer_worker.py")]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(len(deeds)), str(folder), deed],
            env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, deed in enumerate(deeds)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=LIMIT) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [(process.returncode, *both) for process, both in zip(ranks, told, strict=True)]


@pytest.mark.parametrize("which", [0, 2])
def test_a_failing_rank_prints_its_error_and_the_others_one_line_each(tmp_path: Path, which: int) -> None:
    deeds = ["wait"] * 3
    deeds[which] = "fail"
    for rank, (code, _, told) in enumerate(run_ranks(tmp_path, *deeds)):
        assert code == 1
        if rank == which:
            assert "Traceback" in told
            assert told.endswith("ValueError: the true error\n")
        else:
            assert told == f"[rank {rank}] stopped, because rank {which} failed: ValueError: the true error\n"


@pytest.mark.parametrize("which", [0, 2])
def test_a_killed_rank_is_noticed_without_a_word_from_it(tmp_path: Path, which: int) -> None:
    deeds = ["wait"] * 3
    deeds[which] = "kill"
    for rank, (code, _, told) in enumerate(run_ranks(tmp_path, *deeds)):
        assert code == (-9 if rank == which else 1)
        if rank != which:
            assert told.startswith(f"[rank {rank}] stopped, because rank {which} (")
            assert told.count("\n") == 1
            assert "ended without a last word: it was killed or crashed" in told


def test_all_take_over_the_exit_code_of_bad_usage(tmp_path: Path) -> None:
    told = run_ranks(tmp_path, "wait", "usage")
    assert [code for code, _, _ in told] == [2, 2]
    assert told[1][2] == "error [rank 1]: row 7 is bad\n"
    assert told[0][2] == "[rank 0] stopped, because rank 1 failed: DataError: row 7 is bad\n"


def test_bad_usage_that_all_ranks_find_is_printed_once(tmp_path: Path) -> None:
    """A rank that hears of it before it finds it itself says, as ever, why it goes."""
    told = run_ranks(tmp_path, "usage", "usage", "usage")
    assert [code for code, _, _ in told] == [2, 2, 2]
    (_, _, first), *others = told
    assert first == "error: row 7 is bad\n"
    for rank, (_, _, errors) in enumerate(others, 1):
        assert errors in ("", f"[rank {rank}] stopped, because rank 0 failed: DataError: row 7 is bad\n")


def test_ranks_that_part_in_turn_are_no_news(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, "done", "done", "done") == [(0, "", "")] * 3


@pytest.mark.parametrize("which", [0, 1])
def test_a_signal_to_one_rank_is_heard_by_all(tmp_path: Path, which: int) -> None:
    deeds = ["until asked"] * 3
    deeds[which] = "signal"
    told = run_ranks(tmp_path, *deeds)
    assert [code for code, _, _ in told] == [0, 0, 0]
    heard = {output for rank, (_, output, _) in enumerate(told) if rank != which}
    assert (told[which][1], heard) == ("SIGUSR1\n", {f"SIGUSR1 (rank {which})\n"})
