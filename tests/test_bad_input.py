"""Whatever is wrong with the input: exit code 2, one message that says what to do, no traceback."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT, run_here, run_script, tiny_flags

from toolkit.commands.cli import run_command
from toolkit.runtime.errors import FrostlineError


def run_main(monkeypatch: pytest.MonkeyPatch, script: str, *flags: object) -> int:
    """A launch script's main in this process, as its __main__ runs it."""
    import importlib.util

    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    spec = importlib.util.spec_from_file_location(f"launch_{script}", ROOT / "launch" / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return run_command(module.main)
    except SystemExit as end:  # argparse
        return int(end.code or 0)


BAD_ROWS: dict[str, tuple[bytes, str]] = {
    "missing column": (
        b'{"QUESTION": "q", "CONTEXTS": []}',
        "task long_answer needs the column LONG_ANSWER or answer; the rows have QUESTION, CONTEXTS",
    ),
    "null": (b'{"QUESTION": "q", "CONTEXTS": [], "LONG_ANSWER": null}', "line 1 has null in LONG_ANSWER"),
    "empty answer": (b'{"QUESTION": "q", "CONTEXTS": [], "LONG_ANSWER": ""}', "line 1 has an empty LONG_ANSWER"),
    "wrong type": (b'{"QUESTION": 1, "CONTEXTS": [], "LONG_ANSWER": "a"}', "line 1 has a int in QUESTION"),
    "not utf-8": (b'{"QUESTION": "\xc7\xd1", "CONTEXTS": [], "LONG_ANSWER": "a"}', "line 1 is not UTF-8"),
    "nothing supervised": (
        json.dumps({"QUESTION": "q " * 900, "CONTEXTS": [], "LONG_ANSWER": "a"}).encode(),
        "nothing could be supervised",
    ),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    content, message = BAD_ROWS[kind]
    (tmp_path / "rows.jsonl").write_bytes(content)
    flags = tiny_flags(tiny_model, tmp_path / "run", "--data.path", tmp_path / "rows.jsonl", "--data.max_length", 256)
    assert run_main(monkeypatch, "train", *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(tmp_path / "rows.jsonl") in error
    assert error.count("error: ") == 1
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists(), "a run that never began leaves no directory"


FLAGS: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "no such data": (lambda tmp: ["--data.path", tmp / "none.jsonl"], "no such file"),
    "a directory of data": (lambda tmp: ["--data.path", tmp], "holds no data file"),
    "run directory is a file": (lambda tmp: ["--output.dir", long_rows(tmp)], "cannot be written"),
    "unknown format": (lambda tmp: ["--data.path", ROOT / "README.md"], "unknown data format '.md'"),
    "no such model": (lambda tmp: ["--model.name_or_path", tmp / "none"], "not an existing directory"),
    "tied head": (lambda tmp: ["--mask.tied", "error"], "share one tensor"),
    "selector without match": (lambda tmp: ["--mask.train", "glob:transformer.h.3.*"], "matches none"),
    "block out of range": (lambda tmp: ["--mask.train", "blocks:28"], "block 28 is out of range"),
    "unknown key": (lambda tmp: ["--train.lr", "1"], "--train.lr: unknown flag"),
    "bad value": (lambda tmp: ["--train.epochs", "three"], "train.epochs is 'three'"),
    "no such recipe": (lambda tmp: ["--config", tmp / "none.yaml"], "no such file; --config takes a YAML recipe"),
    "recipe without --config": (lambda tmp: ["my.yaml"], "did you mean --config my.yaml?"),
    "no such ds file": (lambda tmp: ["--ds", tmp / "none.json"], "no such file; --ds takes a DeepSpeed JSON"),
    "split of a file": (lambda tmp: ["--data.split", "test"], "files have one split only"),
    "rows beyond positions": (lambda tmp: ["--data.path", long_rows(tmp)], "the model has 512 positions"),
}


def long_rows(folder: Path) -> Path:
    row = {"QUESTION": "q", "CONTEXTS": ["word " * 700], "LONG_ANSWER": "a"}
    (folder / "long.jsonl").write_text(json.dumps(row))
    return folder / "long.jsonl"


@pytest.mark.parametrize("kind", FLAGS)
def test_bad_flags(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    flags, message = FLAGS[kind]
    assert run_main(monkeypatch, "train", *tiny_flags(tiny_model, tmp_path / "run", *flags(tmp_path))) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error: ") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("evaluate", ("nowhere/x/y",), "not an existing directory"),
        ("evaluate", ("runs/none", "--batch-size", "0"), "'0' is not a whole number from 1"),
        ("generate", ("x", "--question", "q", "--temperature", "-1"), "'-1' is not a number from 0"),
        ("generate", ("x", "--input", "q.jsonl", "--context", "c"), "--context goes with --question"),
        ("generate", ("x", "--question", "q", "--split", "test"), "--split goes with --input"),
        ("generate", ("x", "--question", "q", "--limit", "3"), "--limit goes with --input"),
        ("generate", ("x", "--question", "q", "--on-bad-row", "skip"), "--on-bad-row goes with --input"),
        ("generate", ("x", "--input", ""), "--input is empty"),
        (
            "generate",
            ("x", "--input", "q", "--answer-column", "REFERENCE"),
            "'REFERENCE' has another meaning in --output",
        ),
        ("generate", ("x", "--question", "q", "--overwrite"), "--overwrite goes with --output"),
        ("generate", ("x", "--output", "a.jsonl"), "--output goes with --input or --question"),
        ("generate", ("x", "--question", "q", "--top-p", "0.9"), "--top-p goes with a --temperature"),
        (
            "generate",
            ("x", "--question", "q", "--temperature", "1", "--top-p", "0"),
            "'0' is not a number above 0",
        ),
        ("plan", ("--tflops", "nan"), "'nan' is not a number above 0"),
        ("generate", ("x", "--question", "q", "--seed", "-1"), "'-1' is not a whole number from 0"),
        ("generate", ("x", "--question", "q", "--batch-size", "0"), "'0' is not a whole number from 1"),
        ("evaluate", ("x", "--data.split", "test"), "--data.split goes with --data.path"),
        ("generate", ("x", "--input", "none.jsonl"), "no such file"),
        ("generate", ("x", "--question", " "), "--question is empty"),
        ("export", ("nowhere",), "is not a run directory"),
        ("export", ("nowhere", "--delta"), "is not a run directory"),
    ],
)
def test_the_other_commands(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
    flags: tuple[str, ...],
    message: str,
) -> None:
    assert run_main(monkeypatch, script, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_run_without_any_checkpoint_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    assert run_main(monkeypatch, "evaluate", tmp_path) == 2
    assert "has no committed checkpoint yet" in capsys.readouterr().err


def test_a_real_process_exits_with_2() -> None:
    result = run_script("launch/train.py", "--train.epochs", "three")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "train.epochs is 'three'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_real_process_that_loaded_its_model_exits_with_2_and_a_finished_one_with_0(
    tiny_model: Path, tmp_path: Path
) -> None:
    flags = tiny_flags(tiny_model, tmp_path / "run", "--train.max_steps", "2")
    bad = run_script("launch/train.py", *flags, "--mask.train", "last:99")
    assert bad.returncode == 2
    assert bad.stderr.splitlines()[-1].startswith("error: mask selector 'last:99': expected a whole number from 1 to 6")
    assert "Traceback" not in bad.stderr
    good = run_script("launch/train.py", *flags)
    assert good.returncode == 0, good.stderr
    assert "frost line: block 2 of 6" in good.stderr


@pytest.mark.parametrize("script", ["train", "evaluate", "generate", "export"])
def test_help_is_answered(script: str) -> None:
    result = run_here(f"launch/{script}.py", "--help")
    assert result.returncode == 0
    assert "--step" in result.stdout or script == "train"


def test_failures_that_are_not_the_users_exit_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> int:
        raise FrostlineError("loss is nan")

    def breaks() -> int:
        raise ZeroDivisionError

    assert run_command(fails) == 1
    assert capsys.readouterr().err == "error: loss is nan\n"
    assert run_command(breaks) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
