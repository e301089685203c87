"""Read rank and world from any launcher, join the process group, and offer the collectives that a run needs."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from toolkit.runtime import signals
from toolkit.runtime.errors import FrostlineError, UsageError
from toolkit.runtime.failure_broadcast import connect_ranks
from toolkit.runtime.rank_channel import choose_address, node_identity, resolve

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Rank and world size of this process, and the collectives that the ranks share."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True on rank 0, which logs progress and writes what a run has one file of."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The GPU of this local rank, or the CPU of a machine without one."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")

    def sum(self, *values: float) -> list[float]:
        """Sum each value over all ranks (float64, one collective)."""
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def max(self, value: float) -> float:
        """Return the maximum of ``value`` over all ranks."""
        return self._all_reduce([value], dist.ReduceOp.MAX)[0]

    def _all_reduce(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return list(values)
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(reduced, op=operation)
        return [float(value) for value in reduced.tolist()]

    def exchange(self, measured: torch.Tensor, known: Sequence[float] = ()) -> list[list[float]]:
        """Return by rank, on every rank, what the ranks measured on their devices and what their hosts know.

        ``measured`` is float64 [n] on this rank's device, and ``known`` as long on every rank. One collective and one
        wait for the device, or the wait alone for a single rank.
        """
        if self.size == 1:
            return [[*measured.tolist(), *map(float, known)]]
        host = torch.tensor(known, dtype=torch.float64)
        if measured.device.type == "cuda":
            host = host.pin_memory().to(measured.device, non_blocking=True)
        by_rank = measured.new_zeros(self.size, len(measured) + len(host))
        by_rank[self.rank] = torch.cat((measured, host))
        dist.all_reduce(by_rank)  # a sum with zeros gathers, on every backend
        rows: list[list[float]] = by_rank.tolist()
        return rows

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value (any picklable object) on every rank."""
        if self.size == 1:
            return value
        objects = [value if self.is_main else None]  # filled in place on the other ranks
        dist.broadcast_object_list(objects, src=0, device=self.device if self.device.type == "cuda" else None)
        return objects[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """Call ``work`` on rank 0 alone, and return its result (any picklable object) on every rank.

        Raises:
            FrostlineError: ``work`` raised it; raised on every rank.
        """
        result = error = None
        if self.is_main:
            try:
                result = work()
            except FrostlineError as failed:
                error = failed
        result, error = self.broadcast_object((result, error))
        if error is not None:
            raise error
        return cast(T, result)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return every rank's value (any picklable object) by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast_tensor(self, tensor: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
        """Return rank 0's ``tensor``, of a ``shape`` that every rank knows, on every rank: float32, on its device."""
        received = torch.empty(shape, dtype=torch.float32, device=self.device)
        if self.is_main and tensor is not None:
            received.copy_(tensor)
        if self.size > 1:
            dist.broadcast(received, src=0)
        return received

    def any_stop_requested(self) -> bool:
        """Return True on every rank if a signal asked any rank to stop; a collective."""
        return self.max(float(signals.stop_requested())) > 0

    def raise_if_stopping(self) -> None:
        """Raise ``StopRequested`` on every rank if a signal asked any rank to stop; a collective."""
        if self.any_stop_requested():
            raise signals.StopRequested

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the body on rank 0 first, then on the others, which find what rank 0 downloaded or cached."""
        if not self.is_main:
            self.barrier()
        try:
            yield
        finally:
            if self.is_main:
                self.barrier()


def read_world(environ: Mapping[str, str] = os.environ) -> World:
    """Read the world as the launcher describes it.

    deepspeed, torchrun and accelerate set RANK, WORLD_SIZE and LOCAL_RANK. Under srun the SLURM step's variables
    are read. Without a launcher the world is one process, also inside an sbatch script: SLURM_NTASKS is set there for
    the whole job, SLURM_STEP_NUM_TASKS only within a step that srun started.

    Raises:
        UsageError: a variable is not a number, the rank lies outside the world, or the world has fewer ranks than
            the SLURM step has tasks, as when a job inherits the variables of the shell that submitted it: every
            task would train alone.
    """
    if "WORLD_SIZE" in environ and "RANK" in environ:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    elif "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    else:
        return World()
    try:
        rank, local_rank, size = (int(environ.get(name, "0")) for name in names)
    except ValueError:
        variables = ", ".join(f"{name}={environ.get(name)}" for name in names)
        raise UsageError(f"the launcher's environment has {variables}; expected whole numbers") from None
    if not 0 <= rank < size:
        raise UsageError(
            f"the launcher's environment has {names[0]}={rank} and {names[2]}={size}; expected 0 <= rank < size"
        )
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    if tasks.isdigit() and size < int(tasks):
        raise UsageError(
            f"the environment has WORLD_SIZE={size}, but this is one of {tasks} tasks of a SLURM step; expected a rank "
            "for each task: unset RANK, WORLD_SIZE and LOCAL_RANK before srun, which then gives every task its rank"
        )
    return World(rank, local_rank, size)


def require_one_process(command: str) -> None:
    """Raise UsageError if a launcher has started several ranks of a command that would do the same in each of them."""
    if (size := read_world().size) > 1:
        raise UsageError(
            f"{command} computes in one process, and a launcher has started {size}; start it without one, or with one "
            "rank (generate.py divides its questions among ranks)"
        )


@contextlib.contextmanager
def join_ranks(engine_needs_group: bool = False) -> Iterator[World]:
    """Join all ranks for the body: the process group, and the connections over which failures are broadcast.

    The process group is not destroyed after an error if there are other ranks: that would block while they wait in a
    collective. Nor is one that was there before.
    ``engine_needs_group`` and what is raised are those of ``join_process_group``.
    """
    was_joined = dist.is_available() and dist.is_initialized()
    world = join_process_group(engine_needs_group)
    is_done = False
    try:
        places = world.all_gather_object((node_identity(), resolve(os.environ.get("MASTER_ADDR", ""))))
        with connect_ranks(world.rank, world.size, choose_address(places, world.rank), world.broadcast_object):
            yield world
            world.barrier()
        is_done = True
    finally:
        if not was_joined and (is_done or world.size == 1):
            leave_process_group()


def join_process_group(engine_needs_group: bool = False) -> World:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and return this process's place in it.

    A single rank joins one only if its ``engine_needs_group``, as DeepSpeed does.

    Raises:
        UsageError: the launcher's variables are invalid, or the port that they name is taken.
    """
    world = read_world()
    if world.size == 1 and not engine_needs_group:
        return world
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank))
    if "MASTER_ADDR" not in os.environ:  # SLURM is asked only then: a container may lack scontrol
        os.environ["MASTER_ADDR"] = _master_address()
    os.environ.setdefault("MASTER_PORT", str(_master_port(world)))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        try:
            with signals.waiting(f"the {world.size} ranks to meet at {os.environ['MASTER_ADDR']}"):
                dist.init_process_group(backend, timeout=timedelta(minutes=30), device_id=_bound_device(world))
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise UsageError(
                f"the ranks were to meet at port {os.environ['MASTER_PORT']}, which another process uses, such as a "
                "run beside this one; give the launcher another: --master_port N (deepspeed, torchrun), "
                "--main_process_port N (accelerate)"
            ) from None
    return world


def _bound_device(world: World) -> torch.device | None:
    """Return the GPU to bind the process group to, so that NCCL connects at once and does not guess; None for none.

    A single rank has no peer to connect to. torch 2.6.0 to 2.7.0 can hang with it (pytorch issue 153960).
    """
    release = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:3])
    if world.device.type != "cuda" or world.size == 1 or (2, 6, 0) <= release < (2, 7, 1):
        return None
    return world.device


def leave_process_group() -> None:
    """Destroy the process group, if one was joined."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _master_address() -> str:
    """Return the address of rank 0's node: SLURM's NodeAddr of the step's first node, whose name need not resolve."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return "127.0.0.1"
    first_node = _run_scontrol("show", "hostnames", nodes).split()[0]
    address = re.search(r"\bNodeAddr=(\S+)", _run_scontrol("show", "node", first_node))
    return address[1] if address else first_node


def _run_scontrol(*arguments: str) -> str:
    """Return the output of SLURM's ``scontrol``; UsageError if it fails."""
    try:
        return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        cause = getattr(error, "stderr", None) or error
        raise UsageError(
            f"scontrol cannot tell where the ranks meet ({str(cause).strip()}), as in a container; "
            "set MASTER_ADDR to the first node's address before srun"
        ) from None


def _master_port(world: World) -> int:
    """Return a port that all ranks agree on: derived from SLURM job and step, or any free one for a single process.

    The derived port lies in 12000–31999, below Linux's ephemeral ports, which start at 32768.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job and world.size > 1:
        return 12000 + (int(job) + 97 * int(os.environ.get("SLURM_STEP_ID", "0"))) % 20000
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
