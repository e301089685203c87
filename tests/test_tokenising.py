"""Worker processes tokenise the same rows in the same order, and none outlives the work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import ENGLISH, ROOT, make_tokenizer

from toolkit.config.schema import DataConfig
from toolkit.data import tokenising
from toolkit.data.dataset import load_dataset
from toolkit.data.sources import read_rows
from toolkit.data.token_store import store_in_memory
from toolkit.data.tokenising import Encoding, RowEncoder, encode_all
from toolkit.runtime import signals
from toolkit.runtime.errors import FrostlineError


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 60 rows, one of which is bad, for which workers are started after the first 8."""
    monkeypatch.setattr(tokenising, "CHUNK_ROWS", 4)
    monkeypatch.setattr(tokenising, "SERIAL_ROWS", 8)
    monkeypatch.setattr(tokenising, "worker_count", lambda: 2)
    lines = ENGLISH.read_text(encoding="utf-8").splitlines() * 3
    lines[41] = json.dumps({"QUESTION": "q", "CONTEXTS": [], "LONG_ANSWER": ""})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.slow
def test_worker_processes_give_the_same_rows_in_the_same_order(
    many: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    here: list[int] = []
    encode = RowEncoder.encode
    monkeypatch.setattr(RowEncoder, "encode", lambda self, rows: here.append(len(rows)) or encode(self, rows))
    dataset = load_dataset(DataConfig(path=str(many), on_bad_row="skip"), tokenizer, 42)
    assert here == [4, 4]
    encoding = Encoding(DataConfig(path=str(many)), tokenizer, columns=("QUESTION", "CONTEXTS", "LONG_ANSWER"))
    alone = RowEncoder(encoding).encode(read_rows(str(many)))
    store = store_in_memory(alone)
    assert [vars(row) for row in dataset.train] == [vars(store.example(row)) for row in range(59)]
    assert [(row.origin, row.fault) for row in dataset.skipped] == alone.bad
    assert not _children()


@pytest.mark.slow
def test_a_stop_ends_the_workers(many: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = Encoding(DataConfig(path=str(many)), tokenizer, columns=("QUESTION", "CONTEXTS", "LONG_ANSWER"))
    parts = encode_all(iter(read_rows(str(many))), encoding)
    for _ in range(3):
        next(parts)
    assert len(_children()) == 2
    monkeypatch.setattr(signals, "stop_requested", lambda: True)
    with pytest.raises(signals.StopRequested):
        next(parts)
    assert not _children()


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error(many: Path, tokenizer: Any) -> None:
    encoding = Encoding(DataConfig(path=str(many)), tokenizer, columns=("QUESTION", "CONTEXTS", "LONG_ANSWER"))
    parts = encode_all(iter(read_rows(str(many))), encoding)
    for _ in range(3):
        next(parts)
    for child in _children():
        child.kill()
    with pytest.raises(FrostlineError, match="a process that tokenises rows ended with code -9"):
        list(parts)
    assert not _children()


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from helpers import *\nfrom toolkit.data.tokenising import *\nimport pickle, time\n"
        "from toolkit.data.tokenising import _Worker\n"
        "worker = _Worker(pickle.dumps(Encoding(DataConfig(), make_tokenizer())))\n"
        "print(worker._process.pid, flush=True)\ntime.sleep(600)"
    )
    command = [sys.executable, "-c", script, str(ROOT), str(ROOT / "tests")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert worker.wait(timeout=120) in (0, None)


def _children() -> list[Any]:
    return [child for child in psutil.Process().children() if "toolkit.data.tokenising" in " ".join(child.cmdline())]
