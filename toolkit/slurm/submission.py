"""Write a job's files into its run directories, submit it, and describe how to watch it."""

from __future__ import annotations

from pathlib import Path

from toolkit.runtime.errors import SlurmError
from toolkit.runtime.own_files import is_real_directory
from toolkit.runtime.paths import replace_bytes, replace_text
from toolkit.slurm import cluster
from toolkit.slurm.script import DEEPSPEED_NAME, JOB_FOLDER, BatchJob, log_path, render

_JOB_ID_NAME = "job-id"
"""File in ``JOB_FOLDER`` that holds the id of the run's last job."""


def queued_job(run: Path) -> str | None:
    """Describe the queued or running job of a run directory; None if it has none.

    Raises:
        SlurmError: squeue cannot reach the cluster.
    """
    record = run / JOB_FOLDER / _JOB_ID_NAME
    if not record.is_file():
        return None
    job_id = record.read_text(encoding="utf-8").strip()
    state = cluster.job_state(job_id)
    return f"SLURM job {job_id} ({state})" if state else None


def submit(job: BatchJob) -> str:
    """Write script and DeepSpeed file into the run directories, submit the script, and return the job id.

    The job reads the copy of the DeepSpeed file, so the original may change while it is queued. The run directories
    must exist and hold their ``config.yaml``.

    Raises:
        SlurmError: sbatch refuses the job; the message quotes its output.
    """
    for run in job.runs:
        (run / JOB_FOLDER).mkdir(exist_ok=True)
        if not is_real_directory(run / JOB_FOLDER):
            raise SlurmError(f"{run / JOB_FOLDER} is a symbolic link, which is not followed; remove it")
        if job.deepspeed_config is not None:
            replace_bytes(run / JOB_FOLDER / DEEPSPEED_NAME, job.deepspeed_config.read_bytes())
    replace_text(job.script_path, render(job))
    job_id = cluster.sbatch(job.script_path)
    for index, run in enumerate(job.runs):
        replace_text(run / JOB_FOLDER / _JOB_ID_NAME, f"{job_id}_{index}" if job.is_array else job_id)
    return job_id


def how_to_watch(job: BatchJob, job_id: str) -> str:
    """Return the message after submission: the commands that watch, checkpoint and stop the job."""
    lines = [f"submitted job {job_id}: {job.request.summary()}, script {job.script_path}"]
    for index, run in enumerate(job.runs):
        lines += [f"run     {run}", f"log     tail -F {log_path(job, job_id, index)}"]
    lines += [
        f"queue   squeue --job {job_id}",
        f"curves  tensorboard --logdir {job.runs[0].parent}",
        f"save    scancel --signal=USR1 {job_id}    (checkpoint now, and queue again)",
        f"stop    scancel {job_id}",
    ]
    return "\n".join(lines)
