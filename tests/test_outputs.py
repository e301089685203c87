"""Where exports and answers go: a place that cannot be written is one message, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import tiny_flags, train
from test_bad_input import run_main

from toolkit.exporting.run_export import export_delta, export_model
from toolkit.runtime.errors import DiskError, UsageError


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("outputs") / "run"
    assert train(*tiny_flags(tiny_model, run, "--train.max_steps", 1)) == 0
    return run


def test_an_export_that_finds_no_room_is_one_message_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("toolkit.checkpoint.delta.write_safetensors", full)
    monkeypatch.setattr("toolkit.models.weight_files.write_safetensors", full)
    for export in (export_delta, export_model):
        with pytest.raises(DiskError, match=r"out cannot be written \(.*No space left.*make room, or choose another"):
            export(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_made_is_found_before_a_model_loads(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr("toolkit.inference.open_model.load_delta", None)
    with pytest.raises(UsageError, match=r"file cannot be made \(.*\); choose another --output"):
        export_model(run, file / "out")
    for output, message in ((file / "out", "cannot be made"), (tmp_path, "is a directory; expected a file")):
        assert run_main(monkeypatch, "generate", run, "--question", "Why?", "--output", output) == 2
        assert message in capsys.readouterr().err
