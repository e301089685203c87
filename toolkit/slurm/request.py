"""The job flags of ``launch/submit.py``: parse them and check them together."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from toolkit.config.flags import positive_int
from toolkit.runtime.errors import ConfigError
from toolkit.runtime.redact import find_secrets

_EARLY_SIGNAL_SECONDS = 60
"""SLURM may send the signal before the limit this many seconds early (man sbatch, ``--signal``)."""

_RESERVED_OPTIONS = (
    "--array", "--chdir", "--cpus-per-task", "--gpus", "--gpus-per-node", "--job-name", "--nodes", "--no-requeue",
    "--ntasks", "--ntasks-per-node", "--open-mode", "--output", "--requeue", "--signal", "--time", "--partition",
    "--account", "--export",
)  # fmt: skip
"""Options of sbatch that the script sets itself, so that ``--sbatch`` may not repeat them."""


@dataclass(frozen=True)
class JobRequest:
    """Resources that one job, or each task of an array, requests from the cluster."""

    nodes: int
    ranks_per_node: int
    """Equals ``gpus_per_node`` if that is given."""
    gpus_per_node: int | None
    """None trains on CPUs."""
    cpus_per_task: int | None
    """CPU cores of each rank; None takes the cluster's default."""
    partition: str | None
    """None takes the cluster's default."""
    account: str | None
    """Account to charge; None takes the user's default."""
    time: str | None
    """Time limit in SLURM's notation; None takes the partition's."""
    signal_before: int
    """Seconds between the signal that asks for a checkpoint and the time limit."""
    sourced_environment: Path | None
    """Virtual environment or shell file that the job sources first."""
    container: str | None
    """Command to put between srun and python."""
    options: tuple[str, ...]
    """Further options of sbatch, verbatim."""

    @property
    def ranks(self) -> int:
        """World size."""
        return self.nodes * self.ranks_per_node

    def summary(self) -> str:
        """Describe nodes and ranks, as ``2 node(s) x 8 GPU(s)``."""
        rank_kind = "GPU" if self.gpus_per_node else "CPU rank"
        return f"{self.nodes} node(s) x {self.ranks_per_node} {rank_kind}(s)"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that describe a job, beside those of the recipe."""
    job = parser.add_argument_group("job", "What the job asks of the cluster.")
    job.add_argument("--nodes", type=positive_int, default=1, help="nodes; default: 1")
    job.add_argument(
        "--gpus-per-node", type=positive_int, help="GPUs of each node, one rank a GPU; without it CPUs train"
    )
    job.add_argument("--gpus", type=positive_int, help="GPUs of all nodes together, in place of --gpus-per-node")
    job.add_argument("--ranks-per-node", type=positive_int, help="ranks of each node on CPUs; default: 1")
    job.add_argument("--cpus-per-task", type=positive_int, help="CPU cores of each rank; default: the cluster's")
    job.add_argument("--partition", metavar="NAME", help="partition; default: the cluster's")
    job.add_argument("--account", metavar="NAME", help="account that is charged")
    job.add_argument("--time", help="time limit, as 30 (minutes), 04:00:00 or 1-12; default: the partition's")
    job.add_argument(
        "--signal-before", type=positive_int, default=120, metavar="SECONDS",
        help="signal the ranks this long before the limit: they commit a checkpoint and the job queues again; it "
        "must cover one step and one checkpoint; default: 120",
    )  # fmt: skip
    job.add_argument("--environment", metavar="PATH", help="virtual environment or shell file that the job sources")
    job.add_argument(
        "--container", metavar="COMMAND",
        help="what to put between srun and python, as 'apptainer exec --nv image.sif' or =--container-image=image",
    )  # fmt: skip
    job.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="a further option of sbatch, as =--qos=high"
    )
    job.add_argument("--dry-run", action="store_true", help="print the script, write and submit nothing")


def read_request(args: argparse.Namespace) -> JobRequest:
    """Build a request from parsed flags.

    Raises:
        ConfigError: flags are invalid or contradict each other; the message lists all faults.
    """
    if faults := [*_gpu_faults(args), *_time_faults(args), *_script_faults(args)]:
        raise ConfigError(faults, "command line")
    gpus = args.gpus_per_node or (args.gpus // args.nodes if args.gpus else None)
    return JobRequest(
        nodes=args.nodes,
        ranks_per_node=gpus or args.ranks_per_node or 1,
        gpus_per_node=gpus,
        cpus_per_task=args.cpus_per_task,
        partition=args.partition,
        account=args.account,
        time=args.time,
        signal_before=args.signal_before,
        sourced_environment=Path(args.environment).resolve() if args.environment else None,
        container=args.container,
        options=tuple(args.sbatch),
    )


def time_in_seconds(time: str) -> int | None:
    """Return a SLURM time in seconds; None if it has none of the forms M, M:S, H:M:S, D-H, D-H:M and D-H:M:S."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:
        numbers.insert(0, 0)  # hours
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _gpu_faults(args: argparse.Namespace) -> Iterator[str]:
    """Yield faults of ``--gpus``, ``--gpus-per-node`` and ``--ranks-per-node``."""
    if args.gpus and args.gpus_per_node:
        yield f"--gpus {args.gpus} and --gpus-per-node {args.gpus_per_node}: give one of them"
        return
    if args.gpus and args.gpus % args.nodes:
        yield (
            f"--gpus is {args.gpus}, which cannot be divided among {args.nodes} nodes; expected a multiple of "
            f"{args.nodes}, or --gpus-per-node"
        )
        return
    gpus = args.gpus_per_node or (args.gpus or 0) // args.nodes
    if gpus and args.ranks_per_node not in (None, gpus):
        yield (
            f"--ranks-per-node is {args.ranks_per_node} with {gpus} GPUs on each node; one rank drives one GPU: "
            "leave --ranks-per-node out"
        )


def _time_faults(args: argparse.Namespace) -> Iterator[str]:
    """Yield faults of ``--time`` and ``--signal-before``."""
    if args.time is None:
        return
    limit = time_in_seconds(args.time)
    if not limit:
        yield f"--time is {args.time!r}; expected minutes (30), hours:minutes:seconds (04:00:00) or days-hours (1-12)"
    elif limit <= args.signal_before + _EARLY_SIGNAL_SECONDS:
        yield (
            f"--signal-before is {args.signal_before} s and --time {args.time} is {limit} s; SLURM may signal "
            f"{_EARLY_SIGNAL_SECONDS} s early, so the job would stop as soon as it starts: give it more than "
            f"{args.signal_before + _EARLY_SIGNAL_SECONDS} s, or signal later"
        )


def _script_faults(args: argparse.Namespace) -> Iterator[str]:
    """Yield faults of ``--environment`` and ``--sbatch``, and secrets in flags that the script would show."""
    if args.environment:
        path = Path(args.environment)
        if not path.is_file() and not (path / "bin" / "activate").is_file():
            yield f"--environment is {args.environment}; expected a virtual environment or a shell file to source"
    flags = {
        "--sbatch": args.sbatch,
        "--container": args.container or "",
        "--account": args.account or "",
    }
    for flag in find_secrets(flags):
        yield (
            f"{flag} holds a password or token, which the job's script would show; set it in the environment "
            "instead, which the job inherits"
        )
    for option in args.sbatch:
        name = option.split("=")[0].split()[0] if option.strip() else option
        if not name.startswith("--"):
            yield f"--sbatch is {option!r}; expected a long option, as in --sbatch=--qos=high"
        elif name in _RESERVED_OPTIONS:
            yield f"--sbatch={option}: {name} is written by submit.py itself; use its own flags"
