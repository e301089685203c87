"""A real SLURM cluster of four nodes on this machine, in a temporary directory: munge, slurmctld, four slurmd.

By hand, until Ctrl-C:  python tests/slurm_cluster.py
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from helpers import clean_environment, free_port

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("n1", "n2", "n3", "n4")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

CONF = """\
ClusterName=frostline
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a requeued job waits until the credential of its first start has expired
AuthInfo=socket={root}/munge.socket,cred_expire=10
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
ReturnToService=2
KillWait=5
# as many CPUs as a test asks for, whatever this machine has
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=01:00:00 State=UP
PartitionName=spare Nodes=n3,n4 MaxTime=00:10:00 State=UP
"""


def missing() -> list[str]:
    """The programs of a cluster that this machine lacks."""
    return [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]


@dataclass
class Cluster:
    """A running cluster."""

    root: Path
    environ: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *command: str) -> None:
        with (self.root / f"{name}.out").open("ab") as out:
            self.processes[name] = subprocess.Popen(command, env=self.environ, stdout=out, stderr=out)

    def start_node(self, node: str) -> None:
        self.start(node, "slurmd", "-D", "-N", node)

    def call(self, *command: str) -> str:
        """The output of one of SLURM's commands."""
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def fields(self, job: str) -> dict[str, str]:
        """What scontrol knows about a job."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, what: str, until: Callable[[], bool], seconds: float = 300) -> None:
        """Ask until it is so."""
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}\n{self.call('squeue')}"
            time.sleep(0.02)

    def ranks(self, job: str) -> dict[int, int]:
        """Rank to process id of a job's training processes."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environ = (process / "environ").read_bytes().split(b"\0")
                command = (process / "cmdline").read_bytes().split(b"\0")
                if f"SLURM_JOB_ID={job}".encode() in environ and b"srun" not in command[0] and len(command) > 2:
                    rank = [word for word in environ if word.startswith(b"SLURM_PROCID=")]
                    if rank and command[1].endswith(b"train.py"):
                        found[int(rank[0].split(b"=")[1])] = int(process.name)
        return found

    def kill_node(self, node: str) -> None:
        """The node is gone at once, and everything that ran on it."""
        slurmd = self.processes.pop(node)
        victims = [slurmd.pid]
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"SLURMD_NODENAME={node}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    victims.append(int(process.name))
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        slurmd.wait()
        self.call("scontrol", "update", f"nodename={node}", "state=down", "reason=killed")


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Start a cluster; stop all that belongs to it at the end."""
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    environ = {**clean_environment(), "SLURM_CONF": str(root / "slurm.conf"), "CUDA_VISIBLE_DEVICES": ""}
    environ["PATH"] = os.pathsep.join([environ["PATH"], PATH])
    running = Cluster(root, environ)
    try:
        _configure(root)
        socket, key = f"--socket={root}/munge.socket", f"--key-file={root}/munge.key"
        files = [f"--{name}-file={root}/munge.{name}" for name in ("log", "pid", "seed")]
        running.start("munged", "munged", "--foreground", "--force", socket, key, *files)
        running.wait("munge", (root / "munge.socket").exists, 20)
        running.start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            running.start_node(node)
        running.wait("the nodes", lambda: _idle(running) == len(NODES), 60)
        yield running
    finally:
        _stop(running)
        shutil.rmtree(root, ignore_errors=True)


def _configure(root: Path) -> None:
    for name in ("state", *NODES):
        (root / name).mkdir()
    (root / "munge.key").write_bytes(os.urandom(64))
    (root / "munge.key").chmod(0o600)
    nodes = (
        f"NodeName={name} NodeHostname=localhost NodeAddr=localhost Port={free_port()} CPUs=16 Gres=gpu:2"
        for name in NODES
    )
    user = pwd.getpwuid(os.getuid()).pw_name
    (root / "slurm.conf").write_text(CONF.format(root=root, port=free_port(), user=user, nodes="\n".join(nodes)))
    # two devices that every machine has stand for two GPUs: they are counted, never opened
    (root / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")


def _idle(running: Cluster) -> int:
    done = subprocess.run(
        ["sinfo", "-h", "-N", "-o", "%T"], env=running.environ, capture_output=True, text=True, check=False
    )
    return done.stdout.split().count("idle")


def _stop(running: Cluster) -> None:
    if "slurmctld" in running.processes:
        subprocess.run(["scancel", "--full", f"--user={os.getuid()}"], env=running.environ, check=False)
        with contextlib.suppress(AssertionError):
            running.wait("the last job", lambda: not running.call("squeue", "-h").strip(), 30)
    for process in reversed(running.processes.values()):
        process.terminate()
    for process in running.processes.values():
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a plain kill tidies up, too
    with cluster() as by_hand, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={by_hand.root}/slurm.conf", flush=True)
        signal.pause()
