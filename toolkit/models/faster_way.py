"""Which of two ways of computing the same is faster on this machine: measured once, kept beside the converted models.

The answer has to stay the same from run to run, because another way moves the last bits of gradients.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from toolkit.runtime.cache_root import cache_root
from toolkit.runtime.paths import replace_text

LEAST_SPEEDUP = 1.2
"""How many times faster the other way has to be to be taken, so that noise does not decide."""
_TRIALS = 8
_INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 bf16", "avx512f": "AVX-512"}
"""By the flag that the kernel names them with: the first of these that a processor has is part of its key."""


def is_faster_here(
    file: str, what: str, measure: Callable[..., float], *args: Hashable, least: float = LEAST_SPEEDUP
) -> bool:
    """Return whether ``measure(*args)``, a speed-up, is at least ``least`` on this machine.

    The answer is that saved under ``what`` in ``file`` of the cache directory, which keeps those of all machines that
    share it. Where none is saved, it is measured and saved.
    """
    return _saved_or_measured(cache_root() / file, f"{machine()}{what}", least, measure, *args)


@cache
def _saved_or_measured(path: Path, key: str, least: float, measure: Callable[..., float], *args: Hashable) -> bool:
    if isinstance(faster := _read(path).get(key), bool):
        return faster
    faster = measure(*args) >= least
    by_key = _read(path)  # again: a run that started beside this one may have saved its answers meanwhile
    if isinstance(first := by_key.get(key), bool):
        return first
    with suppress(OSError):  # where it cannot be saved, the next run measures again
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps({**by_key, key: faster}))
    return faster


def _read(path: Path) -> dict[str, Any]:
    """Return the answers in a file, by key; none if it cannot be read."""
    saved: Any = None
    with suppress(OSError, ValueError):
        saved = json.loads(path.read_text(encoding="utf-8"))
    return saved if isinstance(saved, dict) else {}


def machine(is_short: bool = False) -> str:
    """Name the processor, its instructions for bfloat16 and torch's version: the key that a measurement is saved under.

    Of several generations a virtual machine may tell the same name. ``is_short`` names no instructions but AMX, as runs
    did before.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        processor = platform.processor() or platform.machine()
    else:
        pairs = (line.split(":", 1) for line in reversed(lines) if ":" in line)
        fields = {key.strip(): value for key, value in pairs}
        flags = fields.get("flags", "").split()
        found = [name for flag, name in _INSTRUCTIONS.items() if flag in flags and (name == "AMX" or not is_short)]
        processor = fields.get("model name", platform.machine()).strip() + "".join(
            f" with {name}" for name in found[:1]
        )
    return f"{processor}, torch {torch.__version__}"


def speedup(usual: Callable[[], object], other: Callable[[], object]) -> float:
    """Measure how many times faster ``other`` is than ``usual``.

    The best of eight alternating trials, on one thread and by that thread's CPU time, so that other processes do not
    count.
    """
    best = {usual: float("inf"), other: float("inf")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(_TRIALS):
            for way in best:
                start = time.thread_time()
                way()
                best[way] = min(best[way], time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return best[usual] / best[other]
