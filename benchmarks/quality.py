"""What is learned, for what: masks beside each other on rows that none of them trained on.

    python benchmarks/quality.py --data PATH/TO/ori_pqal.json --minutes 60      # does the next runs, keeps them
    python benchmarks/quality.py --data PATH/TO/ori_pqal.json --prices          # times each mask: on a quiet machine
    python benchmarks/quality.py --data PATH/TO/ori_pqal.json                   # prints what there is
    python benchmarks/quality.py --data PATH/TO/ori_pqal.json --picture why.svg

Full fine-tuning, LoRA (rank 16, every linear layer) everywhere and in the last 4, 8 and 16 blocks, whole top blocks
with and without the head, and the head alone: SmolLM2-135M on PubMedQA's long answers, bfloat16, batch 1, AdamW, 10 %
linear warmup, linear decay, clipping at 1.0, two epochs.

Search: every mask gets the same number of learning rates, one seed each, and keeps the one of the lowest loss on the
validation rows. Result: with that rate, three other seeds; the epoch of the lowest validation loss is scored on the
test rows, which nothing has looked at until then. Each run is a cell of benchmarks/results/quality.json with date,
machine and versions; a cell that is there is not run again.

Losses do not depend on what else the machine does, seconds do. So they are measured apart: --prices trains each mask on
a fifth of the training rows, of evenly spread lengths and the longest among them, for two epochs on an empty cache;
seconds are scaled to the text of all rows. What else a machine does only adds: a row's step counts at the faster of its
epochs, and of several measurements on one machine the fastest is kept. adapters.py has peft under transformers' Trainer
beside two of the masks: the same losses, for other seconds.

    test        mean loss on the test rows, with the range over the seeds; base is the model before training
    seconds     training alone, the filling of an empty cache included, validations left out
    within      lowest validation loss of the search that takes no more than these seconds, or this memory
    peak        most resident memory of the process
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import date
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.contenders import Outcome, run_toolkit, thread_variables  # noqa: E402
from benchmarks.quality_cells import (  # noqa: E402
    EPOCHS,
    MASKS,
    SEEDS,
    Cell,
    cell_key,
    cheaper,
    draw,
    equal_cost,
    next_cells,
    price_key,
    result_table,
)
from benchmarks.report import hardware, head_lines, versions  # noqa: E402
from benchmarks.workload import Workload  # noqa: E402
from toolkit.runtime.paths import replace_text  # noqa: E402

CELLS = ROOT / "benchmarks" / "results" / "quality.json"
MODEL = "bundled:smollm2-135m"
PARTS = {"train": 200, "validation": 100, "test": 100}
"""Rows of each part of the file, in its order."""
PRICE_EVERY = 5
"""One in so many training rows is trained to measure seconds."""


def write_rows(data: Path, folder: Path) -> float:
    """Write train.json, validation.json and test.json: the file's first rows, the next and the ones after.

    Also writes price.json, a fifth of train.json; returns how many times the characters of it train.json has.
    """
    rows = iter(json.loads(data.read_text(encoding="utf-8")).items())
    parts = {name: dict(islice(rows, count)) for name, count in PARTS.items()}
    by_length = sorted(parts["train"].items(), key=lambda item: len(json.dumps(item[1])))
    parts["price"] = dict(by_length[PRICE_EVERY - 1 :: PRICE_EVERY])
    for name, part in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
    return len(json.dumps(parts["train"])) / len(json.dumps(parts["price"]))


def provenance() -> Cell:
    """Return date, machine and versions of a cell."""
    return {"date": str(date.today()), "machine": hardware(), "versions": versions(("torch", "transformers", "peft"))}


def train_mask(data: Path, scratch: Path, mask: str, rate: float, seed: int, cache: Path, *flags: str) -> Outcome:
    """Train a mask on the rows of ``data`` into ``scratch``, which is made.

    Raises:
        DoesNotFitError: it ran out of memory.
        RuntimeError: it failed otherwise.
    """
    orders = [list(range(len(json.loads(data.read_text(encoding="utf-8")))))] * EPOCHS
    return run_toolkit(
        Workload(MODEL, str(data), [], orders, seed, rate), scratch, "--mask.train", *MASKS[mask][0],
        "--mask.tied", "both" if mask == "full" else "untie", "--prefix.cache_dir", str(cache), *flags,
    )  # fmt: skip


def run_cell(folder: Path, mask: str, rate: float, seed: int, with_test: bool) -> Cell:
    """Train once; return the losses. Runs share a cache, which does not change them."""
    flags = ["--data.validation", str(folder / "validation.json"), "--output.sample_answers", "0"]
    flags += ["--output.keep", str(EPOCHS)]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name) / "scratch"
        outcome = train_mask(folder / "train.json", scratch, mask, rate, seed, folder / "cache", *flags)
        rows = map(json.loads, (scratch / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
        cell: Cell = {"validation": losses, "trained": outcome.record.trainable, **provenance()}
        if with_test:
            cell["test"] = evaluate(str(scratch / "run"), folder / "test.json", "--step", "best")
    return cell


def run_cells(path: Path, folder: Path, masks: Sequence[str], minutes: float, processes: int) -> None:
    """Run what is missing in the cells of ``path``, so many at once, and start none after the minutes."""
    end = time.monotonic() + 60 * minutes
    running: dict[Future[Cell], tuple[str, float, int]] = {}
    with ThreadPoolExecutor(processes) as pool:
        while True:
            missing = (cell for cell in next_cells(read_cells(path), masks) if cell not in running.values())
            while len(running) < processes and time.monotonic() < end and (cell := next(missing, None)):
                running[pool.submit(run_cell, folder, *cell, with_test=cell[2] in SEEDS)] = cell
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                keep(path, cell_key(*running.pop(done)), done.result())


def measure_price(folder: Path, mask: str, scale: float) -> Cell:
    """Train price.json on an empty cache; return the seconds at the end of each epoch of all rows, and the memory."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name) / "scratch"
        outcome = train_mask(folder / "price.json", scratch, mask, 1e-5, 0, Path(name) / "cache")
        rows = [json.loads(line) for line in (scratch / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [(row["tokens"], row["seconds"]) for row in rows if "loss" in row]
    size = len(steps) // EPOCHS
    by_length = [sorted(steps[size * epoch :][:size]) for epoch in range(EPOCHS)]
    one_epoch = sum(min(seconds for _, seconds in same_row) for same_row in zip(*by_length, strict=True))
    filling = outcome.record.starts[0] - outcome.begin
    seconds = [round(scale * (filling + one_epoch * (epoch + 1)), 1) for epoch in range(EPOCHS)]
    return {"seconds": seconds, "peak_gib": round(outcome.peak_bytes / 2**30, 3), **provenance()}


def evaluate(source: str, data: Path, *flags: str) -> float:
    """Return the loss that launch/evaluate.py prints for a run or a model."""
    command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), source, "--data.path", str(data), *flags]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(json.loads(printed.splitlines()[-1])["loss"])


def read_cells(path: Path) -> dict[str, Cell]:
    """Return the cells that are kept."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def keep(path: Path, key: str, cell: Cell) -> None:
    """Add a cell to those that are kept, also by another process meanwhile; the file is written whole or not at all."""
    replace_text(path, json.dumps({**read_cells(path), key: cell}, indent=1) + "\n")
    print(f"{key}: {cell.get('validation') or cell.get('seconds')}", file=sys.stderr, flush=True)


def main() -> int:
    """Run what the minutes allow, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="PubMedQA's ori_pqal.json")
    parser.add_argument("--minutes", type=float, default=0, help="start runs for so long; default: 0, print alone")
    parser.add_argument("--prices", action="store_true", help="measure seconds and memory of every mask anew")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS), help="run these alone; default: all")
    parser.add_argument("--cells", type=Path, default=CELLS, help="where runs are kept; default: benchmarks/results")
    parser.add_argument("--processes", type=int, default=1, help="runs at once, for their losses; default: 1")
    parser.add_argument("--threads", type=int, help="threads of each process; default: one a core")
    parser.add_argument("--picture", type=Path, help="also draw, as .svg or .png")
    given = parser.parse_args()
    thread_variables(given.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scale = write_rows(given.data, folder)
        if given.minutes and "base" not in read_cells(given.cells):
            losses = {part: evaluate(MODEL, folder / f"{part}.json") for part in ("validation", "test")}
            keep(given.cells, "base", losses)
        for mask in given.masks if given.prices else ():
            keep(
                given.cells, price_key(mask), cheaper(read_cells(given.cells), mask, measure_price(folder, mask, scale))
            )
        run_cells(given.cells, folder, given.masks, given.minutes, given.processes)
    cells = read_cells(given.cells)
    done = sum("trained" in cell for cell in cells.values())
    base = cells.get("base", {"validation": float("nan"), "test": float("nan")})
    print(head_lines(f"; rows: {', '.join(f'{n} {part}' for part, n in PARTS.items())}; {done} runs so far"))
    print(f"base: validation {base['validation']:.3f}, test {base['test']:.3f}\n")
    print(f"{result_table(cells)}\n\n{equal_cost(cells)}")
    if given.picture:
        draw(cells, given.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
