"""What is learned, for what: masks beside each other on rows that none of them trained on.

    python benchmarks/quality.py --data PATH/TO/ori_pqal.json --minutes 60      # does the next runs, keeps them
    python benchmarks/quality.py --data PATH/TO/ori_pqal.json --prices          # times each mask: on a quiet machine
    python benchmarks/quality.py --data PATH/TO/ori_pqal.json                   # prints what there is
    python benchmarks/quality.py --data PATH/TO/ori_pqal.json --png quality.png

Full fine-tuning, LoRA (rank 16, every linear layer) everywhere and in the last 4, 8 and 16 blocks, whole top blocks
with and without the head, and the head alone: SmolLM2-135M on PubMedQA's long answers, bfloat16, batch 1, AdamW, 10 %
linear warmup, linear decay, clipping at 1.0, two epochs.

Search: every mask gets the same number of learning rates, one seed each, and keeps the one of the lowest loss on the
validation rows. Result: with that rate, three other seeds; the epoch of the lowest validation loss is scored on the
test rows, which nothing has looked at until then. Each run is a cell of benchmarks/results/quality.json with date,
machine and versions; a cell that is there is not run again.

Losses do not depend on what else the machine does, seconds do. So they are measured apart: --prices trains each mask on
a fifth of the training rows, of evenly spread lengths and the longest among them, for two epochs on an empty cache;
seconds are scaled to the text of all rows. adapters.py has peft under transformers' Trainer beside two of the masks:
the same losses, for other seconds.

    test        mean loss on the test rows, with the range over the seeds; base is the model before training
    seconds     training alone, the filling of an empty cache included, validations left out
    N s, N GiB  lowest validation loss of the search that takes no more than N seconds, or N GiB
    peak        most resident memory of the process
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.contenders import Outcome, run_toolkit, thread_variables  # noqa: E402
from benchmarks.report import hardware, head_lines, table, versions  # noqa: E402
from benchmarks.workload import Workload  # noqa: E402
from toolkit.runtime.paths import replace_text  # noqa: E402

CELLS = ROOT / "benchmarks" / "results" / "quality.json"
MODEL = "bundled:smollm2-135m"
PARTS = {"train": 200, "validation": 100, "test": 100}
"""Rows of each part of the file, in its order."""
EPOCHS = 2
PRICE_EVERY = 5
"""One in so many training rows is trained to measure seconds."""
SEEDS = (1, 2, 3)
"""Of the result; the search has seed 0."""
WHOLE, LOW_RANK = (1e-4, 3e-5, 3e-4), (5e-4, 2e-4, 1e-3)
"""Learning rates of whole tensors and of adapters, in the order of the search."""


def lora(select: str) -> str:
    """Return the recipe's entry of adapters beside every linear layer of what ``select`` selects."""
    return json.dumps({"lora": {"select": select, "rank": 16, "alpha": 32}})


MASKS: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "LoRA, last 8": ((lora("last:8"),), LOW_RANK),
    "top 8": (("last:8",), WHOLE),
    "LoRA, all": ((lora("all"),), LOW_RANK),
    "top 4 + head": (("last:4", "head"), WHOLE),
    "LoRA, last 4": ((lora("last:4"),), LOW_RANK),
    "top 4": (("last:4",), WHOLE),
    "LoRA, last 16": ((lora("last:16"),), LOW_RANK),
    "top 8 + head": (("last:8", "head"), WHOLE),
    "head": (("head",), WHOLE),
    "full": (("all",), WHOLE),
}
"""By name: entries of mask.train, and the learning rates to search."""

Cell = dict[str, Any]


def cell_key(mask: str, rate: float, seed: int) -> str:
    """Return the name that a run is kept under."""
    return f"{mask} | {rate:g} | seed {seed}"


def price_key(mask: str) -> str:
    """Return the name that the seconds and the memory of a mask are kept under."""
    return f"{mask} | price"


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


def train_mask(folder: Path, part: str, mask: str, rate: float, seed: int, cache: str, *flags: str) -> Outcome:
    """Train a mask on the rows of ``part`` into ``folder/scratch``; ``cache`` is a folder in ``folder``.

    Raises:
        DoesNotFitError: it ran out of memory.
        RuntimeError: it failed otherwise.
    """
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    data = folder / f"{part}.json"
    orders = [list(range(len(json.loads(data.read_text(encoding="utf-8")))))] * EPOCHS
    return run_toolkit(
        Workload(MODEL, str(data), [], orders, seed, rate), folder / "scratch", "--mask.train", *MASKS[mask][0],
        "--mask.tied", "both" if mask == "full" else "untie", "--prefix.cache_dir", str(folder / cache), *flags,
    )  # fmt: skip


def run_cell(folder: Path, mask: str, rate: float, seed: int, with_test: bool) -> Cell:
    """Train once; return the losses. Runs share a cache, which does not change them."""
    flags = ["--data.validation", str(folder / "validation.json"), "--output.sample_answers", "0"]
    outcome = train_mask(folder, "train", mask, rate, seed, "cache", *flags, "--output.keep", str(EPOCHS))
    run = folder / "scratch" / "run"
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    cell: Cell = {"validation": losses, "trained": outcome.record.trainable, **provenance()}
    if with_test:
        cell["test"] = evaluate(str(run), folder / "test.json", "--step", "best")
    return cell


def measure_price(folder: Path, mask: str, scale: float) -> Cell:
    """Train price.json on an empty cache; return the seconds at the end of each epoch of all rows, and the memory."""
    outcome = train_mask(folder, "price", mask, 1e-5, 0, "scratch/cache")
    record, size = outcome.record, len(outcome.record.ends) // EPOCHS
    steps = [end - start for start, end in zip(record.starts, record.ends, strict=True)]
    filling = record.starts[0] - outcome.begin
    seconds = [round(scale * (filling + sum(steps[: (epoch + 1) * size])), 1) for epoch in range(EPOCHS)]
    return {"seconds": seconds, "peak_gib": round(outcome.peak_bytes / 2**30, 3), **provenance()}


def evaluate(source: str, data: Path, *flags: str) -> float:
    """Return the loss that launch/evaluate.py prints for a run or a model."""
    command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), source, "--data.path", str(data), *flags]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(json.loads(printed.splitlines()[-1])["loss"])


def chosen_rate(cells: dict[str, Cell], mask: str) -> float | None:
    """Return the rate of the lowest validation loss in the search; None until all rates have run."""
    rates = MASKS[mask][1]
    found = {rate: cells.get(cell_key(mask, rate, 0)) for rate in rates}
    if not all(found.values()):
        return None
    return min(rates, key=lambda rate: min(found[rate]["validation"]))  # type: ignore[index]


def next_cells(cells: dict[str, Cell]) -> Iterator[tuple[str, float, int]]:
    """Yield mask, rate and seed of what has not run: the search first, then the seeds of the result."""
    for turn in range(max(len(rates) for _, rates in MASKS.values())):
        for mask, (_, rates) in MASKS.items():
            if cell_key(mask, rates[turn], 0) not in cells:
                yield mask, rates[turn], 0
    for seed in SEEDS:
        for mask in MASKS:
            rate = chosen_rate(cells, mask)
            if rate is not None and cell_key(mask, rate, seed) not in cells:
                yield mask, rate, seed


def save(cells: dict[str, Cell], path: Path) -> None:
    """Write the cells at once or not at all."""
    replace_text(path, json.dumps(cells, indent=1) + "\n")


def result_table(cells: dict[str, Cell]) -> str:
    """Format one row a mask; a dash where runs are missing."""
    rows = []
    for mask, (_, rates) in MASKS.items():
        search = [cells[key] for rate in rates if (key := cell_key(mask, rate, 0)) in cells]
        rate = chosen_rate(cells, mask)
        results = [cells[key] for seed in SEEDS if rate and (key := cell_key(mask, rate, seed)) in cells]
        every = [*search, *results]
        if not every:
            rows.append([mask, *["–"] * (5 + EPOCHS)])
            continue
        tests = sorted(cell["test"] for cell in results)
        test = f"{sum(tests) / len(tests):.3f} ({tests[0]:.3f}–{tests[-1]:.3f})" if tests else "–"
        best = min(search, key=lambda cell: min(cell["validation"]))
        price = cells.get(price_key(mask))
        rows.append(
            [
                mask, f"{every[0]['trained']:,}", f"{rate:g}" if rate else f"{len(search)} of {len(rates)}",
                *(f"{loss:.3f}" for loss in best["validation"]), test,
                *([f"{price['seconds'][-1]:.0f}", f"{price['peak_gib']:.2f}"] if price else ["–", "–"]),
            ]
        )  # fmt: skip
    epochs = [f"validation {epoch + 1}" for epoch in range(EPOCHS)]
    return table(["mask", "trained", "rate", *epochs, "test (3 seeds)", "seconds", "peak GiB"], rows)


def equal_cost(cells: dict[str, Cell]) -> str:
    """Format the lowest validation loss that each mask of the search reaches within a time, and within a memory."""
    points = [
        (mask, seconds, price["peak_gib"], loss)
        for mask, (_, rates) in MASKS.items()
        if (price := cells.get(price_key(mask)))
        for rate in rates
        if (cell := cells.get(cell_key(mask, rate, 0)))
        for seconds, loss in zip(price["seconds"], cell["validation"], strict=True)
    ]
    if not points:
        return ""
    times = sorted({round(max(p[1] for p in points if p[0] == mask)) for mask in {p[0] for p in points}})
    sizes = sorted({round(p[2] + 0.05, 1) for p in points})
    columns = ["mask", *(f"{limit} s" for limit in times), *(f"{limit} GiB" for limit in sizes)]
    rows = []
    for mask in {p[0]: None for p in points}:
        own = [p for p in points if p[0] == mask]
        within = [[p[3] for p in own if p[1] <= limit + 0.5] for limit in times]
        within += [[p[3] for p in own if p[2] <= limit] for limit in sizes]
        rows.append([mask, *(f"{min(losses):.3f}" if losses else "–" for losses in within)])
    return table(columns, rows)


def draw(cells: dict[str, Cell], path: Path) -> None:
    """Draw the lowest validation loss of each mask against seconds and against memory (needs matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_time, by_memory) = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for mask, (_, rates) in MASKS.items():
        search = [cells[key] for rate in rates if (key := cell_key(mask, rate, 0)) in cells]
        price = cells.get(price_key(mask))
        if search and price:
            best = min(search, key=lambda cell: min(cell["validation"]))
            style = {"marker": "o", "label": mask, "linestyle": "-" if mask.startswith("LoRA") else "--"}
            by_time.plot(price["seconds"], best["validation"], **style)
            by_memory.plot([price["peak_gib"]], [min(best["validation"])], **style)
    by_time.set(xlabel="seconds of training", ylabel="validation loss")
    by_memory.set(xlabel="peak memory, GiB")
    by_memory.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    """Run what the minutes allow, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="PubMedQA's ori_pqal.json")
    parser.add_argument("--minutes", type=float, default=0, help="start runs for so long; default: 0, print alone")
    parser.add_argument("--prices", action="store_true", help="measure seconds and memory of every mask anew")
    parser.add_argument("--cells", type=Path, default=CELLS, help="where runs are kept; default: benchmarks/results")
    parser.add_argument("--threads", type=int, help="threads of each process; default: one a core")
    parser.add_argument("--png", type=Path, help="also draw the picture")
    given = parser.parse_args()
    thread_variables(given.threads)
    cells: dict[str, Cell] = json.loads(given.cells.read_text()) if given.cells.exists() else {}
    end = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scale = write_rows(given.data, folder)
        if given.minutes and "base" not in cells:
            cells["base"] = {part: evaluate(MODEL, folder / f"{part}.json") for part in ("validation", "test")}
            save(cells, given.cells)
        for mask in MASKS if given.prices else ():
            cells[price_key(mask)] = measure_price(folder, mask, scale)
            save(cells, given.cells)
            print(f"{price_key(mask)}: {cells[price_key(mask)]['seconds']} s", file=sys.stderr, flush=True)
        while time.monotonic() < end and (cell := next(next_cells(cells), None)):
            mask, rate, seed = cell
            cells[cell_key(*cell)] = run_cell(folder, mask, rate, seed, with_test=seed in SEEDS)
            save(cells, given.cells)
            print(f"{cell_key(*cell)}: {cells[cell_key(*cell)]['validation']}", file=sys.stderr, flush=True)
    done = sum("trained" in cell for cell in cells.values())
    base = cells.get("base", {"validation": float("nan"), "test": float("nan")})
    print(head_lines(f"; rows: {', '.join(f'{n} {part}' for part, n in PARTS.items())}; {done} runs so far"))
    print(f"base: validation {base['validation']:.3f}, test {base['test']:.3f}\n")
    print(f"{result_table(cells)}\n\n{equal_cost(cells)}")
    if given.png:
        draw(cells, given.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
