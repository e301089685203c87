"""Tables, the machine they were made on, and the files under benchmarks/results/."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.workload import ROOT, shown_command

RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "accelerate")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table, its columns padded to be read as text; the first column is left-aligned."""
    cells = [list(columns), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    ruler = "|".join("-" * (width + 2) if i == 0 else "-" * (width + 1) + ":" for i, width in enumerate(widths))
    return "\n".join([line(cells[0]), f"|{ruler}|", *map(line, cells[1:])])


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Format the median, and the range if there are several values."""
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}}–{max(values):{form}})"


def gpu_name() -> str | None:
    """Return the name of the first GPU, by its driver, without importing torch; None without a GPU."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return names[0].strip() if names else None


def hardware() -> str:
    """Describe GPU (if any), processor, its matrix instructions, cores and memory."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", info)
    found = [name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 bf16")) if f" {flag}" in info]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = f"{len(os.sched_getaffinity(0))} cores of {model[1] if model else 'an unnamed processor'}"
    kernel = f"({', '.join(found) or 'no bf16 instructions'})"
    return ", ".join(filter(None, [gpu_name(), f"{cores} {kernel}", f"{memory:.0f} GiB"]))


def versions(packages: Iterable[str] = PACKAGES) -> str:
    """List the versions of those ``packages`` that are installed."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def head_lines(more: str = "") -> str:
    """Return the lines above every table: date, machine, versions, threads and the command."""
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    lines = [
        f"{date.today()}, {hardware()}",
        f"{versions()}, threads: {threads}{more}",
        "",
        f"    {shown_command()}",
        "",
    ]
    return "\n".join(lines)


def save(name: str, text: str) -> Path:
    """Write a result under ``benchmarks/results/DATE-NAME-HARDWARE.md`` and return its path."""
    machine = gpu_name() or f"{len(os.sched_getaffinity(0))}-core-cpu"
    slug = re.sub(r"[^a-z0-9.]+", "-", machine.lower()).strip("-")
    path = RESULTS / f"{date.today()}-{name}-{slug}.md"
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
    return path


def bounds_text(bounds: dict[str, bool]) -> str:
    """Format one line a bound: whether it holds."""
    return "\n".join(f"{'ok  ' if holds else 'MISS'} {bound}" for bound, holds in bounds.items())
