"""What a frozen prefix in 8 or 4 bits saves, and what it does to the learning.

    python benchmarks/quantised_prefix.py --data PATH/TO/ori_pqal.json [--rows 40]

SmolLM2-135M, top 4 blocks and untied head, batch 1, AdamW 1e-5, 3 epochs, on the first rows of PubMedQA, once with each
`prefix.precision`. The toolkit runs as a user runs it: launch/train.py in a process of its own. Exits 1 if a bound is
missed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import bounds_text, head_lines, save, table  # noqa: E402

PRECISIONS = ("model", "int8", "nf4")
EPOCHS, SEED = 3, 42


@dataclass(frozen=True)
class Outcome:
    """Result of one run."""

    losses: list[float]
    """Mean loss of each epoch."""
    exported: float
    """Mean loss over the same rows after training, above the original prefix."""
    planned: int
    """Bytes of the prefix on the device, as planned."""
    held: float | None
    """MiB of the frozen blocks as the log counts them; none where nothing was quantised."""
    peak: float
    """GiB of the whole process at most."""

    @property
    def gain(self) -> float:
        """Return the fall of the loss from the first epoch to the last."""
        return self.losses[0] - self.losses[-1]


def run(precision: str, data: Path, folder: Path) -> Outcome:
    """Train with ``precision``, then evaluate the result above the original prefix."""
    directory = folder / precision
    flags = [
        "--config", ROOT / "recipes" / "quickstart.yaml", "--data.path", data, "--data.validation", "none",
        "--train.seed", SEED, "--output.dir", directory, "--prefix.precision", precision,
    ]  # fmt: skip
    log = _call("launch/train.py", *flags).stderr
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row["loss"] for row in rows if "loss" in row]
    size = len(steps) // EPOCHS
    printed = _call("launch/evaluate.py", directory, "--data.path", data)
    exported = re.search(r"loss\D*(\d+\.\d+)", printed.stdout + printed.stderr)
    held = re.search(r"prefix weights: ([\d.,]+) MiB", log)
    if exported is None:
        raise SystemExit(f"launch/evaluate.py printed no loss:\n{printed.stdout}")
    plan = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
    return Outcome(
        losses=[sum(steps[e * size : (e + 1) * size]) / size for e in range(EPOCHS)],
        exported=float(exported[1]),
        planned=plan["memory"]["most"]["prefix weights"],
        held=float(held[1].replace(",", "")) if held else None,
        peak=max(row.get("peak_memory_gib", 0.0) for row in rows),
    )


def _call(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{script} ended with {result.returncode}:\n{result.stderr[-2000:]}")
    return result


def main() -> int:
    """Run all three, print one table, check the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="PubMedQA's ori_pqal.json")
    parser.add_argument("--rows", type=int, default=40, help="rows from the start of the file; default: 40")
    parser.add_argument("--save", action="store_true", help="write the result under benchmarks/results/")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "rows.json"
        every = json.loads(arguments.data.read_text(encoding="utf-8"))
        data.write_text(json.dumps(dict(islice(every.items(), arguments.rows))), encoding="utf-8")
        outcomes = {precision: run(precision, data, folder) for precision in PRECISIONS}
    plain = outcomes["model"]
    heads = [f"epoch {epoch + 1}" for epoch in range(EPOCHS)]
    heads += ["gap", "gain", "exported", "planned MiB", "held MiB", "peak GiB"]
    rows = []
    for precision, outcome in outcomes.items():
        cells = [*outcome.losses, outcome.losses[-1] - plain.losses[-1], outcome.gain, outcome.exported]
        held = f"{outcome.held:.1f}" if outcome.held else "-"
        sizes = [f"{outcome.planned / 2**20:.1f}", held, f"{outcome.peak:.2f}"]
        rows.append([precision, *(f"{cell:.4f}" for cell in cells), *sizes])
    bounds = {
        "int8: last epoch within 0.02": abs(outcomes["int8"].losses[-1] - plain.losses[-1]) <= 0.02,
        "nf4 gains as much": outcomes["nf4"].gain >= plain.gain,
    }
    text = f"""{head_lines(f"; {arguments.rows} rows, {EPOCHS} epochs")}
{table(["prefix", *heads], rows)}

gap: last epoch's loss less that of the prefix as it is; planned: embeddings and frozen blocks; held: the frozen blocks
alone, counted after quantising

{bounds_text(bounds)}"""
    print(text)
    if arguments.save:
        save("quantised-prefix", text)
    return 0 if all(bounds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
