"""Small updates: what each ``optim.name`` learns, beside float32 masters and moments.

    python benchmarks/optimizers.py --data PATH/TO/ori_pqal.json [--rows 40]

SmolLM2-135M, top 4 blocks and untied head, bfloat16, batch 1, AdamW 1e-5, 3 epochs, on the first rows of PubMedQA. The
toolkit runs as a user runs it: launch/train.py in a process of its own. What plain bf16 AdamW loses is shown by
benchmarks/same_learning.py. Exits 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.contenders import run_toolkit, thread_variables  # noqa: E402
from benchmarks.report import bounds_text, head_lines, save, table  # noqa: E402
from benchmarks.workload import add_flags, prepare  # noqa: E402
from toolkit.config.schema import OptimName  # noqa: E402


def main() -> int:
    """Run all, print one table, check the bounds."""
    names: tuple[OptimName, ...] = get_args(OptimName)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--optimizers", nargs="+", choices=names, default=names, help="default: all; adamw always runs")
    parser.add_argument("--threads", type=int, help="of each run; default: all cores")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side; only losses are measured")
    parser.add_argument("--save", action="store_true", help="write the result under benchmarks/results/")
    given = parser.parse_args()
    thread_variables(given.threads)
    chosen = [name for name in names if name in ("adamw", *given.optimizers)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.at_once) as pool:
        workload = prepare(Path(folder), given)
        pending = [pool.submit(run_toolkit, workload, Path(folder) / name, "--optim.name", name) for name in chosen]
        losses = {name: run.result().losses for name, run in zip(chosen, pending, strict=True)}
    epochs = [f"epoch {epoch + 1}" for epoch in range(given.epochs)]
    rows = [[name, *(f"{mean:.4f}" for mean in means), f"{means[0] - means[-1]:.4f}"] for name, means in losses.items()]
    reference = losses["adamw"][-1]
    bounds = {f"{name} ends within 0.01 of adamw": abs(losses[name][-1] - reference) <= 0.01 for name in chosen[1:]}
    bounds["adamw gains at least 0.05"] = losses["adamw"][0] - reference >= 0.05
    above = head_lines(f"; {given.rows} rows, {given.epochs} epochs")
    text = f"{above}\n{table(['optimizer', *epochs, 'gain'], rows)}\n\n{bounds_text(bounds)}"
    print(text)
    if given.save:
        save("optimizers", text)
    return 0 if all(bounds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
