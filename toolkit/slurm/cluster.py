"""Ask the cluster: partitions from sinfo, jobs from squeue, and sbatch."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from toolkit.runtime.errors import ConfigError, SlurmError
from toolkit.slurm.request import JobRequest, seconds


@dataclass(frozen=True)
class Nodes:
    """Hold nodes of one kind in a partition."""

    count: int
    gpus: int
    cpus: int


@dataclass(frozen=True)
class Partition:
    """Hold a part of the cluster that jobs queue for."""

    name: str
    is_default: bool
    limit: str
    """Longest time of a job as SLURM writes it; ``infinite`` where there is none."""
    kinds: tuple[Nodes, ...]

    def able(self, gpus: int, cpus: int) -> int:
        """Count the nodes that have so many GPUs and CPUs."""
        return sum(kind.count for kind in self.kinds if kind.gpus >= gpus and kind.cpus >= cpus)

    def describe(self) -> str:
        """Describe the nodes by kind."""
        kinds = (f"{kind.count} x ({kind.cpus} CPUs, {kind.gpus} GPUs)" for kind in self.kinds)
        return f"{self.name}: {', '.join(kinds)}, time limit {self.limit}"


def partitions() -> list[Partition]:
    """Return the partitions that this user sees.

    Raises:
        SlurmError: this machine is no login node, or sinfo cannot reach the cluster.
    """
    if shutil.which("sbatch") is None:
        raise SlurmError(
            "there is no sbatch on this machine; run this on a login node of the cluster, or look at the script "
            "with --dry-run"
        )
    lines = _run("sinfo", "--noheader", "--exact", "--format=%P|%D|%l|%G|%c").splitlines()
    found: dict[str, Partition] = {}
    for line in lines:
        label, count, limit, gres, cpus = line.strip().split("|")
        name = label.removesuffix("*")
        # a job never gets the cores beyond those that sinfo's "16+" promises
        kind = Nodes(int(count), _gpus(gres), int(cpus.rstrip("+")))
        before = found[name].kinds if name in found else ()
        found[name] = Partition(name, label.endswith("*"), limit, (*before, kind))
    return list(found.values())


def check(request: JobRequest, known: list[Partition]) -> None:
    """Refuse a request that the cluster would reject, or leave in the queue for ever.

    Raises:
        ConfigError: all faults together, with what the partition has.
    """
    if faults := list(_faults(request, known)):
        raise ConfigError(faults, "request, as sinfo describes the cluster")


def active(job: str) -> str | None:
    """Return the state of a job (``PENDING``, ``RUNNING`` …) while it is in the queue, else None.

    Raises:
        SlurmError: squeue cannot reach the cluster.
    """
    if shutil.which("squeue") is None:
        return None
    try:
        states = _run("squeue", "--noheader", f"--jobs={job}", "--format=%T").split()
    except SlurmError as error:
        if "Invalid job id" in str(error):  # squeue forgets a finished job after a few minutes
            return None
        raise
    return states[0] if states else None


def sbatch(script: Path) -> str:
    """Hand ``script`` to sbatch and return the job's number.

    Raises:
        SlurmError: sbatch refuses it; with sbatch's own words.
    """
    return _run("sbatch", "--parsable", str(script)).strip().split(";")[0]


def _faults(request: JobRequest, known: list[Partition]) -> Iterator[str]:
    names = "; ".join(partition.describe() for partition in known) or "none"
    if request.partition is None:
        partition = next((partition for partition in known if partition.is_default), None)
        if partition is None:
            yield f"the cluster has no default partition; choose one with --partition: {names}"
            return
    else:
        partition = next((partition for partition in known if partition.name == request.partition), None)
        if partition is None:
            yield f"--partition is {request.partition}, which this cluster does not have; it has {names}"
            return
    gpus, cpus = request.gpus_per_node or 0, request.ranks_per_node * (request.cpus_per_task or 1)
    able = partition.able(gpus, cpus)
    if request.nodes > able:
        each = f"{cpus} CPUs and {gpus} GPUs each" if gpus else f"{cpus} CPUs each"
        yield f"--nodes is {request.nodes} with {each}; {able} node(s) can give that ({partition.describe()})"
    limit, asked = seconds(partition.limit), request.time_seconds
    if limit is not None and asked is not None and asked > limit:
        yield f"--time is {request.time}; partition {partition.name} allows {partition.limit} at most"


def _gpus(gres: str) -> int:
    """Count the GPUs in generic resources such as ``gpu:a100:8(S:0-1),nic:2``."""
    return sum(int(count) for count in re.findall(r"\bgpu:(?:[^:,()]+:)?(\d+)", gres))


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise SlurmError(f"{command[0]} cannot be run here: {error}") from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or "nothing"
        raise SlurmError(f"{command[0]} failed with exit code {done.returncode} and said:\n{said}")
    return done.stdout
