"""Jobs on a real SLURM cluster: they train over two nodes, survive the time limit and a lost node, and sweep."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import REFERENCE_MASK, ROOT, clean_environment, metrics, tiny_flags
from slurm_cluster import Cluster, cluster, missing

from launch import submit as submit_script
from toolkit.runtime.errors import SlurmError
from toolkit.slurm.cluster import read_partitions, sbatch
from toolkit.slurm.submission import queued_job

pytestmark = pytest.mark.distributed

STEPS = 100
ZERO2 = str(ROOT / "ds_configs" / "zero2.json")


BUILD_KERNEL = """
from deepspeed.accelerator import get_accelerator
if get_accelerator().device_name() == "cpu":
    get_accelerator().create_op_builder("ShareMemCommBuilder").load()
"""
"""DeepSpeed compiles it on first use under a lock file; a rank that is killed meanwhile would leave the lock behind."""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    if lacking := missing():
        message = f"no SLURM here (no {', '.join(lacking)}); apt-get install slurm-wlm munge"
        if os.environ.get("FROSTLINE_REQUIRE_CLUSTER"):
            pytest.fail(message)
        pytest.skip(message)
    subprocess.run([sys.executable, "-c", BUILD_KERNEL], env=clean_environment(), capture_output=True, check=True)
    with cluster() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environ.items():
            patch.setenv(name, value)
        yield running


@dataclass
class Jobs:
    """Run directories and job numbers of the story below."""

    straight: Path
    signalled: Path
    lost: Path
    sweep: tuple[Path, Path]
    numbers: dict[str, str]
    holder: str | None
    """Whom the signalled run's directory belonged to while the job ran."""


def submit(*flags: str) -> str:
    """Submit as launch/submit.py does; the job's number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["submit.py", *flags])
        assert submit_script.main() == 0
    return subprocess.run(
        ["squeue", "-h", "-o", "%A", "-S", "-i"], capture_output=True, text=True, check=True
    ).stdout.split()[0]


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def hold(slurm: Cluster, number: str, run: Path, steps: int) -> int:
    """Stop rank 0 of a running job after so many steps; its process id. The other rank then waits for it."""
    slurm.wait(f"the ranks of job {number}", lambda: 0 in slurm.ranks(number))
    rank_0 = slurm.ranks(number)[0]
    slurm.wait(f"step {steps} of job {number}", lambda: steps_of(run) >= steps)
    os.kill(rank_0, signal.SIGSTOP)
    assert steps_of(run) < STEPS
    return rank_0


def is_held(process: int) -> bool:
    """Whether a process is still stopped and has no USR1 waiting; SLURM may wake those that it signals."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    pending = int(fields["ShdPnd"], 16) >> (signal.SIGUSR1 - 1) & 1
    return fields["State"].startswith("T") and not pending


def minutes_run(slurm: Cluster, numbers: dict[str, str]) -> int:
    """How many minutes the job to be signalled has run, rounded down."""
    hours, minutes, _ = slurm.fields(numbers["signalled"])["RunTime"].split(":")
    return int(hours) * 60 + int(minutes)


@pytest.fixture(scope="module")
def jobs(slurm: Cluster, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Four submissions that share the waiting: one is signalled, one loses a node, one just runs, one is a sweep."""
    base = tmp_path_factory.mktemp("jobs")
    two_nodes = ("--nodes", "2", "--ds", ZERO2, "--train.max_steps", str(STEPS), "--train.epochs", "10")

    def flags(name: str, *more: str) -> list[str]:
        return [*tiny_flags(tiny_model, base / name), *two_nodes, *more]

    numbers = {"signalled": submit(*flags("signalled", "--time", "00:10:00", "--signal-before", "100"))}
    waiting = hold(slurm, numbers["signalled"], base / "signalled", 5)
    # only now: it would be over by the time that it is to be held
    numbers["lost"] = submit(*flags("lost", "--partition", "spare", "--output.save_every_steps", "5"))
    hold(slurm, numbers["lost"], base / "lost", 7)
    holder = queued_job(base / "signalled")
    slurm.kill_node("n4")

    recipes = []
    for name, mask in (("upper", "last:1"), ("lower", "last:3")):
        recipe = base / f"{name}.yaml"
        recipe.write_text(json.dumps({"mask": {"train": [mask]}, "output": {"dir": str(base / name)}}))
        recipes.append(str(recipe))
    of_recipes = ("--output.dir", str(base), *REFERENCE_MASK)
    short = [word for word in tiny_flags(tiny_model, base) if word not in of_recipes]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            patch.setenv(name, value)  # as in a shell that a launcher opened; sbatch takes it all along
        numbers["straight"] = submit(*flags("straight"))
    numbers["sweep"] = submit(*short, "--array", *recipes, "--train.max_steps", "4")

    slurm.start_node("n4")
    slurm.call("scontrol", "update", "nodename=n4", "state=resume")
    # the job's minutes are over soon, but not before its ranks have loaded the model, however slow this machine is
    slurm.call("scontrol", "update", f"job={numbers['signalled']}", f"TimeLimit={minutes_run(slurm, numbers) + 2}")
    slurm.wait("the signal before the time limit", lambda: not is_held(waiting))
    with contextlib.suppress(ProcessLookupError):
        os.kill(waiting, signal.SIGCONT)
    slurm.wait("the requeue", lambda: slurm.fields(numbers["signalled"])["Restarts"] == "1")
    slurm.call("scontrol", "update", f"job={numbers['signalled']}", "TimeLimit=10")
    slurm.wait("all jobs", lambda: not slurm.call("squeue", "-h").strip())
    sweep = (base / "upper", base / "lower")
    return Jobs(base / "straight", base / "signalled", base / "lost", sweep, numbers, holder)


def log_of(run: Path) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted((run / "slurm").glob("job-*.log")))


def test_a_job_trains_over_two_nodes_under_zero_2(slurm: Cluster, jobs: Jobs) -> None:
    fields = slurm.fields(jobs.numbers["straight"])
    ended = (fields["JobState"], fields["NumNodes"], fields["ExitCode"])
    assert ended == ("COMPLETED", "2", "0:0"), log_of(jobs.straight)
    assert len(metrics(jobs.straight)) == STEPS
    assert "engine zero-2, 2 rank(s)" in log_of(jobs.straight)
    assert log_of(jobs.straight).count(", start ") == 1


def test_a_job_signalled_before_its_limit_queues_again_and_learns_the_same(slurm: Cluster, jobs: Jobs) -> None:
    fields = slurm.fields(jobs.numbers["signalled"])
    log = log_of(jobs.signalled)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log
    assert "stopped by a signal after step" in log
    assert f"continuing {jobs.signalled} after step" in log
    assert log.count(", start ") == 2
    assert metrics(jobs.signalled) == metrics(jobs.straight)


def test_a_job_that_loses_a_node_queues_again_and_learns_the_same(slurm: Cluster, jobs: Jobs) -> None:
    fields = slurm.fields(jobs.numbers["lost"])
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log_of(jobs.lost)
    assert f"continuing {jobs.lost} after step 5 " in log_of(jobs.lost)
    assert metrics(jobs.lost) == metrics(jobs.straight)


def test_an_array_trains_every_recipe_in_a_directory_of_its_own(jobs: Jobs) -> None:
    masks = [json.loads((run / "mask.json").read_text())["boundary"] for run in jobs.sweep]
    assert masks == [5, 3]
    for index, run in enumerate(jobs.sweep):
        assert len(metrics(run)) == 4
        assert f"_{index}.log" in next((run / "slurm").glob("job-*.log")).name


def test_a_directory_belongs_to_its_job_while_it_is_in_the_queue(jobs: Jobs) -> None:
    assert jobs.holder == f"SLURM job {jobs.numbers['signalled']} (RUNNING)"
    assert queued_job(jobs.signalled) is None


def test_sinfo_tells_the_partitions(slurm: Cluster) -> None:
    found = {partition.name: partition for partition in read_partitions()}
    assert set(found) == {"main", "spare"}
    assert (found["main"].is_default, found["spare"].is_default) == (True, False)
    assert (found["main"].count_nodes(gpus=2, cpus=16), found["main"].count_nodes(gpus=3, cpus=1)) == (2, 0)
    assert (found["main"].limit, found["spare"].limit) == ("1:00:00", "10:00")


def test_ranks_of_a_bare_srun_find_each_other(slurm: Cluster) -> None:
    code = (
        "from toolkit.commands.cli import exit_process; from toolkit.runtime import distributed; "
        "world = distributed.join_process_group(); "
        "print(world.rank, world.local_rank, world.size, int(world.sum(1)[0])); exit_process(0)"
    )
    printed = slurm.call("srun", "--nodes=2", "--ntasks-per-node=1", f"--chdir={ROOT}", sys.executable, "-c", code)
    assert sorted(printed.splitlines()) == ["0 0 2 2", "1 0 2 2"]


@pytest.mark.usefixtures("slurm")
def test_what_sbatch_refuses_is_told_in_its_own_words(tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n#SBATCH --licenses=no_such_licence\n")
    with pytest.raises(SlurmError, match=r"sbatch failed with exit code 1 and said:\n.*Invalid license"):
        sbatch(script)
