"""Train as a SLURM job: check everything, write an sbatch script into the run directory, submit it.

    python launch/submit.py --config recipes/quickstart.yaml --ds ds_configs/zero2.json --nodes 2 --gpus-per-node 8
    python launch/submit.py --nodes 2 --ranks-per-node 4 --cpus-per-task 8 --time 04:00:00 --dry-run
    python launch/submit.py --array recipes/a.yaml recipes/b.yaml --gpus-per-node 1

Takes every flag of launch/train.py. Recipe, mask, data and request are checked here, before the job waits in a queue.
The job checkpoints before its time limit and queues again until the run is finished.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.commands.cli import verb_parser
from toolkit.runtime.errors import CheckpointError, ConfigError, SlurmError
from toolkit.runtime.printable import printable
from toolkit.runtime.shipped import QUICKSTART, launch_script, shipped_file

if TYPE_CHECKING:
    from toolkit.config.flags import Invocation
    from toolkit.slurm.request import JobRequest


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, check the job, write its files and submit it; return the exit code."""
    invocations = _parse(words, program)
    arguments = invocations[0].arguments
    from toolkit.slurm.request import read_request

    submit_runs(invocations, read_request(arguments), arguments.dry_run)
    return 0


def submit_runs(invocations: Sequence[Invocation], request: JobRequest, dry_run: bool) -> str:
    """Check runs, write their files and submit them as one job, or as an array; return the job id.

    With ``dry_run`` the script is printed, nothing is written or submitted, and the id is empty.

    Raises:
        UsageError: a run or the request is at fault, or a run is finished, in use or queued.
    """
    from toolkit.slurm import submission
    from toolkit.slurm.script import BatchJob, render

    _check_cluster(request, dry_run)
    from toolkit.checkpoint.run_directory import claim, write_config
    from toolkit.runtime.distributed import World  # these import torch, which invalid flags need not wait for
    from toolkit.training.preflight import preflight

    with contextlib.ExitStack() as claims:
        runs = []
        for invocation in invocations:
            preflight(invocation, request.ranks)
            run_claim = claim(
                invocation.config, invocation.recipe, World(), submission.queued_job, not dry_run, request.ranks
            )
            runs.append(claims.enter_context(run_claim))
        if finished := [str(run.path) for run in runs if run.finished]:
            raise CheckpointError(
                f"{', '.join(finished)}: finished already, nothing to train; choose another --output.dir"
            )
        directories = tuple(run.path.resolve() for run in runs)
        deepspeed = invocations[0].deepspeed
        job = BatchJob(request, directories, deepspeed, launch_script("train"), Path.cwd(), os.environ)
        script = render(job)  # refused before anything is written
        if dry_run:
            print(script, end="")
            return ""
        for invocation, run in zip(invocations, runs, strict=True):
            # a requeued job starts several times
            output = invocation.config.output.model_copy(update={"resume": "auto"})
            write_config(run.path, invocation.config.model_copy(update={"output": output}))
        job_id = submission.submit(job)
    print(submission.how_to_watch(job, job_id))
    return job_id


def _parse(words: Sequence[str] | None, program: str | None) -> list[Invocation]:
    """Parse the command line into one invocation, or one per recipe of ``--array``."""
    from toolkit.config import flags
    from toolkit.slurm.request import add_flags

    def parse(recipe: Path) -> Invocation:
        parser = verb_parser(__doc__, program)
        add_flags(parser)
        parser.add_argument(
            "--array", nargs="+", metavar="RECIPE", help="one run for each recipe, as one array of jobs"
        )
        return flags.parse(parser, recipe, words)

    first = parse(shipped_file(QUICKSTART))
    recipes = [Path(recipe) for recipe in first.arguments.array or ()]
    if not recipes:
        return [first]
    if first.recipe_was_given:
        raise ConfigError([f"--config {first.recipe} and --array: --array names all recipes"], "command line")
    invocations = [parse(recipe) for recipe in recipes]
    directories = Counter(invocation.config.output.dir or invocation.recipe.stem for invocation in invocations)
    if shared := [name for name, count in directories.items() if count > 1]:
        advice = "several runs of --array would be written there; set output.dir in each recipe, not by a flag"
        raise ConfigError([f"{name}: {advice}" for name in shared], "command line")
    return invocations


def _check_cluster(request: JobRequest, dry_run: bool) -> None:
    """Refuse a request that the cluster cannot serve; a dry run without a cluster prints that it was not checked."""
    from toolkit.slurm import cluster

    try:
        partitions = cluster.read_partitions()
    except SlurmError as error:
        if not dry_run:
            raise
        print(f"not compared with a cluster: {printable(str(error))}", file=sys.stderr)
    else:
        cluster.check(request, partitions)
