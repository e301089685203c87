"""A wandb without the library: it appends every call, as a line of JSON, to the file that FAKE_WANDB names.

``install`` makes a package of it, for this process and those that it starts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let ``import wandb`` find this file, and return the file of its calls."""
    package = folder / "packages" / "wandb.py"
    package.parent.mkdir()
    package.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]))
    spec = importlib.util.spec_from_file_location("wandb", package)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("FAKE_WANDB", str(folder / "calls.jsonl"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    (folder / "calls.jsonl").touch()
    return folder / "calls.jsonl"


def calls(path: Path) -> list[tuple[str, Any]]:
    """The calls so far, by name."""
    return [tuple(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _note(name: str, given: Any) -> None:
    with Path(os.environ["FAKE_WANDB"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps([name, given], default=str) + "\n")


class _Run:
    def __init__(self, run_id: str | None) -> None:
        self.id, self.url = run_id or f"id-{os.getpid()}", "https://example.org/run"
        self.settings = SimpleNamespace(sync_dir="there")

    def define_metric(self, name: str, **options: Any) -> None:
        pass

    def log(self, values: Mapping[str, Any]) -> None:
        if values["step"] == int(os.environ.get("FAKE_WANDB_FAILS_AT", "0")):
            raise ConnectionError("the server is gone, token hf_abcdefghijklmnopqrstuvwxyz")
        _note("log", values)

    def mark_preempting(self) -> None:
        _note("mark_preempting", None)

    def finish(self, exit_code: int) -> None:
        _note("finish", exit_code)


def setup() -> Any:
    return SimpleNamespace(settings=SimpleNamespace(mode=os.environ["WANDB_MODE"], project=None, run_name=None))


def login(prompt: bool, verify: bool) -> bool:
    return "WANDB_API_KEY" in os.environ


def Settings(**values: Any) -> dict[str, Any]:
    return values


def init(**given: Any) -> _Run:
    if "FAKE_WANDB_REFUSES" in os.environ:
        raise RuntimeError("no such project")
    _note("init", given)
    return _Run(given["id"])
