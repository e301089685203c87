"""What adapters above the frost line cost: the toolkit beside peft's LoRA under transformers' Trainer.

    python benchmarks/adapters.py --data PATH/TO/ori_pqal.json [--micro-batch 8] [--rounds 3] [--save]

LoRA of rank 16 beside every linear layer, in the last eight blocks and in all, of SmolLM2-135M (or of a --shape of
random weights), on the same rows in the same order: bfloat16, AdamW 5e-4, 10 % linear warmup, linear decay, clipping at
1.0. Of several rows a step peft + Trainer pads each to the longest, the toolkit packs them, as either does by default.
Columns and rounds are those of partial_finetuning.py; x is peft's run divided by this one.

Exits 1 if a bound is missed. With --shape, only the bounds on the losses count.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.contenders import (  # noqa: E402
    Outcome,
    outcome_columns,
    outcome_row,
    ratio,
    run_peer,
    run_toolkit,
    thread_variables,
)
from benchmarks.report import bounds_text, head_lines, save, table  # noqa: E402
from benchmarks.workload import Workload, add_flags, prepare  # noqa: E402

BLOCKS, RATE = 8, 5e-4
TOP_PEER, TOP_COLD, TOP_WARM = (
    "peft + Trainer, last 8",
    "frostline, last 8, cold cache",
    "frostline, last 8, warm cache",
)
ALL_PEER, ALL_OURS = "peft + Trainer, all blocks", "frostline, all blocks"
NAMES = (TOP_PEER, TOP_COLD, TOP_WARM, ALL_PEER, ALL_OURS)


def run(name: str, workload: Workload, folder: Path, number: int) -> Outcome:
    """Run a contender once; the warm cache is that of the cold run before it."""
    scratch = folder / f"{number}-{NAMES.index(name)}"
    if name in (TOP_PEER, ALL_PEER):
        switches = ("--everywhere",) if name == ALL_PEER else ()
        return run_peer(folder / "workload.json", scratch, "peft_trainer.py", switches)
    selector = "all" if name == ALL_OURS else f"last:{BLOCKS}"
    entry = json.dumps({"lora": {"select": selector, "rank": 16, "alpha": 32}})
    cached = () if name == ALL_OURS else ("--prefix.cache", "on", "--prefix.cache_dir", str(folder / f"cache-{number}"))
    return run_toolkit(workload, scratch, "--mask.train", entry, *cached)


def peer_of(name: str) -> str:
    """Return the peer with the same adapters."""
    return ALL_PEER if name in (ALL_PEER, ALL_OURS) else TOP_PEER


def result_table(results: dict[str, list[Outcome]], epochs: int) -> str:
    """Format one row a contender; ratios are medians of those within a round."""
    rows = [outcome_row(name, runs, results[peer_of(name)]) for name, runs in results.items()]
    return table(outcome_columns(epochs), rows)


def bounds(results: dict[str, list[Outcome]], speed: bool) -> dict[str, bool]:
    """Return whether each claim holds."""
    found = {}
    for peer, ours in ((TOP_PEER, TOP_COLD), (ALL_PEER, ALL_OURS)):
        counts = [results[name][0].record.trainable for name in (peer, ours)]
        found[f"{ours} trains as many parameters as {peer} ({counts[1]:,} and {counts[0]:,})"] = counts[0] == counts[1]
        apart = abs(results[ours][0].losses[-1] - results[peer][0].losses[-1])
        found[f"{ours} ends within 0.05 of the loss of {peer} ({apart:.4f})"] = apart < 0.05
    claims: list[tuple[str, float, str, Callable[[Outcome], float]]] = [
        (TOP_COLD, 2.0, "run", lambda o: o.run), (TOP_COLD, 3.0, "later epoch", lambda o: o.later_epoch),
        (TOP_WARM, 2.0, "peak memory", lambda o: o.peak_bytes), (TOP_COLD, 2.0, "peak memory", lambda o: o.peak_bytes),
        (ALL_OURS, 1.0, "run", lambda o: o.run), (ALL_OURS, 1.0, "peak memory", lambda o: o.peak_bytes),
    ]  # fmt: skip
    for name, factor, what, measure in claims if speed else []:
        times = ratio(results[peer_of(name)], results[name], measure)
        found[f"{what}: {name} {factor}x below peft + Trainer (measured {times:.2f}x)"] = times >= factor
    return found


def main() -> int:
    """Prepare the workload, run the rounds, print and save the table, check the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--micro-batch", type=int, default=1, help="rows of a step; default: 1")
    parser.add_argument("--rounds", type=int, default=1, help="how often each contender runs; default: 1")
    parser.add_argument("--threads", type=int, help="threads of each process; default: one a core")
    parser.add_argument("--directory", type=Path, help="where models, caches and runs go; default: a temporary one")
    parser.add_argument("--save", action="store_true", help="write the result under benchmarks/results/")
    given = parser.parse_args()
    thread_variables(given.threads)
    results: dict[str, list[Outcome]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory(dir=given.directory) as folder:
        workload = prepare(Path(folder), given)
        workload = replace(workload, last=BLOCKS, learning_rate=RATE, micro_batch=given.micro_batch)
        workload.save(Path(folder) / "workload.json")
        for number in range(given.rounds):
            for name in NAMES:
                results[name].append(run(name, workload, Path(folder), number))
                print(f"round {number + 1}: {name}: run {results[name][-1].run:.1f} s", file=sys.stderr, flush=True)
    rows = f"{given.rows} rows, {given.micro_batch} a step"
    above = head_lines(f"; {given.shape or 'SmolLM2-135M'}, {rows}, {given.epochs} epochs")
    held = bounds(results, speed=given.shape is None)
    text = f"{above}\n{result_table(results, given.epochs)}\n\n{bounds_text(held)}"
    print(text)
    if given.save:
        rows = f"-{given.micro_batch}-a-step" if given.micro_batch > 1 else ""
        save(f"adapters{f'-{given.shape}' if given.shape else ''}{rows}", text)
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
