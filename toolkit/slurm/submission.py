"""Save a job beside its runs, submit it, and say how to watch it."""

from __future__ import annotations

import shutil
from pathlib import Path

from toolkit.runtime.paths import replace_text
from toolkit.slurm import cluster
from toolkit.slurm.script import DEEPSPEED, FOLDER, BatchJob, log_of, render

_NUMBER = "job-id"


def held_by(run: Path) -> str | None:
    """Describe the job in the queue that a run directory belongs to; None where there is none.

    Raises:
        SlurmError: squeue cannot reach the cluster.
    """
    record = run / FOLDER / _NUMBER
    if not record.is_file():
        return None
    number = record.read_text(encoding="utf-8").strip()
    state = cluster.active(number)
    return f"SLURM job {number} ({state})" if state else None


def submit(job: BatchJob) -> str:
    """Write script and DeepSpeed file into the run directories and hand the script to sbatch.

    The job reads the copy of the DeepSpeed file, whatever becomes of the original while it waits. The run directories
    exist and hold their ``config.yaml``.

    Raises:
        SlurmError: sbatch refuses the job; with sbatch's own words.
    """
    for run in job.runs:
        (run / FOLDER).mkdir(exist_ok=True)
        if job.ds is not None:
            shutil.copyfile(job.ds, run / FOLDER / DEEPSPEED)
    replace_text(job.path, render(job))
    number = cluster.sbatch(job.path)
    for index, run in enumerate(job.runs):
        replace_text(run / FOLDER / _NUMBER, f"{number}_{index}" if job.is_array else number)
    return number


def how_to_watch(job: BatchJob, number: str) -> str:
    """Return the commands that watch, save and stop the job."""
    lines = [f"submitted job {number}: {job.request.summary()}, script {job.path}"]
    for index, run in enumerate(job.runs):
        lines += [f"run     {run}", f"log     tail -F {log_of(job, number, index)}"]
    lines += [
        f"queue   squeue --job {number}",
        f"curves  tensorboard --logdir {job.runs[0].parent}",
        f"save    scancel --signal=USR1 {number}    (checkpoint now, and queue again)",
        f"stop    scancel {number}",
    ]
    return "\n".join(lines)
