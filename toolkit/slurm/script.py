"""Render the sbatch script of a job, as plain bash that a user can read, edit and submit again."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from toolkit.runtime.errors import ConfigError
from toolkit.runtime.printable import has_controls
from toolkit.runtime.redact import find_secrets
from toolkit.slurm.request import JobRequest

DEEPSPEED_NAME = "deepspeed.json"
JOB_FOLDER = "slurm"
"""Folder of a run directory that holds the job's script, DeepSpeed file and logs."""

_FORWARDED_PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_")
_FORWARDED_VARIABLES = ("FROSTLINE_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE")
"""Environment variables of the submission that the script exports, besides those with a forwarded prefix."""


@dataclass(frozen=True)
class BatchJob:
    """All that the sbatch script of a job, or an array of jobs, depends on."""

    request: JobRequest
    runs: tuple[Path, ...]
    """Absolute run directories; more than one make an array."""
    deepspeed_config: Path | None
    """DeepSpeed JSON, which is copied into each run directory; None trains with torch alone."""
    train_script: Path | None
    """``launch/train.py`` of the checkout; None runs the installed package as a module."""
    working_directory: Path
    """Directory in which the job runs; relative paths of the recipe start there."""
    submit_variables: Mapping[str, str]
    """Environment variables of the submitting process, some of which are forwarded to the job."""

    @property
    def is_array(self) -> bool:
        """True for several runs, which are submitted as one array."""
        return len(self.runs) > 1

    @property
    def script_path(self) -> Path:
        """Path of the saved script, in the first run directory."""
        return self.runs[0] / JOB_FOLDER / "job.sh"


def log_path(job: BatchJob, job_id: str, index: int) -> Path:
    """Return the log file of run ``index`` of a submitted job."""
    name = f"{job_id}_{index}" if job.is_array else job_id
    return job.runs[index] / JOB_FOLDER / f"job-{name}.log"


def render(job: BatchJob) -> str:
    """Render the text of the sbatch script.

    One srun task is one rank. ``--signal`` without ``B:`` signals every rank, not only the batch shell. The ranks then
    commit a checkpoint and exit with code 75, and the script requeues the job under the same id.

    Raises:
        ConfigError: a forwarded environment variable holds a secret, or anything of the job a control character.
    """
    blocks = [
        _join(_sbatch_lines(job)),
        _join(_environment_lines(job)),
        _RENDEZVOUS_LINES,
        _join(_srun_lines(job)),
        _REQUEUE_LINES,
    ]
    return "\n\n".join(blocks) + "\n"


def _join(lines: Iterable[str]) -> str:
    """Join the lines of a block.

    Raises:
        ConfigError: one holds a control character, such as a line break, after which the shell reads a new line.
    """
    lines = list(lines)
    if faults := [f"{line[:300]!r} would be a line of the job's script" for line in lines if has_controls(line)]:
        advice = "no path, flag or variable of a job may hold a line break, tab or other control character; rename it"
        raise ConfigError([f"{fault}: {advice}" for fault in faults], "request")
    return "\n".join(lines)


def _sbatch_lines(job: BatchJob) -> Iterator[str]:
    """Yield the first lines of the script and those of ``#SBATCH``."""
    request = job.request
    yield "#!/bin/bash"
    yield f"# {request.summary()}. Written by launch/submit.py; sbatch takes it as it is."
    folder = job.runs[0] / JOB_FOLDER
    options: list[tuple[str, object]] = [
        ("job-name", re.sub(r"[^\w.-]", "-", job.runs[0].name)),
        ("nodes", request.nodes),
        ("ntasks-per-node", request.ranks_per_node),
        ("gpus-per-node", request.gpus_per_node),
        ("cpus-per-task", request.cpus_per_task),
        ("partition", request.partition),
        ("account", request.account),
        ("time", request.time),
        ("array", f"0-{len(job.runs) - 1}" if job.is_array else None),
        ("chdir", job.working_directory),
        ("output", str(folder).replace("%", "%%") + ("/array-%A_%a.log" if job.is_array else "/job-%j.log")),
    ]
    yield from (f"#SBATCH --{option}={shlex.quote(str(value))}" for option, value in options if value is not None)
    yield from (f"#SBATCH {option}" for option in request.options)
    yield "# a lost node, and a run that stops before its time limit, start the same job again"
    yield "#SBATCH --requeue"
    yield "#SBATCH --open-mode=append"
    yield f"#SBATCH --signal=USR1@{request.signal_before}"


def _environment_lines(job: BatchJob) -> Iterator[str]:
    """Yield the lines that set ``run``, source the environment and export variables.

    Raises:
        ConfigError: a forwarded variable holds a secret.
    """
    request = job.request
    if job.is_array:
        yield "runs=("
        yield from (f"  {shlex.quote(str(run))}" for run in job.runs)
        yield ")"
        yield "run=${runs[$SLURM_ARRAY_TASK_ID]}"
        yield f'exec >>"$run/{JOB_FOLDER}/job-${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID.log" 2>&1'
    else:
        yield f"run={shlex.quote(str(job.runs[0]))}"
    if request.sourced_environment is not None:
        path = request.sourced_environment
        source = path if path.is_file() else path / "bin" / "activate"
        yield f"source {shlex.quote(str(source))} || exit 1"
    if request.cpus_per_task and "OMP_NUM_THREADS" not in job.submit_variables:
        yield f"export OMP_NUM_THREADS={request.cpus_per_task}"
    for name in sorted(job.submit_variables):
        if name.startswith(_FORWARDED_PREFIXES) or name in _FORWARDED_VARIABLES:
            if find_secrets(job.submit_variables[name], job.submit_variables):
                raise ConfigError(
                    [f"{name} holds a password or token, and the script would show it; unset it"], "environment"
                )
            yield f"export {name}={shlex.quote(job.submit_variables[name])}"


def _srun_lines(job: BatchJob) -> Iterator[str]:
    """Yield the lines that start one rank per task with srun, and keep the exit code in ``code``."""
    request = job.request
    python = "python" if request.sourced_environment or request.container else shlex.quote(sys.executable)
    srun = ["srun", "--wait=30"]
    if request.cpus_per_task:
        srun.append(f"--cpus-per-task={request.cpus_per_task}")
    if request.container:
        srun.append(request.container)
    arguments = ['--config "$run/config.yaml"']
    if job.deepspeed_config:
        arguments.append(f'--ds "$run/{JOB_FOLDER}/{DEEPSPEED_NAME}"')
    yield 'echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date)"'
    yield "# one task is one rank; 30 s after a first one ended, those that still run are ended too"
    yield " ".join(srun) + " \\"
    train = shlex.quote(str(job.train_script)) if job.train_script else "-m toolkit.commands.train"
    yield f"  {python} {train} {' '.join(arguments)}"
    yield "code=$?"


_RENDEZVOUS_LINES = r"""
# srun gives each task its rank; with those of the submitting shell every task would train alone
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_PORT
# the ranks meet on the first node, by the address that SLURM reaches it by; each rank works out the port
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed 's/.* NodeAddr=\([^ ]*\).*/\1/')
""".strip()

_REQUEUE_LINES = """\
# 75: a signal stopped the run after a committed checkpoint; the job queues again and goes on from there
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID" || echo "this cluster does not requeue the job: submit it again to go on"
fi
exit "$code\""""
