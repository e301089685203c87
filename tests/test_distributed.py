from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_gpu import CUDA, one_gpu

from toolkit.engine.deepspeed.device import device_index_as_local_rank
from toolkit.runtime import distributed
from toolkit.runtime.distributed import World, read_world
from toolkit.runtime.errors import UsageError


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({}, World(0, 0, 1)),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, World(3, 1, 4)),
        ({"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}, World(5, 1, 8)),
        # inside an sbatch script, before srun: the job has 8 tasks, this process is alone
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}, World(0, 0, 1)),
        # torchrun started by srun on each node: torchrun speaks for its workers
        (
            {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
            World(2, 0, 4),
        ),
    ],
)
def test_the_world_is_what_the_launcher_says(environ: dict[str, str], world: World) -> None:
    assert read_world(environ) == world


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "expected whole numbers"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "expected 0 <= rank < size"),
        # the shell that submitted the job had them; each task would train alone, into one directory
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, "unset RANK"),
    ],
)
def test_a_world_that_makes_no_sense_is_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_world(environ)


def test_one_process_needs_no_group() -> None:
    world = World()
    assert world.sum(1.5, 2) == [1.5, 2]
    assert world.max(3) == 3
    assert world.broadcast_object("x") == "x"
    world.barrier()
    with world.main_first():
        pass


def test_the_port_follows_from_job_and_step_below_the_outgoing_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = set()
    for job, step in ((7, 0), (7, 1), (8, 0), (19999, 3), (4294967295, 0)):
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        monkeypatch.setenv("SLURM_STEP_ID", str(step))
        ports.add(distributed._master_port(World(0, 0, 2)))
    assert len(ports) == 5
    assert all(12000 <= port < 32000 for port in ports)


def test_without_scontrol_the_message_names_the_variable_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n[1-2]")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match=r"scontrol cannot tell where the ranks meet .* set MASTER_ADDR"):
        distributed._master_address()


def test_an_address_that_is_set_is_taken_without_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12000"}
    for name, value in {**variables, "SLURM_STEP_NODELIST": "n[1-2]", "PATH": "/nowhere"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, **settings: None)
    distributed.join_process_group(engine_needs_group=True)
    assert os.environ["MASTER_ADDR"] == "10.0.0.1"


def test_a_port_that_another_run_uses_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UsageError, match=rf"port {port}, which another process uses.* --master_port N"):
            distributed.join_process_group(engine_needs_group=True)


def test_one_process_reads_its_own_values_back() -> None:
    assert World().exchange(torch.tensor([0.5, 2.0], dtype=torch.float64), (True, 3)) == [[0.5, 2.0, 1.0, 3.0]]


@pytest.mark.parametrize(
    ("size", "version", "bound"), [(2, "2.13.0", CUDA), (1, "2.13.0", None), (2, "2.7.0+cu126", None)]
)
def test_nccl_is_bound_to_the_gpu_of_a_rank_that_has_peers(
    size: int, version: str, bound: torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.6.0 to 2.7.0 can hang with it. The rank sees one GPU, its own, as under srun --gpus-per-task=1."""
    given: dict[str, Any] = {}
    environ = {"RANK": str(size - 1), "LOCAL_RANK": str(size - 1), "WORLD_SIZE": str(size), "MASTER_PORT": "12000"}
    for name, value in {**environ, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, **settings: given.update(settings))
    monkeypatch.setattr(torch, "__version__", version)
    with one_gpu():
        world = distributed.join_process_group(engine_needs_group=True)
        assert (world.local_rank, world.device) == (size - 1, CUDA)
    assert given["device_id"] == bound


def test_deepspeed_computes_on_the_device_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed takes LOCAL_RANK for the GPU's index, and wants mpirun's variable to be the same."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    with device_index_as_local_rank(CUDA):
        assert (os.environ["LOCAL_RANK"], os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]) == ("0", "0")
    with device_index_as_local_rank(torch.device("cpu")):
        assert os.environ["LOCAL_RANK"] == "3"
    assert (os.environ["LOCAL_RANK"], os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]) == ("3", "3")


def test_a_command_leaves_a_process_group_alone_that_was_there_before_it(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        with distributed.join_ranks() as world:
            assert world.size == 1
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_a_run_that_fails_alone_leaves_no_process_group() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    was_joined = False

    def fail() -> None:
        nonlocal was_joined
        with distributed.join_ranks(engine_needs_group=True):
            was_joined = dist.is_initialized()
            raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        fail()
    assert was_joined
    assert not dist.is_initialized()
