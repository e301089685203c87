"""Same learning: the toolkit against a plain loop with fp32 masters, and what the naive bf16 loop learns.

    python benchmarks/same_learning.py --data PATH/TO/ori_pqal.json [--rows 40] [--save]

SmolLM2-135M, top 4 blocks and untied head, batch 1, AdamW 1e-5, 3 epochs, on the first rows of PubMedQA. The toolkit
runs as a user runs it: launch/train.py in a process of its own. Exits 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.contenders import run_peer, run_toolkit, thread_variables  # noqa: E402
from benchmarks.record import SAME_LEARNING, rms  # noqa: E402
from benchmarks.report import bounds_text, head_lines, save, table  # noqa: E402
from benchmarks.workload import add_flags, prepare  # noqa: E402

TOOLKIT, MASTERS, NAIVE = "frostline", "plain, fp32 masters", "plain, bf16 AdamW"


def main() -> int:
    """Run all three, print one table, check the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--save", action="store_true", help="write the result under benchmarks/results/")
    given = parser.parse_args()
    thread_variables(None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload, path = prepare(folder, given), folder / "workload.json"
        runs = {
            TOOLKIT: run_toolkit(workload, folder / "toolkit"),
            MASTERS: run_peer(path, folder / "masters", "plain.py", ("--fp32-masters",)),
            NAIVE: run_peer(path, folder / "naive", "plain.py"),
        }
    apart = [abs(a - b) for a, b in zip(runs[TOOLKIT].record.losses, runs[MASTERS].record.losses, strict=True)]
    off = rms(runs[TOOLKIT].record.losses, runs[MASTERS].record.losses)
    gains = {name: run.losses[0] - run.losses[-1] for name, run in runs.items()}
    heads = ["loop", *(f"epoch {epoch + 1}" for epoch in range(given.epochs)), "gain"]
    rows = [[name, *(f"{mean:.4f}" for mean in (*run.losses, gains[name]))] for name, run in runs.items()]
    bounds = {
        f"steps within {SAME_LEARNING} of the plain loop (root mean square {off:.4f})": off <= SAME_LEARNING,
        "frostline gains at least 0.05": gains[TOOLKIT] >= 0.05,
        "naive bf16 stays within 0.01": abs(gains[NAIVE]) <= 0.01,
    }
    text = f"""{head_lines(f"; {given.rows} rows, {given.epochs} epochs")}
{table(heads, rows)}

largest step difference, {TOOLKIT} and {MASTERS}: {max(apart):.4f}

{bounds_text(bounds)}"""
    print(text)
    if given.save:
        save("same-learning", text)
    return 0 if all(bounds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
