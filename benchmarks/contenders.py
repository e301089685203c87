"""Run each contender in a process of its own, and read times, losses and memory from it."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.process import Finished, run_process
from benchmarks.record import Record
from benchmarks.report import spread
from benchmarks.workload import ROOT, Workload

PEERS = ROOT / "benchmarks" / "peers"


class DoesNotFitError(Exception):
    """A contender ran out of memory."""


@dataclass(frozen=True)
class Outcome:
    """One run of one contender, in seconds of one clock."""

    record: Record
    begin: float
    """When training began: its first step, or the filling of the cache before it."""
    process_seconds: float
    """Seconds of the whole process, with imports, loading and set-up."""
    peak_bytes: int
    """Most resident memory, or memory held on the GPU where there is one."""
    epochs: int

    @property
    def run(self) -> float:
        """Return the seconds from the beginning of training to the end of its last step, pauses included."""
        return self.record.ends[-1] - self.begin

    def epoch(self, number: int) -> float:
        """Return the seconds from the start of the first step of epoch ``number`` (from 0) to the end of its last."""
        steps = len(self.record.ends) // self.epochs
        return self.record.ends[(number + 1) * steps - 1] - self.record.starts[number * steps]

    @property
    def first_epoch(self) -> float:
        """Return the seconds of the first epoch with the filling of the cache."""
        return self.record.ends[len(self.record.ends) // self.epochs - 1] - self.begin

    @property
    def later_epoch(self) -> float:
        """Return the mean seconds of the epochs after the first; those of the first if it is the only one."""
        later = [self.epoch(number) for number in range(1, self.epochs)] or [self.epoch(0)]
        return sum(later) / len(later)

    @property
    def losses(self) -> list[float]:
        """Return the mean loss of each epoch."""
        steps = len(self.record.losses) // self.epochs
        return [sum(self.record.losses[e * steps : (e + 1) * steps]) / steps for e in range(self.epochs)]


MEASURES: tuple[tuple[str, Callable[[Outcome], float], str], ...] = (
    ("run s", lambda outcome: outcome.run, ".1f"), ("first s", lambda outcome: outcome.first_epoch, ".1f"),
    ("later s", lambda outcome: outcome.later_epoch, ".1f"),
    ("process s", lambda outcome: outcome.process_seconds, ".1f"),
    ("peak GiB", lambda outcome: outcome.peak_bytes / 2**30, ".2f"),
)  # fmt: skip
"""Name, value and format of what the tables of outcomes compare."""


def outcome_columns(epochs: int) -> list[str]:
    """Return the columns of a table of outcomes: each measure, with its ratio beside it, and the losses."""
    losses = [f"loss {epoch + 1}" for epoch in range(epochs)]
    return ["contender", *(word for name, _, _ in MEASURES for word in (name, "x")), *losses]


def outcome_row(name: str, outcomes: Sequence[Outcome], base: Sequence[Outcome]) -> list[str]:
    """Format the outcomes of a contender's rounds, with ratios to ``base``, and the losses of the first round."""
    row = [name]
    for _, measure, form in MEASURES:
        row.append(spread([measure(outcome) for outcome in outcomes], form))
        row.append(f"{ratio(base, outcomes, measure):.2f}" if base else "–")
    return [*row, *(f"{loss:.4f}" for loss in outcomes[0].losses)]


def ratio(base: Sequence[Outcome], outcomes: Sequence[Outcome], measure: Callable[[Outcome], float]) -> float:
    """Return the median over the rounds of a measure of ``base`` divided by that of ``outcomes``."""
    return statistics.median(measure(a) / measure(b) for a, b in zip(base, outcomes, strict=False))


def recipe_flags() -> str:
    """Return the help of the training command, which lists the recipe keys."""
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def importable(python: str, module: str) -> bool:
    """Return whether the interpreter ``python`` has the package ``module``."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0


def run_peer(workload: Path, scratch: Path, script: str, switches: tuple[str, ...] = (), python: str = "") -> Outcome:
    """Run a module of ``benchmarks/peers`` on a workload file.

    Raises:
        DoesNotFitError: it ran out of memory.
        RuntimeError: it failed otherwise; ends with its last lines.
    """
    scratch.mkdir(parents=True)
    record = scratch / "record.json"
    command = [python or sys.executable, str(PEERS / script), str(workload), str(record), str(scratch), *switches]
    log = scratch / "log.txt"
    finished = require_success(run_process(command, log, environment={"TOKENIZERS_PARALLELISM": "false"}), log)
    steps = Record.read(record)
    epochs = len(Workload.read(workload).orders)
    return Outcome(steps, steps.starts[0], finished.seconds, steps.gpu_peak or finished.peak_bytes, epochs)


def run_toolkit(workload: Workload, scratch: Path, *flags: str) -> Outcome:
    """Run ``launch/train.py`` on a workload; further ``flags`` as a user gives them.

    The end of a step is when its line appears in ``metrics.jsonl``, its start is that less the line's ``seconds``.
    Training begins with the first step. If ``--prefix.cache_dir`` names a directory that is not there yet, it begins
    with the log line that announces the filling of the cache, or where there is none, with the one that ends set-up.

    Raises:
        DoesNotFitError: it ran out of memory.
        RuntimeError: it failed otherwise; ends with its last lines.
    """
    scratch.mkdir(parents=True)
    fills = "--prefix.cache_dir" in flags and not Path(flags[flags.index("--prefix.cache_dir") + 1]).exists()
    run, log = scratch / "run", scratch / "log.txt"
    metrics = run / "metrics.jsonl"
    given = {
        "--config": ROOT / "recipes" / "quickstart.yaml", "--model.name_or_path": workload.model,
        "--data.path": workload.data, "--data.validation": "none", "--train.seed": workload.seed,
        "--train.epochs": len(workload.orders), "--train.learning_rate": workload.learning_rate, "--output.dir": run,
        "--train.micro_batch_size": workload.micro_batch,
    }  # fmt: skip
    command = [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        *(str(word) for item in given.items() for word in item),
    ]
    train = ["--mask.train", f"last:{workload.last}", "head"]
    finished = require_success(run_process([*command, *train, *flags], log, [metrics]), log)
    record, begin, peak = Record(), None, 0.0
    for seen, line in finished.lines[metrics]:
        row = json.loads(line)
        if "loss" in row:
            record.starts.append(seen - row["seconds"])
            record.ends.append(seen)
            record.losses.append(row["loss"])
            peak = row["peak_memory_gib"]
    if fills:
        begin = _line_time(finished.lines[log], r"(?i)\bfilling\b") or _line_time(finished.lines[log], r"\] engine ")
    mask = json.loads((run / "mask.json").read_text(encoding="utf-8"))
    record.trainable = sum(math.prod(tensor["shape"]) for tensor in mask["trainable"])
    on_gpu = _line_time(finished.lines[log], r"rank\(s\) on cuda") is not None
    return Outcome(
        record, min(begin or record.starts[0], record.starts[0]), finished.seconds,
        int(peak * 2**30) if on_gpu else finished.peak_bytes, len(workload.orders),
    )  # fmt: skip


def thread_variables(threads: int | None) -> None:
    """Give this process and all it starts the same number of threads, and no network."""
    os.environ["OMP_NUM_THREADS"] = str(threads or len(os.sched_getaffinity(0)))
    os.environ["HF_HUB_OFFLINE"] = "1"


def require_success(finished: Finished, log: Path) -> Finished:
    """Return ``finished`` if its exit code is 0.

    Raises:
        DoesNotFitError: it ran out of memory.
        RuntimeError: it failed otherwise; ends with the last lines of ``log``.
    """
    if finished.code == 0:
        return finished
    text = log.read_text(encoding="utf-8", errors="replace")
    if finished.code == -9 or re.search(r"OutOfMemoryError|out of memory|can't allocate memory", text):
        raise DoesNotFitError
    raise RuntimeError(f"exit code {finished.code}; its last lines:\n" + "\n".join(text.splitlines()[-20:]))


def _line_time(lines: list[tuple[float, str]], pattern: str) -> float | None:
    return next((seen for seen, line in lines if re.search(pattern, line)), None)
