"""Render the sbatch script of a job: plain bash that a person can read, change and submit again."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from toolkit.runtime.errors import ConfigError
from toolkit.runtime.redact import find_secret
from toolkit.slurm.request import JobRequest

SCRIPT = "job.sh"
DEEPSPEED = "deepspeed.json"
FOLDER = "slurm"
"""Folder of a run directory with script, DeepSpeed file and logs."""

_CARRIED_PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_")
_CARRIED = ("FROSTLINE_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE")


@dataclass(frozen=True)
class BatchJob:
    """Hold what a script needs: the request, the runs, and where they start."""

    request: JobRequest
    runs: tuple[Path, ...]
    """Run directories, absolute; more than one make an array."""
    ds: Path | None
    """DeepSpeed file, of which each run gets a copy; None trains with torch alone."""
    train: Path | None
    """``launch/train.py`` of the checkout; None runs the installed package as a module."""
    directory: Path
    """Where the job runs; relative paths of the recipe start there."""
    environ: Mapping[str, str]
    """The environment of the submission, of which the cluster settings are carried over."""

    @property
    def is_array(self) -> bool:
        """Return True for a sweep."""
        return len(self.runs) > 1

    @property
    def path(self) -> Path:
        """Return where the script is saved."""
        return self.runs[0] / FOLDER / SCRIPT


def log_of(job: BatchJob, number: str, index: int) -> Path:
    """Return the log of run ``index`` once SLURM has given the job its number."""
    name = f"{number}_{index}" if job.is_array else number
    return job.runs[index] / FOLDER / f"job-{name}.log"


def render(job: BatchJob) -> str:
    """Render the script's text.

    One srun task is one rank. ``--signal`` without ``B:`` reaches every rank, which is what the training listens
    to; exit code 75 says that they committed a checkpoint, and the job goes back into the queue under its number.

    Raises:
        ConfigError: a variable that the script carries over holds a secret.
    """
    blocks = [
        "\n".join(["#!/bin/bash", _title(job), *_directives(job)]),
        "\n".join(_environment(job)),
        "\n".join(_meeting_point()),
        "\n".join(_run(job)),
        _REQUEUE,
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _title(job: BatchJob) -> str:
    return f"# {job.request.summary()}. Written by launch/submit.py; sbatch takes it as it is."


def _directives(job: BatchJob) -> Iterator[str]:
    request = job.request
    own = job.runs[0] / FOLDER
    name = re.sub(r"[^\w.-]", "-", job.runs[0].name)
    options: list[tuple[str, object]] = [
        ("job-name", name),
        ("nodes", request.nodes),
        ("ntasks-per-node", request.ranks_per_node),
        ("gpus-per-node", request.gpus_per_node),
        ("cpus-per-task", request.cpus_per_task),
        ("partition", request.partition),
        ("account", request.account),
        ("time", request.time),
        ("array", f"0-{len(job.runs) - 1}" if job.is_array else None),
        ("chdir", job.directory),
        ("output", str(own).replace("%", "%%") + ("/array-%A_%a.log" if job.is_array else "/job-%j.log")),
    ]
    yield from (f"#SBATCH --{option}={shlex.quote(str(value))}" for option, value in options if value is not None)
    yield from (f"#SBATCH {option}" for option in request.options)
    yield "# a lost node, and a run that stops before its time limit, start the same job again"
    yield "#SBATCH --requeue"
    yield "#SBATCH --open-mode=append"
    yield f"#SBATCH --signal=USR1@{request.signal_before}"


def _environment(job: BatchJob) -> Iterator[str]:
    request = job.request
    if job.is_array:
        yield "runs=("
        yield from (f"  {shlex.quote(str(run))}" for run in job.runs)
        yield ")"
        yield "run=${runs[$SLURM_ARRAY_TASK_ID]}"
        yield f'exec >>"$run/{FOLDER}/job-${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID.log" 2>&1'
    else:
        yield f"run={shlex.quote(str(job.runs[0]))}"
    if request.environment is not None:
        path = request.environment
        source = path if path.is_file() else path / "bin" / "activate"
        yield f"source {shlex.quote(str(source))} || exit 1"
    if request.cpus_per_task and "OMP_NUM_THREADS" not in job.environ:
        yield f"export OMP_NUM_THREADS={request.cpus_per_task}"
    for name in sorted(job.environ):
        if name.startswith(_CARRIED_PREFIXES) or name in _CARRIED:
            if find_secret(job.environ[name], job.environ):
                raise ConfigError(
                    [f"{name} holds a password or token, and the script would show it; unset it"], "environment"
                )
            yield f"export {name}={shlex.quote(job.environ[name])}"


def _meeting_point() -> Iterator[str]:
    yield "# srun gives each task its rank; with those of the submitting shell every task would train alone"
    yield "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_PORT"
    yield "# the ranks meet on the first node, by the address that SLURM reaches it by; each rank works out the port"
    yield 'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    yield "export MASTER_ADDR=$(scontrol --oneliner show node \"$first\" | sed 's/.* NodeAddr=\\([^ ]*\\).*/\\1/')"


def _run(job: BatchJob) -> Iterator[str]:
    request = job.request
    python = "python" if request.environment or request.container else shlex.quote(sys.executable)
    srun = ["srun", "--wait=30"]
    if request.cpus_per_task:
        srun.append(f"--cpus-per-task={request.cpus_per_task}")
    if request.container:
        srun.append(request.container)
    arguments = ['--config "$run/config.yaml"']
    if job.ds:
        arguments.append(f'--ds "$run/{FOLDER}/{DEEPSPEED}"')
    yield 'echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date)"'
    yield "# one task is one rank; 30 s after a first one ended, those that still run are ended too"
    yield " ".join(srun) + " \\"
    train = shlex.quote(str(job.train)) if job.train else "-m toolkit.commands.train"
    yield f"  {python} {train} {' '.join(arguments)}"
    yield "code=$?"


_REQUEUE = """\
# 75: a signal stopped the run after a committed checkpoint; the job queues again and goes on from there
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID" || echo "this cluster does not requeue the job: submit it again to go on"
fi
exit "$code\""""
