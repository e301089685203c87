"""Files and folders that options name: what is there is replaced only with --overwrite, and what is read never."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers import ENGLISH, run_here, tiny_flags

from toolkit.runtime.errors import UsageError
from toolkit.runtime.paths import output_file, require_unused_folder


def test_a_file_is_replaced_only_if_that_is_asked_for(tmp_path: Path) -> None:
    own = tmp_path / "notes.json"
    own.write_text("mine")
    with pytest.raises(UsageError, match=r"--json .*notes.json exists; --overwrite replaces it, another --json leaves"):
        output_file(own, overwrite=False, option="--json")
    assert output_file(own, overwrite=True) == own
    assert output_file(tmp_path / "new" / "a.json", overwrite=False).parent.is_dir()


def test_what_is_read_and_what_is_no_file_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "link.jsonl").symlink_to("rows.jsonl")
    with pytest.raises(UsageError, match="is a file that is read"):
        output_file(tmp_path / "link.jsonl", overwrite=True, reads=[None, "org/data", tmp_path / "rows.jsonl"])
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(UsageError, match="is no regular file"):
            output_file(path, overwrite=True)


def test_a_link_is_followed_and_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "elsewhere" / "a.json")
    assert output_file(tmp_path / "link.json", overwrite=False) == tmp_path / "elsewhere" / "a.json"
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UsageError, match="is no regular file"):
        output_file(tmp_path / "a", overwrite=True)


def test_a_folder_for_several_files_is_new_or_empty(tmp_path: Path) -> None:
    require_unused_folder(tmp_path / "new", overwrite=False)
    require_unused_folder(tmp_path, overwrite=False)
    for name in "abcd":
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match="holds a, b, c …; --overwrite replaces files of the names that are written"):
        require_unused_folder(tmp_path, overwrite=False)
    require_unused_folder(tmp_path, overwrite=True)


@pytest.mark.parametrize("command", ["evaluate", "predictions", "data_check", "plan"])
def test_each_command_leaves_what_is_there_before_it_does_any_work(
    command: str, tiny_model: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own" / "mine.json"
    own.parent.mkdir()
    own.write_text("ten years of work")
    flags = tiny_flags(tiny_model, tmp_path / "run")
    words = {
        "evaluate": ("evaluate", tiny_model, "--data.path", ENGLISH, "--output", own),
        "predictions": ("evaluate", tiny_model, "--data.path", ENGLISH, "--predictions", own.parent),
        "data_check": ("data_check", *flags, "--html", tmp_path / "new.html", "--json", own),
        "plan": ("plan", *flags, "--png", own),
    }[command]
    refused = run_here(*words)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--overwrite replaces" in refused.stderr
    assert own.read_text() == "ten years of work"
    assert not (tmp_path / "new.html").exists()


def test_overwrite_replaces_scores_and_needs_something_to_replace(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    rows = ("--data.path", ENGLISH, "--batch-size", 8)
    done = run_here("evaluate", tiny_model, *rows, "--output", tmp_path / "a.json", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "a.json").read_text())["models"]
    for words in (("evaluate", tiny_model, *rows), ("data_check", "--data.path", ENGLISH), ("plan",)):
        refused = run_here(*words, "--overwrite")
        assert refused.returncode == 2
        assert "--overwrite goes with --" in refused.stderr
    rows_too = run_here("evaluate", tiny_model, *rows, "--output", ENGLISH, "--overwrite")
    assert (rows_too.returncode, "is a file that is read" in rows_too.stderr) == (2, True)
