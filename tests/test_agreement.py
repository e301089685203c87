"""Ranks that read other rows, or have another tokenizer, all stop before the first step and say what differs."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import ENGLISH, ROOT, clean_environment, free_port, make_tokenizer, tiny_flags

from toolkit.config.schema import DataConfig
from toolkit.data.dataset import load_dataset
from toolkit.data.rows import shared_rows
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import ConfigError, FrostlineError, OutOfMemoryError
from toolkit.training.rank_agreement import require_same_rows

WORKER = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
os.chdir(sys.argv[1])  # each rank has a directory of its own, as nodes without a shared file system have
from helpers import invocation
from toolkit.commands import cli
from toolkit.training.run import run
cli._CONNECTED_GRACE_SECONDS = 0.0
cli.exit_process(cli.run_command(lambda: run(invocation(*sys.argv[2:]))))
"""

LINES = ENGLISH.read_text(encoding="utf-8").splitlines()


def train_on(tmp_path: Path, model: Path, *rows: list[str], more: tuple[object, ...] = ()) -> list[tuple[int, str]]:
    """Exit code and output of each rank of a run in which rank r reads ``rows[r]`` under the same name."""
    environ = {**clean_environment(), "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
    environ |= {"MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(rows))}
    flags = tiny_flags(model, tmp_path / "run", "--data.path", "rows.jsonl", "--train.max_steps", 2, *more)
    ranks = []
    for rank, lines in enumerate(rows):
        folder = tmp_path / f"node{rank}"
        folder.mkdir()
        (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", WORKER.format(tests=str(ROOT / "tests")), str(folder), *flags],
                env={**environ, "RANK": str(rank)}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in ranks]
    return [(process.returncode, output) for process, output in zip(ranks, outputs, strict=True)]


OTHER = json.dumps({"QUESTION": "another?", "CONTEXTS": [], "LONG_ANSWER": "yes"})


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("second", "found"),
    [
        (LINES[:15], "15 training rows, on rank 0 20; the first that differs is none, on rank 0 rows.jsonl line 16"),
        (
            [*LINES[:4], OTHER, *LINES[5:]],
            "20 training rows, on rank 0 20; the first that differs is rows.jsonl line 5, with other content",
        ),
        (["", *LINES], None),
    ],
)
def test_two_ranks_compare_their_rows(tmp_path: Path, tiny_model: Path, second: list[str], found: str | None) -> None:
    """A blank line more is no other row."""
    for code, output in train_on(tmp_path, tiny_model, LINES, second):
        assert code == (2 if found else 0), output
        assert ("the ranks do not run the same; rank 0 is on " in output) == bool(found)
        assert found is None or (found in output and "- rank 1 (" in output)


@pytest.mark.distributed
def test_two_ranks_compare_what_they_skipped(tmp_path: Path, tiny_model: Path) -> None:
    more = ("--data.on_bad_row", "skip")
    for code, output in train_on(tmp_path, tiny_model, LINES, [*LINES, "{nope"], more=more):
        assert code == 2
        assert "1 skipped rows, on rank 0 0; the first that differs is rows.jsonl line 21, on rank 0 none" in output
        assert "training rows, on rank 0" not in output


def test_the_same_rows_cost_one_comparison() -> None:
    tokenizer = make_tokenizer()
    dataset = load_dataset(DataConfig(path=str(ENGLISH)), tokenizer, 0)
    kept: list[Any] = []

    class Keep(World):
        def broadcast_object(self, value: Any) -> Any:
            kept.append(value)
            return value

        def sum(self, *values: float) -> list[float]:
            return list(values)

    require_same_rows(Keep(size=2), dataset, tokenizer)
    assert len(kept) == 1
    require_same_rows(World(), dataset, tokenizer)


@pytest.mark.parametrize(
    "error", [ConfigError(["a", "b"], "recipe"), OutOfMemoryError("forward", "1 x 9", "no room", "fewer rows")], ids=str
)
def test_an_error_arrives_at_other_ranks_as_it_was(error: FrostlineError) -> None:
    received = pickle.loads(pickle.dumps(error))
    assert (type(received), str(received), vars(received)) == (type(error), str(error), vars(error))


def test_what_ranks_compare_parses_no_vocabulary_and_parts_without_rows_sort_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = make_tokenizer()
    dataset = load_dataset(DataConfig(path=str(ENGLISH)), tokenizer, 0)
    assert dataset.fingerprint
    world: Any = SimpleNamespace(size=2, broadcast_object=lambda found: found, sum=lambda *_: (0,))
    monkeypatch.setattr("json.loads", lambda *_, **__: pytest.fail("a vocabulary was parsed"))
    monkeypatch.setattr("numpy.unique", lambda *_, **__: pytest.fail("rows were sorted"))
    require_same_rows(world, dataset, tokenizer)
    assert not len(shared_rows(dataset.train, dataset.validation))
