"""A hostfile run of the deepspeed launcher over ssh, to two addresses of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import ROOT, clean_environment, free_port, metrics, tiny_flags

HOSTS = ("127.0.0.1", "127.0.0.2")

SERVER = """\
Port {port}
ListenAddress 127.0.0.1
ListenAddress 127.0.0.2
HostKey {root}/host
AuthorizedKeysFile {root}/id.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
"""

CLIENT = """\
Host 127.0.0.1 127.0.0.2
  Port {port}
  IdentityFile {root}/id
  StrictHostKeyChecking no
  UserKnownHostsFile {root}/known
  LogLevel ERROR
"""


@dataclass
class Ssh:
    """A server on this machine and what reaches it."""

    config: Path

    def hostname(self, host: str) -> int:
        command = ["ssh", "-F", str(self.config), host, "true"]
        return subprocess.run(command, capture_output=True, check=False).returncode


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ssh]:
    search = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    programs = {name: shutil.which(name, path=search) for name in ("sshd", "ssh", "ssh-keygen", "pdsh")}
    if lacking := [name for name, path in programs.items() if path is None]:
        message = f"no ssh cluster here (no {', '.join(lacking)}); apt-get install openssh-server pdsh"
        if os.environ.get("FROSTLINE_REQUIRE_CLUSTER"):
            pytest.fail(message)
        pytest.skip(message)
    root, port = tmp_path_factory.mktemp("ssh"), free_port()
    for name in ("host", "id"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", root / name], check=True)
    (root / "sshd_config").write_text(SERVER.format(port=port, root=root))
    (root / "ssh_config").write_text(CLIENT.format(port=port, root=root))
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it when root starts it
    with (root / "sshd.log").open("wb") as log:
        command = [str(programs["sshd"]), "-D", "-e", "-f", str(root / "sshd_config")]
        server = subprocess.Popen(command, stdout=log, stderr=log)
        reachable = Ssh(root / "ssh_config")
        deadline = time.monotonic() + 30
        while any(reachable.hostname(host) for host in HOSTS):
            assert time.monotonic() < deadline, (root / "sshd.log").read_text()
            time.sleep(0.1)
        yield reachable
        server.terminate()
        server.wait()


@pytest.mark.distributed
def test_a_hostfile_starts_one_rank_on_each_host(ssh: Ssh, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    environ = {**clean_environment(), "PDSH_SSH_ARGS": f"-2 -a -x -F {ssh.config} -l%u %h"}
    # ssh starts with a bare environment: what the ranks need of this one stands in this file
    needed = ("PATH", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "FROSTLINE_CACHE", "TORCH_EXTENSIONS_DIR")
    names = [name for name in needed if name in environ]
    (tmp_path / ".deepspeed_env").write_text("".join(f"{name}={environ[name]}\n" for name in names))
    launcher = ["deepspeed", "--hostfile", "hostfile", "--no_ssh_check", "--master_addr", HOSTS[0]]
    launcher += ["--master_port", str(free_port()), str(ROOT / "launch" / "train.py")]
    flags = tiny_flags(tiny_model, tmp_path / "run", "--train.max_steps", "4")
    flags += ["--ds", str(ROOT / "ds_configs" / "zero2.json")]
    result = subprocess.run(
        [str(Path(sys.executable).parent / launcher[0]), *launcher[1:], *flags],
        cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "engine zero-2, 2 rank(s)" in result.stderr + result.stdout
    assert len(metrics(tmp_path / "run")) == 4
