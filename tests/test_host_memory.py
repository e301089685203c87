"""Host memory that a job may still take: the machine's, or less where a control group limits it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from toolkit.runtime import host_memory
from toolkit.runtime.host_memory import available_host_bytes

GIB = 2**30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of control groups of a process on a machine with 100 GiB free."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100 * GIB))
    monkeypatch.setattr(host_memory, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "MOUNT", tmp_path / "mount")
    return tmp_path


def write(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(f"{text}\n")


def test_without_control_groups_the_machine_decides(groups: Path) -> None:
    assert available_host_bytes() == 100 * GIB


@pytest.mark.parametrize("limited", ["job", "step"])
def test_a_limit_of_version_2_counts_wherever_it_is_above_the_process_and_pages_of_files_are_room(
    groups: Path, limited: str
) -> None:
    (groups / "cgroup").write_text("0::/slurm/job/step\n")
    for name in ("job", "step"):
        place = groups / "mount" / "slurm" / "job" / ("step" if name == "step" else "")
        stat = f"anon {2 * GIB}\ninactive_file {GIB}\nactive_file {GIB}"
        limit = str(16 * GIB) if name == limited else "max"
        write(place, memory__max=limit, memory__current=str(6 * GIB), memory__stat=stat)
    assert available_host_bytes() == 12 * GIB


def test_a_limit_of_version_1_counts_and_one_below_what_is_used_leaves_nothing(groups: Path) -> None:
    (groups / "cgroup").write_text("9:cpuset:/\n4:memory:/slurm/job\n")
    place = groups / "mount" / "memory" / "slurm" / "job"
    write(
        place, memory__limit_in_bytes=str(8 * GIB), memory__usage_in_bytes=str(3 * GIB),
        memory__stat=f"total_inactive_file {GIB}",
    )  # fmt: skip
    assert available_host_bytes() == 6 * GIB
    write(place, memory__usage_in_bytes=str(20 * GIB))
    assert available_host_bytes() == 0


def test_within_a_container_the_root_that_it_sees_has_the_limit(groups: Path) -> None:
    (groups / "cgroup").write_text("4:memory:/docker/of-the-host\n0::/\n")
    no_limit = 2**63 - 4096
    write(
        groups / "mount" / "memory", memory__limit_in_bytes=str(4 * GIB), memory__usage_in_bytes=str(GIB),
        memory__stat="",
    )  # fmt: skip
    assert available_host_bytes() == 3 * GIB
    write(groups / "mount" / "memory", memory__limit_in_bytes=str(no_limit))
    assert available_host_bytes() == 100 * GIB
