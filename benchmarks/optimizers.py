"""Small updates: what each ``optim.name`` learns, beside float32 masters and beside plain bf16 AdamW, which loses them.

    python benchmarks/optimizers.py --data PATH/TO/ori_pqal.json [--rows 40]

SmolLM2-135M, top 4 blocks and untied head, bfloat16, batch 1, AdamW 1e-5, 3 epochs, on the first rows of PubMedQA. The
toolkit runs as a user runs it: launch/train.py in a process of its own. Exits 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.contenders import run_peer, run_toolkit, thread_variables  # noqa: E402
from benchmarks.report import bounds_text, head_lines  # noqa: E402
from benchmarks.workload import add_flags, prepare  # noqa: E402
from toolkit.config.schema import OptimName  # noqa: E402

NAIVE = "plain, bf16 AdamW"


def main() -> int:
    """Run all, print one table, check the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    given = parser.parse_args()
    thread_variables(None)
    names: tuple[OptimName, ...] = get_args(OptimName)
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        workload, path = prepare(folder, given), folder / "workload.json"
        cache = ("--prefix.cache_dir", str(folder / "cache"))
        runs = {name: run_toolkit(workload, folder / name, *cache, "--optim.name", name) for name in names}
        runs[NAIVE] = run_peer(path, folder / "naive", "plain.py")
    print(head_lines(f"; {given.rows} rows, {given.epochs} epochs"))
    print(
        f"{'optimizer':<20}" + "".join(f"{f'epoch {epoch + 1}':>10}" for epoch in range(given.epochs)) + f"{'gain':>10}"
    )
    for name, run in runs.items():
        gain = run.losses[0] - run.losses[-1]
        print(f"{name:<20}" + "".join(f"{mean:>10.4f}" for mean in run.losses) + f"{gain:>10.4f}")
    reference = runs["adamw"].losses[-1]
    bounds = {
        f"{name} ends within 0.01 of float32": abs(runs[name].losses[-1] - reference) <= 0.01 for name in names[1:]
    }
    bounds["plain bf16 does not"] = runs[NAIVE].losses[-1] - reference > 0.01
    print(bounds_text(bounds))
    return 0 if all(bounds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
