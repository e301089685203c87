"""Two real ranks under each launcher: one goes, and the whole job with it; a launcher goes, and nothing is lost."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil
import pytest
from helpers import ROOT, metrics, run_script, tiny_flags

pytestmark = pytest.mark.distributed

TORCHRUN = ("torchrun", "--nproc_per_node", "2")
DEEPSPEED = ("deepspeed", "--num_gpus", "2")
ACCELERATE = ("accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no")  # fmt: skip


def broken(
    launcher: tuple[str, ...], fault: str, rank: int, model: Path, run: Path, *flags: object
) -> subprocess.CompletedProcess[str]:
    """The outcome of a short run with a fault on one rank; every process of it is gone."""
    shared = ("--train.max_steps", 30, "--prefix.cache", "off", *flags)
    result = run_script(
        "tests/fault_worker.py", fault, rank, *tiny_flags(model, run, *shared), launcher=launcher
    )  # the output ends with the last process that holds it
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(run) in (p.info["cmdline"] or [])]
    return result


@pytest.mark.parametrize(
    ("launcher", "fault", "rank", "error"),
    [
        (DEEPSPEED, "checkpoint", 0, "ValueError: the checkpoint went wrong"),
        (TORCHRUN, "forward", 1, "ValueError: the forward went wrong"),
        (TORCHRUN, "kill", 1, None),
        (ACCELERATE, "import", 1, "ModuleNotFoundError: import of toolkit.data.prefetch halted"),
    ],
    ids=["deepspeed-checkpoint", "torchrun-forward", "torchrun-kill", "accelerate-import"],
)
def test_a_rank_that_fails_takes_the_job_along_and_its_error_comes_first(
    tiny_model: Path, tmp_path: Path, launcher: tuple[str, ...], fault: str, rank: int, error: str | None
) -> None:
    engine = ("--ds", ROOT / "ds_configs" / "zero2.json") if launcher is DEEPSPEED else ()
    every = ("--output.save_every_steps", 3) if fault == "checkpoint" else ()
    result = broken(launcher, fault, rank, tiny_model, tmp_path / "run", *engine, *every)
    assert result.returncode != 0
    log = result.stderr.split("torch.distributed.elastic.multiprocessing.errors")[0]  # torchrun's own summary
    assert log.count("Traceback (most recent call last)") <= (1 if error else 0) + (launcher[0] != "deepspeed")
    if error is None:
        assert f"[rank {1 - rank}] stopped, because rank {rank} (" in log
        assert "ended without a last word: it was killed or crashed" in log
    else:
        assert log.index(f"[rank {rank}] unforeseen error") < log.index(error)
    if error and fault != "import":  # at import the ranks have not met: the launcher ends the other one
        assert log.index(error) < log.index(f"[rank {1 - rank}] stopped, because rank {rank} failed: {error}")


@pytest.mark.parametrize(
    ("launcher", "fault"),
    [(TORCHRUN, "signal to the launcher"), (DEEPSPEED, "signal to the command")],
    ids=["torchrun", "deepspeed"],
)
def test_ranks_whose_launcher_was_killed_commit_a_checkpoint_and_end(
    tiny_model: Path, tmp_path: Path, launcher: tuple[str, ...], fault: str
) -> None:
    run = tmp_path / "run"
    result = broken(launcher, fault, 0, tiny_model, run, "--train.epochs", 200, "--train.max_steps", 2000)
    assert result.returncode == -10
    assert "stopped by a signal after step" in result.stderr
    assert "the launcher has ended" in result.stderr
    done = metrics(run, "step")[-1]
    assert (run / "checkpoints" / "latest").read_text() == f"step-{int(done):08d}"


def test_a_signal_to_one_rank_in_the_set_up_stops_all(tiny_model: Path, tmp_path: Path) -> None:
    result = broken(DEEPSPEED, "signal in the set-up", 1, tiny_model, tmp_path / "run")
    assert result.returncode == 75
    assert "stopped by a signal before the first step (SIGUSR1 (rank 1))" in result.stderr
    assert not (tmp_path / "run").exists()
