"""The plain loop as a process: ``plain.py WORKLOAD RECORD SCRATCH [--fp32-masters]``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.common import arguments, finish, load_model
from benchmarks.plain_loop import plain_loop
from benchmarks.workload import Workload

if __name__ == "__main__":
    given = arguments("--fp32-masters")
    workload = Workload.read(given.workload)
    finish(plain_loop(load_model(workload), workload, given.fp32_masters), given.record)
