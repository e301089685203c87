"""Call SLURM's tools: sinfo for partitions, squeue for jobs, sbatch to submit."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from toolkit.runtime.errors import ConfigError, SlurmError
from toolkit.slurm.request import JobRequest, time_in_seconds


@dataclass(frozen=True)
class NodeKind:
    """Nodes of a partition with the same number of GPUs and CPUs."""

    count: int
    gpus: int
    """GPUs of each node."""
    cpus: int
    """CPUs of each node."""


@dataclass(frozen=True)
class Partition:
    """A partition of the cluster, as sinfo describes it."""

    name: str
    is_default: bool
    limit: str
    """Time limit of a job in SLURM's notation, such as ``1-00:00:00`` or ``infinite``."""
    kinds: tuple[NodeKind, ...]

    def count_nodes(self, gpus: int, cpus: int) -> int:
        """Count the nodes with at least ``gpus`` GPUs and ``cpus`` CPUs."""
        return sum(kind.count for kind in self.kinds if kind.gpus >= gpus and kind.cpus >= cpus)

    def describe(self) -> str:
        """Describe the partition's nodes and time limit in one line."""
        kinds = (f"{kind.count} x ({kind.cpus} CPUs, {kind.gpus} GPUs)" for kind in self.kinds)
        return f"{self.name}: {', '.join(kinds)}, time limit {self.limit}"


def read_partitions() -> list[Partition]:
    """Return the partitions that sinfo shows to this user.

    Raises:
        SlurmError: this machine has no SLURM, or sinfo cannot reach the cluster.
    """
    if shutil.which("sbatch") is None:
        raise SlurmError(
            "there is no sbatch on this machine; run this on a login node of the cluster, or look at the script "
            "with --dry-run"
        )
    by_name: dict[str, Partition] = {}
    for line in _run_slurm_tool("sinfo", "--noheader", "--exact", "--format=%P|%D|%l|%G|%c").splitlines():
        label, count, limit, gres, cpus = line.strip().split("|")
        name = label.removesuffix("*")
        # "16+" stands for nodes with 16 CPUs or more; 16 is what each of them has
        kind = NodeKind(int(count), _gpu_count(gres), int(cpus.rstrip("+")))
        kinds = by_name[name].kinds if name in by_name else ()
        by_name[name] = Partition(name, label.endswith("*"), limit, (*kinds, kind))
    return list(by_name.values())


def check(request: JobRequest, partitions: list[Partition]) -> None:
    """Refuse a request that the cluster would reject or never start.

    ``sbatch --test-only`` cannot (SLURM 22.05): by default it accepts a time above the partition's limit, with which a
    job waits for ever; it refuses what a drained node would give later; and of what is offered it says nothing.

    Raises:
        ConfigError: lists all faults, with what the partition offers.
    """
    source = "request, as sinfo describes the cluster"
    if request.partition is None:
        partition = next((partition for partition in partitions if partition.is_default), None)
        fault = "the cluster has no default partition; choose one with --partition:"
    else:
        partition = next((partition for partition in partitions if partition.name == request.partition), None)
        fault = f"--partition is {request.partition}, which this cluster does not have; it has"
    if partition is None:
        raise ConfigError([f"{fault} {'; '.join(known.describe() for known in partitions) or 'none'}"], source)
    faults = []
    gpus, cpus = request.gpus_per_node or 0, request.ranks_per_node * (request.cpus_per_task or 1)
    suitable = partition.count_nodes(gpus, cpus)
    if request.nodes > suitable:
        each = f"{cpus} CPUs and {gpus} GPUs each" if gpus else f"{cpus} CPUs each"
        faults.append(
            f"--nodes is {request.nodes} with {each}; {suitable} node(s) can give that ({partition.describe()})"
        )
    limit, requested = time_in_seconds(partition.limit), time_in_seconds(request.time or "")
    if limit is not None and requested is not None and requested > limit:
        faults.append(f"--time is {request.time}; partition {partition.name} allows {partition.limit} at most")
    if faults:
        raise ConfigError(faults, source)


def job_state(job: str) -> str | None:
    """Return the state of a job (``PENDING``, ``RUNNING`` …) as squeue shows it; None once the job is finished.

    Raises:
        SlurmError: squeue cannot reach the cluster.
    """
    if shutil.which("squeue") is None:
        return None
    try:
        states = _run_slurm_tool("squeue", "--noheader", f"--jobs={job}", "--format=%T").split()
    except SlurmError as error:
        if "Invalid job id" in str(error):  # squeue forgets a finished job after a few minutes
            return None
        raise
    return states[0] if states else None


def sbatch(script: Path) -> str:
    """Submit ``script`` with sbatch and return the job id.

    Raises:
        SlurmError: sbatch refuses the script; the message quotes its output.
    """
    return _run_slurm_tool("sbatch", "--parsable", str(script)).strip().split(";")[0]


def _gpu_count(gres: str) -> int:
    """Return the number of GPUs in SLURM's generic resources, such as ``gpu:a100:8(S:0-1),nic:2``."""
    return sum(int(count) for count in re.findall(r"\bgpu:(?:[^:,()]+:)?(\d+)", gres))


def _run_slurm_tool(*command: str) -> str:
    """Run a command and return its output; SlurmError with the output if it fails."""
    try:
        completed = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise SlurmError(f"{command[0]} cannot be run here: {error}") from None
    if completed.returncode:
        output = completed.stderr.strip() or completed.stdout.strip() or "nothing"
        raise SlurmError(f"{command[0]} failed with exit code {completed.returncode} and said:\n{output}")
    return completed.stdout
