"""What a log says of the progress of work, and what a terminal shows."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import runpy
import struct
import sys
import termios
from itertools import pairwise
from pathlib import Path

import pytest
from helpers import ROOT, clean_environment, run_script, tiny_flags, train

from toolkit.runtime.progress_bar import ProgressBar

BAR = re.compile(r"[\r█▏▎▍▌▋▊▉]|\d%\|")


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(said: list[str], seconds_each: float, total: int, brief: bool, first: int = 0) -> list[str]:
    said.clear()
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toolkit.runtime.progress_bar.monotonic", clock)
        with ProgressBar("work", total, "row", first, brief) as bar:
            for _ in range(first, total):
                clock.now += seconds_each
                bar.advance(loss="1.5")
    return said


def test_a_log_has_a_line_with_each_tenth_of_long_work(said: list[str]) -> None:
    assert lines_of(said, 0.001, 2000, brief=False)[0] == "work: 200 of 2,000 rows, about 2 s left, loss 1.5"
    assert len(said) == 10
    assert said[-1] == "work: 2,000 of 2,000 rows, loss 1.5"
    assert len(lines_of(said, 0.001, 4, brief=False)) == 4
    assert lines_of(said, 30.0, 20, brief=False, first=10)[0].startswith("work: 12 of 20 rows, about 4 min left")


def test_a_log_is_not_silent_for_long(said: list[str]) -> None:
    assert lines_of(said, 1.0, 10_000, brief=False)[0] == "work: 60 of 10,000 rows, about 2.8 h left, loss 1.5"
    rows = [int(line.split()[1].replace(",", "")) for line in said]
    assert max(after - before for before, after in pairwise(rows)) <= 600
    assert len(rows) < 60


def test_work_that_takes_a_moment_has_no_lines_and_long_work_of_its_kind_has(said: list[str]) -> None:
    assert lines_of(said, 0.001, 2000, brief=True) == []
    assert len(lines_of(said, 20.0, 4, brief=True)) == 3  # 83 s of sample answers


def test_other_ranks_say_nothing(said: list[str]) -> None:
    import logging

    logging.getLogger("frostline").setLevel(logging.ERROR)  # as toolkit.commands.cli has it there
    assert lines_of(said, 60.0, 20, brief=False) == []


def test_all_that_takes_long_is_followed(
    tiny_model: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.runtime.progress_bar._BRIEF_SILENT_SECONDS", 0.0)
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "tokens"))
    flags = ("--train.epochs", 2, "--data.validation", "0.1", "--output.sample_answers", 2, "--output.sample_tokens", 2)
    train(*tiny_flags(tiny_model, tmp_path / "run", *flags, "--prefix.cache_dir", tmp_path / "cache"))
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text('{"QUESTION": "Why?", "CONTEXTS": []}\n' * 2)
    arguments = ["--input", questions, "--output", answers, "--max-new-tokens", 2, "--batch-size", 1]
    monkeypatch.setattr("sys.argv", ["generate.py", *map(str, (tiny_model, *arguments))])
    assert runpy.run_path(str(ROOT / "launch" / "generate.py"))["main"]() == 0
    for begins in ("tokenising: 20 rows", "first pass: ", "evaluating: 1 of 2 rows",
                   "sample answers: 1 of 2 answers", "answering: 1 of 2 questions"):  # fmt: skip
        assert any(line.startswith(begins) for line in said), begins


def test_a_run_whose_log_goes_into_a_file_says_how_far_it_is(tiny_model: Path, tmp_path: Path, said: list[str]) -> None:
    flags = (
        "--train.max_steps",
        4,
        "--data.validation",
        "0.1",
        "--output.sample_answers",
        1,
        "--output.sample_tokens",
        2,
    )
    assert train(*tiny_flags(tiny_model, tmp_path / "run", *flags)) == 0
    steps = [line for line in said if line.startswith("training: ")]
    assert len(steps) == 4
    assert re.fullmatch(r"training: 1 of 4 steps, about \d+ s left, loss \d+\.\d{4}, lr 0\.0e\+00, tok_s \d+", steps[0])
    assert not [line for line in said if BAR.search(line)]


def on_a_terminal(*command: str) -> str:
    """What a command writes when its stderr is a terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", 40, 100, 0, 0))
        os.execvpe(command[0], command, clean_environment())
    written = b""
    while True:
        try:
            more = os.read(terminal, 65536)
        except OSError:  # the other side has closed
            break
        if not more:
            break
        written += more
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, written.decode()
    return written.decode()


def test_a_terminal_has_a_bar_and_the_log_above_it() -> None:
    code = (
        "import logging\nfrom toolkit.commands.cli import run_command\n"
        "from toolkit.runtime.progress_bar import ProgressBar\n"
        "def work():\n"
        "    with ProgressBar('work', 3, 'row') as bar:\n"
        "        for row in range(3):\n"
        "            bar.advance(loss='1.5'); logging.getLogger('frostline').info('row %d is done', row)\n"
        "    return 0\n"
        "raise SystemExit(run_command(work))"
    )
    written = on_a_terminal(sys.executable, "-c", code)
    assert "work: 100%" in written
    assert "3/3" in written
    assert "loss=1.5" in written
    for row in range(3):
        assert re.search(rf"(^|[\r\n]) *\r?\[frostline\] row {row} is done\r?\n", written), written


@pytest.mark.slow
def test_a_redirected_run_has_no_fragments_of_bars_and_a_terminal_has_whole_ones(
    tiny_model: Path, tmp_path: Path
) -> None:
    flags = ("--train.max_steps", "4", "--data.validation", "0.1", "--output.sample_answers", "1")
    file = run_script("launch/train.py", *tiny_flags(tiny_model, tmp_path / "file", *flags))
    assert file.returncode == 0
    assert "\r" not in file.stderr
    assert "█" not in file.stderr
    assert "[frostline] training: 4 of 4 steps" in file.stderr
    script = str(ROOT / "launch" / "train.py")
    written = on_a_terminal(sys.executable, script, *tiny_flags(tiny_model, tmp_path / "terminal", *flags))
    assert "training: 100%" in written
    assert not re.search(r"\][^\r\n]*\[frostline\]", written)  # a line of the log behind a bar
