"""Ranks that would not run the same thing say so at the start, with rank, name and both values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, clean_environment, free_port, invocation, tiny_flags

from toolkit.runtime.distributed import World
from toolkit.runtime.paths import sources_hash
from toolkit.training.rank_agreement import rank_settings, require_same

WORKER = """
import sys
from toolkit.commands import cli
from toolkit.runtime import distributed
from toolkit.config import flags
from toolkit.training.rank_agreement import rank_settings, require_same
from pathlib import Path

def main():
    world = distributed.join_process_group()
    require_same(world, rank_settings(flags.parse(flags.create_parser(""), Path(sys.argv.pop(1)))))
    return 0

cli._CONNECTED_GRACE_SECONDS = 0.0
cli.exit_process(cli.run_command(main))
"""


def run_ranks(*flags_by_rank: list[str]) -> list[tuple[int, str]]:
    """Exit code and output of each rank, started as a launcher would."""
    environ = {**clean_environment(), "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
    environ |= {"MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(flags_by_rank))}
    recipe = str(ROOT / "recipes" / "quickstart.yaml")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, recipe, *flags],
            env={**environ, "RANK": str(rank)}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank, flags in enumerate(flags_by_rank)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in ranks]
    return [(process.returncode, output) for process, output in zip(ranks, outputs, strict=True)]


@pytest.mark.distributed
def test_ranks_that_differ_all_stop_and_say_who_differs_in_what(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text("{}")
    second.write_text('{"zero_optimization": {"stage": 2}}')
    refused = run_ranks(["--ds", str(first)], ["--ds", str(second), "--train.learning_rate", "2e-5"])
    for code, output in refused:
        assert code == 2
        assert "the ranks do not run the same; rank 0 is on " in output
        assert "): train.learning_rate is 2e-05, on rank 0 0.0005\n" in output
        assert "): DeepSpeed file is SHA-256 " in output
        assert output.count("  - rank 1 (") == 2
        assert "Give every node the same checkout, environment, recipe and data" in output


def test_one_process_has_nobody_to_differ_from() -> None:
    require_same(World(), {"anything": "at all"})


def test_recipe_file_code_and_versions_are_compared(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text("{}")
    found = rank_settings(invocation(*tiny_flags(tmp_path, tmp_path), "--ds", str(file)))
    assert {"train.learning_rate", "mask.train", "DeepSpeed file", "frostline", "Python", "torch"} <= set(found)
    file.write_text("{ }")
    again = rank_settings(invocation(*tiny_flags(tmp_path, tmp_path), "--ds", str(file)))
    assert {name for name in found if found[name] != again[name]} == {"DeepSpeed file"}


def test_a_changed_source_file_changes_the_hash_of_the_parts_it_belongs_to(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "module.py").write_text("a = 1\n")
    (tmp_path / "part" / "other.py").write_text("b = 1\n")
    selections: list[tuple[str, ...]] = [(), ("part",), ("module.py",)]
    before = [sources_hash(tmp_path, *parts) for parts in selections]
    (tmp_path / "module.py").write_text("a = 2\n")
    after = [sources_hash(tmp_path, *parts) for parts in selections]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, False]
