"""Six trials over three frost lines: with the cache that they share, beside the same six without one.

    python benchmarks/sweep.py                            # 64 rows, 5 epochs of the bundled SmolLM2-135M
    python benchmarks/sweep.py --rows 8 --epochs 3        # a first look

Both sweeps are run by launch/sweep.py, as a user runs it: masks last:1, last:2 and last:4 with two learning rates each,
bfloat16, batch 1. The cache is empty at first; the blocks below the lowest line fill it once, and the higher lines
continue from there. Seconds are those of the trials' processes from start to end: imports, loading, the filling,
training, validation and checkpoints. Scoring the trials afterwards is in neither.

    x           seconds without the cache divided by those with it
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.contenders import require_success, thread_variables  # noqa: E402
from benchmarks.process import run_process  # noqa: E402
from benchmarks.record import SAME_LEARNING, rms  # noqa: E402
from benchmarks.report import bounds_text, head_lines, save, table  # noqa: E402

MODEL, DATA = "bundled:smollm2-135m", ROOT / "examples" / "data" / "clinical_qa_ko.jsonl"
MASKS, RATES = ("last:1", "last:2", "last:4"), ("1e-4", "3e-5")
MOST = 0.45
"""Share of the uncached sweep's time that the cached one may take."""


@dataclass(frozen=True)
class Swept:
    """One sweep that has ended."""

    trials: list[dict[str, Any]]
    """As ``sweep.json`` has them."""
    losses: list[list[float]]
    """Step losses of each trial."""

    @property
    def seconds(self) -> float:
        """Return the seconds of all trials' processes."""
        return sum(float(trial["wall_seconds"]) for trial in self.trials)


def run_sweep(folder: Path, cache: str, rows: int, epochs: int, model: str = MODEL, data: Path = DATA) -> Swept:
    """Run the sweep with ``prefix.cache`` as given.

    Raises:
        RuntimeError: a trial failed; ends with the last lines of the log.
    """
    directory = folder / f"sweep-{cache}"
    command = [
        sys.executable, str(ROOT / "launch" / "sweep.py"), "--model.name_or_path", model, "--data.path", str(data),
        "--data.limit", str(rows), "--train.epochs", str(epochs), "--output.sample_answers", "0", "--output.report",
        "[]", "--output.report_to", "[]", "--output.dir", str(directory), "--prefix.cache", cache, "--prefix.cache_dir",
        str(folder / "cache"), "--sweep.mask.train", *MASKS, "--sweep.train.learning_rate", *RATES,
    ]  # fmt: skip
    log = folder / f"log-{cache}.txt"
    require_success(run_process(command, log), log)
    trials = json.loads((directory / "sweep.json").read_text(encoding="utf-8"))["trials"]
    return Swept(trials, [_losses(Path(trial["directory"]) / "metrics.jsonl") for trial in trials])


def _losses(metrics: Path) -> list[float]:
    rows = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def result_table(uncached: Swept, cached: Swept) -> str:
    """Format one row a trial, and one of all."""
    rows = []
    for without, with_cache in zip(uncached.trials, cached.trials, strict=True):
        a, b = without["wall_seconds"], with_cache["wall_seconds"]
        settings = with_cache["settings"]
        name = f"{' '.join(settings['mask.train'])}, {settings['train.learning_rate']:g}"
        losses = [f"{one['validation']['value']:.4f}" for one in (without, with_cache)]
        steps = [f"{one['seconds']:.1f}" for one in (without, with_cache)]
        rows.append([name, str(with_cache["boundary"]), f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}", *steps, *losses])
    a, b = uncached.seconds, cached.seconds
    rows.append(["all", "", f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}", "", "", "", ""])
    columns = ["trial", "frost line", "uncached s", "cached s", "x", "its steps s", "cached", "its loss", "cached"]
    return table(columns, rows)


def bounds(uncached: Swept, cached: Swept) -> dict[str, bool]:
    """Return whether each claim holds."""
    ratio = cached.seconds / uncached.seconds
    pairs = zip(uncached.losses, cached.losses, strict=True)
    furthest = max(rms(ours, theirs) for theirs, ours in pairs)
    return {
        f"six trials with the shared cache take {ratio:.2f} of the time without it (at most {MOST})": ratio <= MOST,
        f"step losses differ by {furthest:.4f} (RMS of the worst trial, at most {SAME_LEARNING})": (
            furthest <= SAME_LEARNING
        ),
    }


def main() -> int:
    """Run both sweeps, print and save the table, check the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="rows, a tenth of which is held out; default: 64")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each trial; default: 5")
    parser.add_argument("--model", default=MODEL, help=f"model of at least 5 blocks; default: {MODEL}")
    parser.add_argument("--data", type=Path, default=DATA, help="rows; default: the Korean sample")
    parser.add_argument("--threads", type=int, help="threads of each process; default: one a core")
    parser.add_argument("--save", action="store_true", help="write the result under benchmarks/results/")
    given = parser.parse_args()
    thread_variables(given.threads)
    with tempfile.TemporaryDirectory() as name:
        uncached, cached = (
            run_sweep(Path(name), cache, given.rows, given.epochs, given.model, given.data) for cache in ("off", "auto")
        )
    found = bounds(uncached, cached)
    text = f"{head_lines(f'; {given.rows} rows, {given.epochs} epochs')}\n{result_table(uncached, cached)}\n\n"
    text += bounds_text(found)
    print(text)
    if given.save:
        save("sweep", text)
    return int(not all(found.values()))


if __name__ == "__main__":
    sys.exit(main())
