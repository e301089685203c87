"""Standard output that is closed, full, or read by nobody any more: one message, and no file gets what is printed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers import ROOT, clean_environment

COMMAND = [sys.executable, str(ROOT / "launch" / "cache.py")]


def run(redirection: str, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a light command under a redirection of the shell."""
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirection}', "_", *COMMAND, *words],
        env=clean_environment() | environ, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("redirection", "words", "said"),
    [
        ("> /dev/full", ["list"], "error: standard output cannot be written (No space left on device)"),
        (
            "| true; exit ${PIPESTATUS[0]}",
            ["list"],
            "error: standard output cannot be written (what reads it has ended",
        ),
    ],
)
def test_output_that_cannot_be_written_is_one_message(redirection: str, words: list[str], said: str) -> None:
    done = run(redirection, *words)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_command_whose_streams_are_closed_ends_as_any_other() -> None:
    assert run(">&- 2>&- <&-", "list").returncode == 0
    assert run(">&- 2>&- <&-", "purge", "--kind", "nonsense").returncode == 2


def test_no_file_takes_the_place_of_a_closed_stream() -> None:
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]);"
        "from toolkit.commands.standard_streams import open_missing_streams;"
        "open_missing_streams(); os.write(3, str(os.open('/dev/zero', os.O_RDONLY)).encode()); print('lost')"
    )
    reading, writing = os.pipe()
    with os.fdopen(reading) as found:
        subprocess.run(
            ["bash", "-c", '"$@" 3>&"$0" >&- 2>&- <&-', str(writing), sys.executable, "-c", code, str(ROOT)],
            pass_fds=[writing], check=True,
        )  # fmt: skip
        os.close(writing)
        assert int(found.read()) > 2


def test_a_rank_that_is_no_number_is_one_message() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "evaluate.py"), "x", "--data.path", "y"],
        env=clean_environment() | {"RANK": "first", "WORLD_SIZE": "2"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 2
    assert "RANK=first" in done.stderr
    assert "Traceback" not in done.stderr
