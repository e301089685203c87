"""What frozen blocks cost: the same trained top over a prefix of 6, 12, 24 and 48 blocks.

    python benchmarks/depth.py [--depths 6 12 24 48] [--rounds 3] [--shape exaone-2.4b] [--save]

Models of random weights with SmolLM2-135M's widths (or those of --shape): the blocks below the frost line vary, the
four above it and the head train. Each depth is trained by launch/train.py on a cold cache and then again on the warm
one, in a process of its own each; the order of the depths rotates from round to round. Times are medians of the
seconds of a step: in the first epoch of the cold run, in its later epochs, and in all of the warm run. Exits 1 if a
doubled depth changes a later epoch by 5 % or more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.contenders import Outcome, recipe_flags, run_toolkit, thread_variables  # noqa: E402
from benchmarks.report import bounds_text, head_lines, save, table  # noqa: E402
from benchmarks.workload import Workload, add_flags, prepare  # noqa: E402

DEPTHS = (6, 12, 24, 48)
Runs = dict[int, list[tuple[Outcome, Outcome]]]
"""By depth, for each round: the run that fills the cache, and the one that finds it full."""


def measure(workloads: dict[int, Workload], folder: Path, rounds: int) -> Runs:
    """Run every depth cold and warm once a round, the order of the depths rotated by one each time."""
    cached = "--prefix.cache_dir " in recipe_flags()
    depths, runs = list(workloads), Runs()
    for number in range(rounds):
        turn = number % len(depths)
        for depth in depths[turn:] + depths[:turn]:
            place = folder / f"{depth}-{number}"
            more = ("--prefix.cache", "on", "--prefix.cache_dir", str(place / "cache")) if cached else ()
            cold = run_toolkit(workloads[depth], place / "cold", *more)
            warm = run_toolkit(workloads[depth], place / "warm", *more)
            runs.setdefault(depth, []).append((cold, warm))
            print(f"round {number + 1}: {depth} frozen blocks: done", file=sys.stderr, flush=True)
    return runs


def step_seconds(outcomes: Sequence[Outcome], first: bool = True, later: bool = True) -> float:
    """Return the median seconds of a step, in the first epoch, the later ones or both."""
    seconds = []
    for outcome in outcomes:
        record, size = outcome.record, len(outcome.record.ends) // outcome.epochs
        steps = [end - start for start, end in zip(record.starts, record.ends, strict=True)]
        seconds += steps[0 if first else size : None if later else size]
    return statistics.median(seconds)


def result_table(runs: Runs) -> str:
    """Format one row a depth; each x is relative to the shallowest."""
    measures: list[tuple[str, str, Callable[[list[Outcome], list[Outcome]], float]]] = [
        ("cold: first epoch, ms a step", ".0f", lambda cold, warm: 1e3 * step_seconds(cold, later=False)),
        ("later epochs, ms a step", ".0f", lambda cold, warm: 1e3 * step_seconds(cold, first=False)),
        ("warm: ms a step", ".0f", lambda cold, warm: 1e3 * step_seconds(warm)),
        ("cold: peak GiB", ".2f", lambda cold, warm: max(run.peak_bytes for run in cold) / 2**30),
        ("warm: peak GiB", ".2f", lambda cold, warm: max(run.peak_bytes for run in warm) / 2**30),
    ]
    columns = ["frozen blocks", *(word for name, _, _ in measures for word in (name, "x"))]
    found = {
        depth: [take([cold for cold, _ in pairs], [warm for _, warm in pairs]) for _, _, take in measures]
        for depth, pairs in sorted(runs.items())
    }
    base = found[min(found)]
    return table(
        columns,
        [
            [str(depth), *(
                word
                for value, least, (_, form, _) in zip(values, base, measures, strict=True)
                for word in (format(value, form), f"{value / least:.2f}")
            )]
            for depth, values in found.items()
        ],
    )  # fmt: skip


def bounds(runs: Runs) -> dict[str, bool]:
    """Return for each doubling of the depth whether a later epoch costs the same."""
    found = {}
    for depth in sorted(runs):
        if 2 * depth in runs:
            less, more = (step_seconds([cold for cold, _ in runs[d]], first=False) for d in (depth, 2 * depth))
            change = more / less - 1
            found[f"{depth} to {2 * depth} frozen blocks: later epochs change by {change:+.1%}"] = abs(change) < 0.05
    return found


def main() -> int:
    """Write the models, run the rounds, print and save the table, check the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.set_defaults(shape="smollm2-135m", rows=10)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, help="frozen blocks; default: 6 12 24 48")
    parser.add_argument("--rounds", type=int, default=1, help="how often each depth runs; default: 1")
    parser.add_argument("--threads", type=int, help="threads of each process; default: one a core")
    parser.add_argument("--save", action="store_true", help="write the result under benchmarks/results/")
    given = parser.parse_args()
    if given.epochs < 2 or min(given.depths) < 1:
        parser.error("later epochs need --epochs of 2 or more, and a prefix --depths of 1 or more")
    thread_variables(given.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workloads = {d: prepare(folder / str(d), given, "--frozen", str(d)) for d in sorted(given.depths)}
        runs = measure(workloads, folder / "runs", given.rounds)
    held = bounds(runs)
    above = head_lines(f"; widths of {given.shape}, {given.rows} rows, {given.epochs} epochs, rounds: {given.rounds}")
    text = f"{above}\n{result_table(runs)}\n\n{bounds_text(held)}"
    print(text)
    if given.save:
        save(f"depth-{given.shape}", text)
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
