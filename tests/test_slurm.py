"""What launch/submit.py asks, refuses and writes; no cluster needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ENGLISH, ROOT, clean_environment, run_here, tiny_flags

from launch import submit
from toolkit.checkpoint.run_directory import claim
from toolkit.config import flags as config_flags
from toolkit.config.schema import OutputConfig, RunConfig
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import CheckpointError, ConfigError, UsageError
from toolkit.slurm.cluster import NodeKind, Partition, check
from toolkit.slurm.request import JobRequest, add_flags, read_request, time_in_seconds
from toolkit.slurm.script import BatchJob, render
from toolkit.training.preflight import preflight


def request(*words: str) -> JobRequest:
    parser = config_flags.create_parser("test")
    add_flags(parser)
    return read_request(parser.parse_args(words))


def script(*words: str, runs: tuple[Path, ...] = (Path("/data/runs/x"),), **environ: str) -> str:
    return render(
        BatchJob(request(*words), runs, Path("zero2.json"), Path("/code/launch/train.py"), Path("/code"), environ)
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 1800), ("30:15", 1815), ("04:00:00", 14400), ("1-12", 129600), ("1-12:30", 131400),
        ("2-00:00:05", 172805), ("four hours", None), ("4h", None), ("1:2:3:4", None), ("", None),
    ],
)  # fmt: skip
def test_times_are_read_as_slurm_reads_them(text: str, expected: int | None) -> None:
    assert time_in_seconds(text) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--nodes", "5", "--gpus", "12"), r"--gpus is 12, which cannot be divided among 5 nodes; .* multiple of 5"),
        (("--gpus", "8", "--gpus-per-node", "8"), "give one of them"),
        (
            ("--gpus-per-node", "8", "--ranks-per-node", "3"),
            r"--ranks-per-node is 3 with 8 GPUs on each node; one rank",
        ),
        (("--time", "4h"), r"--time is '4h'; expected minutes \(30\)"),
        (("--time", "0"), "--time is '0'; expected"),
        (("--time", "2"), r"--signal-before is 120 s and --time 2 is 120 s; .*give it more than 180 s"),
        (("--environment", "no/venv"), "--environment is no/venv; expected a virtual environment or a shell file"),
        (("--sbatch=-q high",), "--sbatch is '-q high'; expected a long option"),
        (("--sbatch=--signal=TERM@5",), "--signal is written by submit.py itself"),
    ],
)
def test_requests_that_make_no_sense_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        request(*words)


def test_all_faults_of_a_request_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        request("--nodes", "3", "--gpus", "8", "--time", "soon", "--environment", "nowhere")
    assert len(caught.value.faults) == 3


CLUSTER = [
    Partition("cpu", True, "infinite", (NodeKind(10, 0, 64),)),
    Partition("gpu", False, "1-00:00:00", (NodeKind(3, 4, 32), NodeKind(1, 8, 64))),
]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--partition", "gpus"), r"--partition is gpus, which this cluster does not have; it has cpu: 10 x \(64 CPUs"),
        (("--nodes", "11"), r"--nodes is 11 with 1 CPUs each; 10 node\(s\) can give that"),
        (("--partition", "gpu", "--nodes", "2", "--gpus-per-node", "8"), r"8 CPUs and 8 GPUs each; 1 node\(s\)"),
        (("--gpus-per-node", "1"), r"1 GPUs each; 0 node\(s\) can give that \(cpu: 10 x"),
        (("--ranks-per-node", "8", "--cpus-per-task", "16"), r"with 128 CPUs each; 0 node\(s\)"),
        (("--partition", "gpu", "--time", "2-0"), "--time is 2-0; partition gpu allows 1-00:00:00 at most"),
    ],
)
def test_what_the_cluster_cannot_give_is_refused_before_it_queues(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(request(*words), CLUSTER)


def test_what_the_cluster_can_give_passes() -> None:
    check(request("--nodes", "10", "--ranks-per-node", "4", "--cpus-per-task", "16", "--time", "30-0"), CLUSTER)
    check(request("--partition", "gpu", "--nodes", "4", "--gpus", "16", "--time", "1-0"), CLUSTER)


def test_without_a_default_partition_one_must_be_named() -> None:
    with pytest.raises(ConfigError, match="no default partition; choose one with --partition: gpu: 3 x"):
        check(request(), CLUSTER[1:])


def test_the_script_asks_for_one_task_a_rank_and_a_signal_before_the_limit() -> None:
    text = script(
        "--nodes", "2", "--gpus-per-node", "8", "--cpus-per-task", "6", "--partition", "gpu", "--account", "me",
        "--time", "04:00:00", "--signal-before", "300", "--sbatch=--qos=high",
    )  # fmt: skip
    directives = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert directives == {
        "--job-name=x", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=6",
        "--partition=gpu", "--account=me", "--time=04:00:00", "--chdir=/code", "--qos=high", "--requeue",
        "--output=/data/runs/x/slurm/job-%j.log", "--open-mode=append", "--signal=USR1@300",
    }  # fmt: skip
    assert "srun --wait=30 --cpus-per-task=6 \\\n" in text  # srun does not take it from sbatch
    assert 'train.py --config "$run/config.yaml" --ds "$run/slurm/deepspeed.json"\n' in text
    assert "export OMP_NUM_THREADS=6" in text


def test_nccl_settings_and_caches_are_carried_over_and_tokens_are_not() -> None:
    text = script(NCCL_SOCKET_IFNAME="ib0,eth 1", FROSTLINE_CACHE="/data/cache", HF_TOKEN="secret", RANK="3")
    assert "export NCCL_SOCKET_IFNAME='ib0,eth 1'" in text
    assert "export FROSTLINE_CACHE=/data/cache" in text
    assert "secret" not in text
    assert "export RANK" not in text
    assert "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_PORT\n" in text
    assert "MASTER_PORT=" not in text, "every rank works it out from job and step"


def test_environment_and_container_come_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").touch()
    text = script("--environment", str(tmp_path), "--container", "apptainer exec --nv image.sif")
    assert f"source {tmp_path}/bin/activate || exit 1" in text
    assert "srun --wait=30 apptainer exec --nv image.sif \\\n  python /code/launch/train.py" in text
    text = script("--environment", str(tmp_path / "bin" / "activate"), "--container=--container-image=frostline")
    assert "srun --wait=30 --container-image=frostline \\\n  python " in text


@pytest.mark.parametrize("runs", [(Path("/data/my runs/50%"),), (Path("/data/a"), Path("/data/it's"))])
def test_the_script_is_valid_bash_whatever_the_paths(runs: tuple[Path, ...], tmp_path: Path) -> None:
    text = script(runs=runs)
    path = tmp_path / "job.sh"
    path.write_text(text)
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False).stderr == ""
    assert "50%%" in text or "%A_%a" in text


def test_a_dry_run_prints_the_script_and_writes_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "tiny"
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", ["submit.py", *tiny_flags(tiny_model, run), "--nodes", "2", "--dry-run"])
    assert submit.main() == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("#!/bin/bash\n# 2 node(s) x 1 CPU rank(s)")
    assert "not compared with a cluster: there is no sbatch on this machine" in printed.err
    assert not run.parent.exists()


def test_without_sbatch_the_message_says_where_to_go() -> None:
    command = [sys.executable, str(ROOT / "launch" / "submit.py")]
    environ = {**clean_environment(), "PATH": "/nowhere"}
    result = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: there is no sbatch on this machine; run this on a login node")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--mask.train", "last:9"), "last:9"),
        (("--data.path", "missing.jsonl"), "missing.jsonl: no such file"),
        (("--model.name_or_path", "nowhere/at/all"), "nowhere/at/all"),
        (("--data.max_length", "16"), "rows cannot be used"),
        (("--mask.tied", "error"), "share one tensor"),
    ],
)
def test_what_the_run_would_refuse_is_refused_at_submission(
    tiny_model: Path, tmp_path: Path, changes: tuple[str, ...], message: str
) -> None:
    words = [*tiny_flags(tiny_model, tmp_path / "run"), *changes]
    invocation = config_flags.parse(config_flags.create_parser("test"), ROOT / "recipes" / "quickstart.yaml", words)
    with pytest.raises(UsageError, match=message):
        preflight(invocation, ranks=2)


def test_a_deepspeed_file_that_contradicts_the_number_of_ranks_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    ds = tmp_path / "ds.json"
    ds.write_text('{"train_batch_size": 4, "zero_optimization": {"stage": 2}}')
    words = [*tiny_flags(tiny_model, tmp_path / "run"), "--ds", str(ds)]
    invocation = config_flags.parse(config_flags.create_parser("test"), ROOT / "recipes" / "quickstart.yaml", words)
    preflight(invocation, ranks=4)
    with pytest.raises(ConfigError, match="train_batch_size is 4, the recipe's micro batch x accumulation x 2 ranks"):
        preflight(invocation, ranks=2)


def test_a_directory_that_a_job_holds_is_not_given_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def held_by(path: Path) -> str | None:
        return "SLURM job 7 (PENDING)" if path.name == "x" else None

    with claim(RunConfig(), Path("x.yaml"), World(), held_by) as chosen:
        assert chosen.path == Path("runs/x-2")
    named = RunConfig(output=OutputConfig(dir="runs/x"))
    with (
        pytest.raises(CheckpointError, match=r"runs/x belongs to SLURM job 7 \(PENDING\); wait for it, cancel it"),
        claim(named, Path("x.yaml"), World(), held_by),
    ):
        pass


def test_runs_of_an_array_cannot_share_a_directory(tmp_path: Path) -> None:
    recipes = [tmp_path / name for name in ("a.yaml", "b.yaml")]
    for recipe in recipes:
        recipe.write_text(f"data: {{path: {ENGLISH}}}\n")
    result = run_here("launch/submit.py", "--array", *recipes, "--output.dir", tmp_path / "run")
    assert result.returncode == 2
    assert f"{tmp_path}/run: several runs of --array would be written there" in result.stderr
    result = run_here("launch/submit.py", "--array", *recipes, "--config", recipes[0])
    assert "--array names all recipes" in result.stderr
