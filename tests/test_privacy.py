"""What a run leaves can give back its rows: it is its user's alone, unless the recipe shares it; one command purges."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import run_here, tiny_flags, train
from store_samples import NAMESPACE, open_store, samples

from toolkit.commands import cache
from toolkit.commands.cli import run_command
from toolkit.runtime import hub
from toolkit.runtime.file_lock import FileLock
from toolkit.runtime.privacy import close_directory, make_directory, private_files, set_access, users_umask


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    former = os.umask(0)
    yield
    os.umask(former)


def modes(folder: Path) -> dict[str, int]:
    """Permissions of a folder and all in it, by relative path."""
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}


def run_with(model: Path, folder: Path, *more: object) -> None:
    flags = ("--prefix.cache", "on", "--prefix.cache_dir", folder / "cache", "--data.validation", "0.25",
             "--output.sample_answers", 1, "--output.report_to", "tensorboard", "--train.max_steps", 2)  # fmt: skip
    assert run_command(lambda: train(*tiny_flags(model, folder / "run", *flags, *more))) == 0


def test_nobody_else_reads_a_run_or_its_hidden_states_whatever_the_umask(tiny_model: Path, tmp_path: Path) -> None:
    run_with(tiny_model, tmp_path)
    for folder in ("run", "cache"):
        found = modes(tmp_path / folder)
        assert len(found) > 3
        assert not {name: oct(mode) for name, mode in found.items() if mode & 0o077}
    assert any("events.out" in name for name in modes(tmp_path / "run"))
    assert os.umask(0) == 0, "the umask is given back"


def test_a_recipe_shares_them_with_the_group_of_the_directory(tiny_model: Path, tmp_path: Path) -> None:
    run_with(tiny_model, tmp_path, "--output.share", "group", "--prefix.share", "group")
    for folder in ("run", "cache"):
        for name, mode in modes(tmp_path / folder).items():
            assert mode == (0o2770 if (tmp_path / folder / name).is_dir() else 0o660), (name, oct(mode))


def test_one_may_be_shared_without_the_other(tiny_model: Path, tmp_path: Path) -> None:
    run_with(tiny_model, tmp_path, "--output.share", "group")
    assert not any(mode & 0o077 for mode in modes(tmp_path / "cache").values())
    assert modes(tmp_path / "run")["config.yaml"] == 0o660


def test_hidden_states_that_an_earlier_version_left_open_are_closed(tmp_path: Path) -> None:
    directory = tmp_path / NAMESPACE.sha256
    directory.mkdir(mode=0o755)
    with open_store(tmp_path):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_directory_of_another_name_or_user_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir(mode=0o755)
    make_directory(tmp_path / "given")
    (tmp_path / "link").symlink_to(tmp_path / "given")
    set_access(tmp_path / "link", False)
    assert modes(tmp_path)["given"] == 0o755


def test_exports_and_downloads_keep_the_users_umask(tmp_path: Path) -> None:
    os.umask(0o022)
    with private_files():
        (tmp_path / "private").touch()
        with users_umask():
            (tmp_path / "export").touch()
        with hub.downloads("org/name"):
            (tmp_path / "model").touch()
    found = modes(tmp_path)
    assert (found["private"], found["export"], found["model"]) == (0o600, 0o644, 0o644)


def fill(root: Path) -> Path:
    """A cache directory with hidden states, tokens, a base's answers, and files that are somebody else's."""
    with open_store(root / "activations") as store:
        store.write(samples(range(3)))
    (root / "tokens").mkdir()
    (root / "base_answers").mkdir()
    for name in ("tokens/" + "a" * 64 + ".tokens", "base_answers/" + "b" * 64 + ".json"):
        (root / name).write_text("rows")
    for name in ("tokens/notes.txt", "mine.txt"):
        (root / name).write_text("mine")
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / ("c" * 32 + ".safetensors")).write_text("mine")
    (root / "activations" / ("d" * 64)).symlink_to(root / "elsewhere", target_is_directory=True)
    (root / "tokens" / ("e" * 64 + ".tokens")).symlink_to(root / "mine.txt")
    return root


def test_purge_removes_what_gives_back_rows_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE", str(fill(tmp_path)))
    assert cache.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert [listed.count(f"{kind} ") for kind in ("activations", "tokens", "answers")] == [1, 1, 1]
    assert cache.main(["purge", "--unused-days", "1"]) == 0
    assert capsys.readouterr().out == "0 removed, 0.0 MiB\n"
    assert cache.main(["purge"]) == 0
    assert capsys.readouterr().out.startswith("3 removed")
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()}
    assert left == {
        "activations/.lock", "mine.txt", "tokens/notes.txt", "tokens/" + "e" * 64 + ".tokens",
        "elsewhere/" + "c" * 32 + ".safetensors",
    }  # fmt: skip


def test_purge_leaves_what_a_live_run_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path))
    with open_store(tmp_path / "activations") as store:
        store.write(samples(range(3)))
        assert cache.main(["purge"]) == 0
        assert "which a live run uses" in capsys.readouterr().out
        assert list(store.directory.glob("*.safetensors"))
    assert cache.main(["purge"]) == 0
    assert not (tmp_path / "activations" / NAMESPACE.sha256).exists()


def test_a_lock_can_be_opened_by_those_alone_who_may_write_beside_it(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    lock.release()
    assert modes(tmp_path)["lock"] == 0o600


def test_a_run_directory_that_an_earlier_version_left_open_is_closed_and_said(tiny_model: Path, tmp_path: Path) -> None:
    flags = tiny_flags(tiny_model, tmp_path / "run", "--train.max_steps", 1)
    assert run_command(lambda: train(*flags)) == 0
    (tmp_path / "run").chmod(0o755)
    again = run_here("train.py", *flags)
    assert again.returncode == 0
    assert modes(tmp_path)["run"] == 0o700
    assert "was open to others (mode 755) and is its user's alone now (700)" in again.stderr
    (tmp_path / "run").chmod(0o2770)  # shared with its group: by output.share, or by its user
    assert run_command(lambda: train(*flags)) == 0
    assert modes(tmp_path)["run"] == 0o2770


def test_a_file_system_without_modes_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    tmp_path.chmod(0o755)
    monkeypatch.setattr(Path, "chmod", refuse)
    close_directory(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
