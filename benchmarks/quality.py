"""What is learned, for what: masks beside each other on rows that none of them trained on.

    python benchmarks/quality.py --data PATH/TO/ori_pqal.json --minutes 60      # does the next runs, keeps them
    python benchmarks/quality.py --data PATH/TO/ori_pqal.json --minutes 60 --task decision        # yes, no or maybe
    python benchmarks/quality.py --data PATH/TO/ori_pqal.json --prices          # times each mask: on a quiet machine
    python benchmarks/quality.py --data PATH/TO/ori_pqal.json                   # prints what there is
    python benchmarks/quality.py --data PATH/TO/ori_pqal.json --picture why.svg
    python benchmarks/quality.py --data PATH/TO/ori_pqal.json --slice --dtype float32     # 20 minutes on two cores

Full fine-tuning, LoRA (rank 16, every linear layer) everywhere and in the last 4, 8 and 16 blocks, QLoRA (the same
beside linear layers in nf4), LISA, the top 1, 2, 4 and 8 blocks whole with and without the head, and the head alone:
SmolLM2-135M, batch 1, AdamW, 10 % linear warmup, linear decay, clipping at 1.0, two epochs. Beside them the reference
implementation of LoRA, peft under transformers' Trainer. The core (LoRA everywhere and in the last 8, top 4 with and
without head, head, full) comes first.

Tasks, both on PubMedQA, 200 rows to train on and 100 to choose by: ``long_answer``, the authors' conclusion, 100 test
rows, all in the file's order; and ``decision``, yes, no or maybe by question and contexts, the conclusion withheld, on
official training questions, tested on the 500 official test questions (test_ground_truth.json beside the rows), scored
by likelihood.

Search: every mask gets the same number of learning rates, one seed each, and keeps the one of the lowest loss on the
validation rows. Result: with that rate, three other seeds; the epoch of the lowest validation loss is scored on the
test rows, which nothing has looked at until then. Each run is a cell of benchmarks/results/quality.json with date,
machine, versions and precision; a cell that is there is not run again. A run that fails is said, and left for the next
start.

Losses do not depend on what else the machine does, seconds do. So they are measured apart: --prices trains each mask on
a fifth of the training rows, of evenly spread lengths and the longest among them, for two epochs on an empty cache;
seconds are scaled to the text of all rows. What else a machine does only adds: a row's step counts at the faster of its
epochs, and of several measurements on one machine the fastest is kept.

    base, trivial  the model before training and, of decisions, what evaluate.py says of trivial answers
    test        mean loss on the test rows, with the range over the seeds
    95 %        intervals over the test rows, of the seed whose test loss is in the middle; to base: paired difference
    drift       loss on the base's own answers to everyday prompts, less the base's own; the first seed alone
    seconds     training alone, the filling of an empty cache included, validations left out
    within      lowest validation loss of the search that takes no more than these seconds, or this memory
    peak        most resident memory of the process, or memory held on the GPU

--slice is a small piece of all that: 40 training rows, 20 validation and 20 test rows, one rate, one seed, one epoch,
the core alone, without drift. Its cells are in no table of results: they are kept where --cells says, or nowhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.contenders import DoesNotFitError, thread_variables  # noqa: E402
from benchmarks.quality_cells import (  # noqa: E402
    CORE,
    DECISION,
    LONG_ANSWER,
    MASKS,
    TASKS,
    Cell,
    Run,
    Study,
    cheaper,
    next_cells,
    slice_of,
    with_cell,
)
from benchmarks.quality_runs import TRUTH, Bench, write_rows  # noqa: E402
from benchmarks.quality_table import draw, equal_cost, footnotes, missing_line, result_table  # noqa: E402
from benchmarks.report import head_lines  # noqa: E402
from toolkit.runtime.paths import replace_text  # noqa: E402

CELLS = ROOT / "benchmarks" / "results" / "quality.json"
SLICE_MINUTES = 20


def run_cells(
    path: Path, study: Study, run_cell: Callable[[str, float, int], Cell], masks: Sequence[str], minutes: float,
    processes: int = 1, again: bool = False,
) -> list[Run]:  # fmt: skip
    """Run what is missing in the cells of ``path``, so many at once, and start none after the minutes.

    Returns the runs that failed, whose errors are printed.
    """
    end = time.monotonic() + 60 * minutes
    running: dict[Future[Cell], Run] = {}
    begun: set[Run] = set()
    failed: list[Run] = []
    with ThreadPoolExecutor(processes) as pool:
        while True:
            missing = (run for run in next_cells(read_cells(path), masks, study, again) if run not in begun)
            while len(running) < processes and time.monotonic() < end and (run := next(missing, None)):
                running[pool.submit(run_cell, *run)] = run
                begun.add(run)
            if not running:
                return failed
            for finished in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(finished)
                key = study.cell_key(*run)
                if error := finished.exception():
                    failed.append(run)
                    print(f"{key} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    continue
                cell = dict(finished.result())
                rivals = cell.pop("rivals", None)
                keep(path, key, cell)
                if rivals and study.key("rivals") not in read_cells(path):
                    common = ("date", "machine", "dtype", "test_rows")
                    same: Cell = {name: cell[name] for name in common if name in cell}
                    keep(path, study.key("rivals"), {**same, "scores": rivals})


def read_cells(path: Path) -> dict[str, Cell]:
    """Return the cells that are kept."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def keep(path: Path, key: str, cell: Cell) -> None:
    """Add a cell to those that are kept, also by another process meanwhile; the file is written whole or not at all."""
    replace_text(path, json.dumps(with_cell(read_cells(path), key, cell), indent=1) + "\n")
    print(f"{key}: {cell.get('validation') or cell.get('seconds')}", file=sys.stderr, flush=True)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; adds the study as ``study``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="PubMedQA's ori_pqal.json")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], help=f"default: {TASKS[0]}")
    parser.add_argument("--minutes", type=float, help="start runs for so long; default: 0, print alone")
    parser.add_argument("--prices", action="store_true", help="measure seconds and memory of every mask anew")
    parser.add_argument("--masks", nargs="+", choices=MASKS, help="run these alone; default: all, of a slice the core")
    parser.add_argument("--cells", type=Path, help="where runs are kept; default: benchmarks/results")
    parser.add_argument("--processes", type=int, default=1, help="runs at once, for their losses; default: 1")
    parser.add_argument("--threads", type=int, help="threads of each process; default: one a core")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16",
        help="precision of the model; float32 where bfloat16 is emulated: their losses differ by about 0.001; default: "
        "bfloat16",
    )  # fmt: skip
    parser.add_argument("--test-rows", type=int, help="score so many test rows; default: 100, and 500 of decisions")
    parser.add_argument("--no-drift", action="store_true", help="do not score the base's everyday answers")
    parser.add_argument("--again", action="store_true", help="also run results again that have no intervals")
    parser.add_argument("--slice", action="store_true", help=f"a small piece of it all, in {SLICE_MINUTES} minutes")
    parser.add_argument("--picture", type=Path, help="also draw, as .svg or .png")
    given = parser.parse_args(words)
    if given.task == "decision" and not (given.data.parent / TRUTH).exists():
        parser.error(f"decisions are tested on PubMedQA's official test questions: {TRUTH} is not beside {given.data}")
    if given.slice and given.cells is not None and given.cells.resolve() == CELLS:
        parser.error("cells of a slice are of other rows than those of quality.json; give --cells another file")
    study = slice_of(given.task) if given.slice else DECISION if given.task == "decision" else LONG_ANSWER
    rows = {**study.rows, "test": given.test_rows or study.rows["test"]}
    given.study = replace(study, rows=rows)
    given.masks = given.masks or list(CORE if given.slice else MASKS)
    given.minutes = given.minutes if given.minutes is not None else SLICE_MINUTES if given.slice else 0
    return given


def measure(given: argparse.Namespace, path: Path, folder: Path) -> bool:
    """Do what the command line asks for; return whether a run or a measurement failed."""
    study: Study = given.study
    scale = write_rows(given.data, folder, study)
    bench = Bench(folder, study, given.dtype, drift=not (given.no_drift or given.slice))
    end = time.monotonic() + 60 * given.minutes
    if given.minutes and study.key("base") not in read_cells(path):
        keep(path, study.key("base"), bench.base_cell())
    failed = False
    for mask in given.masks if given.prices else ():
        key = study.price_key(mask)
        try:
            price = bench.measure_price(mask, scale)
        except (DoesNotFitError, OSError, RuntimeError) as error:
            failed = True
            print(f"{key} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            continue
        keep(path, key, cheaper(read_cells(path), key, price))
    left = max(0.0, end - time.monotonic()) / 60
    return bool(run_cells(path, study, bench.run_cell, given.masks, left, given.processes, given.again)) or failed


def main(words: Sequence[str] | None = None) -> int:
    """Run what the minutes allow, then print the tables; 1 if a run failed."""
    given = parse(words)
    study: Study = given.study
    thread_variables(given.threads)
    with tempfile.TemporaryDirectory() as name:
        path = given.cells or (Path(name) / "cells.json" if given.slice else CELLS)
        failed = measure(given, path, Path(name))
        cells = read_cells(path)
    rows = ", ".join(f"{count} {part}" for part, count in study.rows.items())
    print(head_lines(f"; {study.task}; rows: {rows}; {study.epochs} epoch(s)"))
    if base := cells.get(study.key("base")):
        print(f"base: validation {base['validation']:.3f}, test {base['test']:.3f}\n")
    print(f"{result_table(cells, study)}\n\n{missing_line(cells, study, given.masks, given.again)}\n")
    print(f"{footnotes(cells, study)}\n\n{equal_cost(cells, study)}")
    if given.picture:
        draw(cells, given.picture, [study] if given.slice else [LONG_ANSWER, DECISION])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
