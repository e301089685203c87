"""The converted bundled model is the known one or is converted again; a cache is found or a message says what to do."""

from __future__ import annotations

import getpass
import pwd
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.commands import cli
from toolkit.models import bundled
from toolkit.models.bundled import BUNDLED_NAME, bundled_directory
from toolkit.models.weight_fingerprint import fingerprint_of
from toolkit.runtime import privacy
from toolkit.runtime.cache_root import cache_root
from toolkit.runtime.errors import ModelError, UsageError
from toolkit.runtime.safetensors_io import write_safetensors

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The conversions that were made, each of a small model; the cache is in a new directory."""
    made: list[Path] = []

    def convert(source: Path, target: Path) -> None:
        made.append(target)
        target.mkdir()
        write_safetensors(target / "model.safetensors", WEIGHTS)

    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bundled, "_convert_gguf", convert)
    monkeypatch.setattr(bundled, "_gguf_directory", lambda: tmp_path)
    monkeypatch.setattr(bundled, "_SHA256", fingerprint_of(WEIGHTS))
    return made


def test_a_bundled_model_that_is_not_the_known_one_is_converted_again(conversions: list[Path]) -> None:
    directory = bundled_directory(BUNDLED_NAME)
    assert bundled_directory(BUNDLED_NAME) == directory
    assert len(conversions) == 1
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-1] + b"\1", content[:-4], b"", None):
        if damaged is None:
            weights.unlink()
        else:
            weights.write_bytes(damaged)
        assert bundled_directory(BUNDLED_NAME) == directory
        assert weights.read_bytes() == content
    assert len(conversions) == 5


def test_leftovers_of_killed_conversions_are_swept_and_nothing_else(conversions: list[Path], tmp_path: Path) -> None:
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    for folder in (
        cache / f".smollm2-135m-instruct-bf16-{'a' * 32}",
        cache / "smollm2-135m-instruct-bf16-mine",
        elsewhere,
    ):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    (cache / f".smollm2-135m-instruct-bf16-{'b' * 32}").symlink_to(elsewhere, target_is_directory=True)
    bundled_directory(BUNDLED_NAME)
    assert {path.name for path in cache.iterdir()} == {
        "smollm2-135m-instruct-bf16", "smollm2-135m-instruct-bf16.lock", "smollm2-135m-instruct-bf16-mine",
    }  # fmt: skip
    assert (elsewhere / "file").exists()


def test_a_cache_that_cannot_be_written_is_a_clear_error(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=r"cannot be converted in .*set FROSTLINE_CACHE to a directory that you may"):
        bundled_directory(BUNDLED_NAME)


def test_a_user_without_home_and_name_has_a_private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise KeyError("no such user")

    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "FROSTLINE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = cache_root()
    assert found.parent.parent == tmp_path
    assert stat.S_IMODE(found.parent.stat().st_mode) == 0o700
    cli._name_user()
    assert cache_root() == found.parent / ".cache" / "frostline"
    assert getpass.getuser().startswith("uid-")
    found.parent.chmod(0o755)
    with pytest.raises(UsageError, match=r"no home directory is known.*set HOME, or FROSTLINE_CACHE"):
        privacy.private_temporary_directory()
