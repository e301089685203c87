"""Only what is ours is written in place or deleted: no link is followed, and names and files of the user's stay."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import run_here, tiny_flags, train
from hostile_runs import changed, make_hostile, snapshot

from toolkit.checkpoint import catalog
from toolkit.checkpoint.own_directory import is_written_config, require_run_or_unused
from toolkit.config.recipe import dump
from toolkit.config.schema import RunConfig
from toolkit.exporting.run_export import staging_directory
from toolkit.inference.answer_file import AnswerFile
from toolkit.runtime.errors import CheckpointError, UsageError
from toolkit.runtime.file_lock import RunLock
from toolkit.runtime.own_files import NotOwnError, open_own, remove_own_file, remove_own_tree
from toolkit.runtime.paths import LineFile
from toolkit.training.monitor import Monitor, StepMetrics

SHORT = ("--train.max_steps", 2, "--mask.train", "norm", "--output.save_every_steps", 1, "--output.keep", 1)
OWN = "our file\n"


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A user's folder outside every run."""
    folder = tmp_path / "precious"
    for name in (".ssh/id", ".bashrc", "thesis.txt", "step-00000001/notes.txt", "rows.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("ten years of records")
    return folder


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a checkpoint of each."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train(*tiny_flags(tiny_model, run, *SHORT, "--output.keep", 2)) == 0
    return run


@pytest.mark.parametrize("kind", ["link", "hard link", "directory", "fifo"])
def test_what_is_no_file_of_our_own_is_never_opened_to_write(tmp_path: Path, precious: Path, kind: str) -> None:
    path, target, before = tmp_path / ".lock", precious / "rows.txt", snapshot(precious)
    make = {"link": lambda: path.symlink_to(target), "hard link": lambda: path.hardlink_to(target),
            "directory": path.mkdir, "fifo": lambda: os.mkfifo(path)}  # fmt: skip
    make[kind]()
    with pytest.raises(NotOwnError, match="only files of our own"):
        open_own(path, os.O_WRONLY)
    with pytest.raises(NotOwnError):
        RunLock.take(tmp_path)
    path.rename(tmp_path / "metrics.jsonl")
    LineFile(tmp_path / "metrics.jsonl").write("a line")
    assert snapshot(precious) == before


def test_a_tree_is_deleted_whole_or_not_at_all(tmp_path: Path, precious: Path) -> None:
    before = snapshot(precious)
    tree = tmp_path / "tree"

    def own(relative: str) -> bool:
        return relative in ("a", "a/b")

    (tree / "a").mkdir(parents=True)
    (tree / "a" / "b").write_text(OWN)
    for foreign in (tree / "c", tree / "a" / "c"):
        foreign.write_text("a note")
        with pytest.raises(NotOwnError, match="holds "):
            remove_own_tree(tree, own)
        assert (tree / "a" / "b").read_text() == OWN
        foreign.unlink()
    (tree / "a" / "b").unlink()
    (tree / "a" / "b").symlink_to(precious)
    with pytest.raises(NotOwnError):
        remove_own_tree(tree, own)
    (tree / "a" / "b").unlink()
    (tmp_path / "link").symlink_to(precious)
    for remove in (
        lambda: remove_own_tree(tmp_path / "link", lambda _: True),
        lambda: remove_own_file(tmp_path / "link"),
    ):
        with pytest.raises(NotOwnError):
            remove()
    remove_own_tree(tree, own)
    assert not tree.exists()
    assert snapshot(precious) == before


def test_a_run_whose_checkpoints_are_a_link_trains_there_and_touches_nothing_else(
    tiny_model: Path, tmp_path: Path, precious: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(precious)
    flags = tiny_flags(tiny_model, tmp_path / "run", *SHORT)
    with pytest.raises(CheckpointError, match="step-00000001 has the name of a checkpoint and holds none"):
        train(*flags)
    (precious / "step-00000001").rename(precious / "step-1")
    before = snapshot(precious)
    assert train(*flags) == 0
    after = snapshot(precious)
    assert {name: after.get(name) for name in before} == before
    assert (precious / "latest").read_text() == "step-00000002"
    assert (tmp_path / "run" / "checkpoints").is_symlink()


def test_a_stranger_whose_lock_is_a_link_empties_no_file(tiny_model: Path, tmp_path: Path, precious: Path) -> None:
    before = snapshot(precious)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config_of(run))
    (run / ".lock").symlink_to(precious / "rows.txt")
    flags = tiny_flags(tiny_model, run, *SHORT)
    for script, more in (("train.py", ()), ("submit.py", ("--dry-run",))):
        ended = run_here(script, *flags, *more)
        assert ended.returncode == 2, ended.stderr
        assert "it is a symbolic link" in ended.stderr
    assert snapshot(precious) == before


def test_copies_and_links_beside_checkpoints_are_never_deleted_or_taken_for_one(
    finished: Path, tmp_path: Path, precious: Path
) -> None:
    run, before = Path(shutil.copytree(finished, tmp_path / "run")), snapshot(precious)
    folder = run / "checkpoints"
    shutil.copytree(folder / "step-00000001", folder / "step-00000001-my-backup")
    shutil.copytree(folder / "step-00000001", folder / "step-best-of-march")
    (folder / "step-00000000").symlink_to(precious)
    (folder / ".step-00000003.staging").symlink_to(precious)
    (folder / ".gitignore").write_text("mine")
    (folder / ".mine").mkdir()
    (folder / "step-00000001" / "notes.txt").write_text("mine")
    assert [path.name for path in catalog.checkpoints_of(run)] == ["step-00000001", "step-00000002"]
    own = snapshot(run)
    catalog.prune(run, folder / "step-00000002", keep=1)
    catalog.clear_leftovers(run)
    assert snapshot(run) == own, "step 1 holds a note"
    (folder / "step-00000001" / "notes.txt").unlink()
    catalog.prune(run, folder / "step-00000002", keep=1)
    assert sorted(path.name for path in folder.iterdir()) == [
        ".gitignore", ".mine", ".step-00000003.staging", "latest", "step-00000000", "step-00000001-my-backup",
        "step-00000002", "step-best-of-march",
    ]  # fmt: skip
    assert snapshot(precious) == before


def test_what_is_in_the_place_of_a_checkpoint_is_moved_if_it_is_not_ours(tmp_path: Path, precious: Path) -> None:
    final = tmp_path / "step-00000004"
    final.symlink_to(precious)
    catalog.make_way(final)
    final.mkdir()
    (final / "MANIFEST.json").write_text("{}")
    catalog.make_way(final)
    left = sorted(path.name for path in tmp_path.iterdir() if path != precious)
    assert left[0] == ".step-00000004.replaced"
    assert left[1].startswith("step-00000004-moved-")
    assert (tmp_path / left[1]).is_symlink()


def config_of(run: Path) -> str:
    output = RunConfig().output.model_copy(update={"dir": str(run)})
    return dump(RunConfig().model_copy(update={"output": output}))


@pytest.mark.parametrize("own", [
    {"config.yaml": "model: {name_or_path: x}  # mine\n", "mask.json": "mine", "plan.json": "mine"},
    {"notes.txt": "mine"},
    {".bashrc": "mine"},
    {".lock": "12345"},
    {"checkpoints/.gitignore": "mine", "checkpoints/latest": "mine"},
    {"config.yaml": "written by a run", "checkpoints/latest": "the latest of my letters"},
])  # fmt: skip
def test_a_used_folder_that_is_no_run_is_refused_before_anything_is_written(
    tiny_model: Path, tmp_path: Path, own: dict[str, str]
) -> None:
    run = tmp_path / "project"
    for name, content in own.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(config_of(run) if content == "written by a run" else content)
    before = snapshot(run)
    ended = run_here("train.py", *tiny_flags(tiny_model, run, *SHORT))
    assert ended.returncode == 2, ended.stderr
    assert "is no run directory and holds" in ended.stderr or "is not a run's" in ended.stderr
    assert snapshot(run) == before


def test_runs_and_unused_folders_are_told_from_others(finished: Path, tmp_path: Path) -> None:
    for path in (finished, tmp_path / "missing", tmp_path):
        require_run_or_unused(path)
    (tmp_path / "train.log").write_text("the output of the command itself")
    (tmp_path / ".lock").touch()
    (tmp_path / "gradients.json").write_text("{}")
    require_run_or_unused(tmp_path)
    assert is_written_config(finished / "config.yaml")
    text = (finished / "config.yaml").read_text()
    for other in (f"# mine\n{text}", text.replace("dir:", "dir: null #"), "[" * 10**5, "a: &a [*a]", "\0"):
        (tmp_path / "config.yaml").write_text(other)
        assert not is_written_config(tmp_path / "config.yaml")


def test_two_exports_into_one_target_publish_one_of_them_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    abandoned = tmp_path / f".out.{'0' * 32}.staging"
    mine = tmp_path / ".out.staging"
    for folder in (abandoned, mine):
        folder.mkdir()
        (folder / "file").touch()

    def export(content: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        with staging_directory(target) as staging:
            staging.mkdir()
            (staging / "file").write_text(content)
            meanwhile()

    with pytest.raises(CheckpointError, match="was written by another process"):
        export("late", meanwhile=lambda: export("first"))
    assert (target / "file").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.staging", "out"], "the user's own folder stays"


def test_answers_follow_no_link_and_truncate_nothing(tmp_path: Path, precious: Path) -> None:
    before = snapshot(precious)
    output = tmp_path / "answers.jsonl"
    (tmp_path / ".answers.jsonl.staging").symlink_to(precious / "rows.txt")
    with AnswerFile(output, {}, "ANSWER", overwrite=False) as file:
        file.publish()
    (tmp_path / "other.jsonl.part").symlink_to(precious / "rows.txt")
    with pytest.raises(UsageError, match="it is a symbolic link"):
        AnswerFile(tmp_path / "other.jsonl", {}, "ANSWER", overwrite=True)
    with pytest.raises(UsageError, match="--overwrite replaces it"):
        AnswerFile(precious / "rows.txt", {}, "ANSWER", overwrite=False)
    assert snapshot(precious) == before


@pytest.mark.parametrize("seed", range(12))
def test_a_hostile_run_directory_changes_nothing_around_it(
    tiny_model: Path, finished: Path, tmp_path: Path, precious: Path, seed: int
) -> None:
    """A part of ``python tests/hostile_runs.py``."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    make_hostile(run, precious, seed)
    before = snapshot(precious)
    ended = run_here("train.py", *tiny_flags(tiny_model, run, *SHORT, "--train.max_steps", 3, "--resume-override"))
    assert ended.returncode in (0, 1, 2), ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    assert changed(before, precious, run) == []
    assert ended.returncode != 0 or (run / "checkpoints" / "latest").read_text() == "step-00000003"


def test_two_runs_never_share_the_checkpoints_of_one_link(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoints").symlink_to(tmp_path / "scratch")
    assert train(*tiny_flags(tiny_model, tmp_path / "a", *SHORT)) == 0
    before = snapshot(tmp_path)
    for script, more in (("train.py", ()), ("submit.py", ("--dry-run",))):
        ended = run_here(script, *tiny_flags(tiny_model, tmp_path / "b", *SHORT), *more)
        assert ended.returncode == 2, ended.stderr
        assert f"holds the checkpoints of {tmp_path / 'a'}; each run would remove the other's" in ended.stderr
    (tmp_path / "b" / ".lock").unlink(missing_ok=True)
    after = snapshot(tmp_path)
    assert {name for name in before | after if before.get(name) != after.get(name)} == set()
    assert train(*tiny_flags(tiny_model, tmp_path / "a", *SHORT)) == 0, "the first may go on"
    (tmp_path / "a").rename(tmp_path / "moved")
    assert train(*tiny_flags(tiny_model, tmp_path / "moved", *SHORT)) == 0, "a run that was moved keeps them"
    assert (tmp_path / "scratch" / ".frostline-run").read_text() == str(tmp_path / "moved")


def test_a_run_whose_directory_is_moved_away_ends_and_begins_none_anew(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Monitor.step

    def move_away(self: Monitor, metrics: StepMetrics) -> None:
        step(self, metrics)
        (tmp_path / "run").rename(tmp_path / "moved")

    monkeypatch.setattr(Monitor, "step", move_away)
    ended = run_here("train.py", *tiny_flags(tiny_model, tmp_path / "run", *SHORT))
    assert ended.returncode == 1
    said = f"checkpoints in {tmp_path / 'run'} could not be written (No such file or directory)"
    assert said in ended.stderr
    assert "put back the directory that was moved or removed" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()


def test_an_export_goes_neither_among_checkpoints_nor_through_a_link_to_nowhere(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = snapshot(run)
    for more in ((), ("--delta",)):
        ended = run_here("export.py", run, "--output", run / "checkpoints" / "step-00000099", *more)
        assert (ended.returncode, "would be among the checkpoints of the run" in ended.stderr) == (2, True)
        ended = run_here("export.py", run, "--output", tmp_path / "link", *more)
        assert (ended.returncode, "is a link that leads nowhere" in ended.stderr) == (2, True)
    assert snapshot(run) == before
    assert not (tmp_path / "nowhere").exists()
