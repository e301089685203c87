"""Check Frostline on a GPU: is it right there, how fast is it, and where does a step go?

    python benchmarks/gpu.py [--only PART ...] [--save]       on a CUDA card of 40 GB or more, in about ten minutes
    python benchmarks/gpu.py --device cpu                     the same path, with tiny sizes, to try the script itself

It needs no network and no checkpoint: models have random weights and a tokenizer of bytes. The parts:

    ceilings  what the card does at best: copies, matrix products, transfers from the host
    loss      the tiled cross entropy against float64, and its time by the size of its blocks
    update    AdamW on float32 masters against the CPU's, and its time by optimizer and piece
    runs      short trainings with and without cache, offload, quantisation, checkpointing, packing: the same losses?
    steps     steps of EXAONE-3.5-2.4B's shape beside a plain loop; kernels, and what waits for the device

Prints one table; exits 1 if a bound is missed, 2 without a card or without a package that is needed. DeepSpeed and
datasets are not needed; what needs bitsandbytes is left out where it is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from toolkit.runtime.environment import PACKAGES  # noqa: E402

PARTS = ("ceilings", "loss", "update", "runs", "steps")
NOT_NEEDED = {"bitsandbytes", "datasets", "deepspeed", "pyarrow"}
"""Of what Frostline requires, the packages that only other commands import, or only parts that are left out."""


def trouble(device: str) -> str:
    """Return why nothing can be measured here, with the remedy; empty if it can.

    Args:
        device: ``cuda`` or ``cpu``.
    """
    needed = {name: module for name, module in PACKAGES.items() if name not in NOT_NEEDED}
    lacking = sorted(name for name, module in needed.items() if importlib.util.find_spec(module) is None)
    if lacking:
        names = " ".join(lacking)
        return (
            f"this Python lacks {', '.join(lacking)}; run `pip install -c constraints.txt {names}`, or where there is "
            f"no network, `pip download --dest wheels -c constraints.txt {names}` elsewhere under the same version of "
            "Python and `pip install --no-index --find-links wheels` here"
        )
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} sees no CUDA card; run this where `nvidia-smi` lists one, with a torch that is "
            "built for CUDA. --device cpu tries the script itself"
        )
    return ""


def main() -> int:
    """Measure the parts and print one table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure; default: all")
    parser.add_argument("--save", action="store_true", help="write the result under benchmarks/results/")
    given = parser.parse_args()
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: the toolkit takes the card where there is one
    if found := trouble(given.device):
        print(f"error: {found}", file=sys.stderr)
        return 2
    from benchmarks.gpu_parts import measure
    from benchmarks.report import head_lines, save, table

    rows = measure([part for part in PARTS if part in given.only], given.device)
    text = f"{head_lines()}\n{table(['measured', 'value', 'bound', ''], [row.cells for row in rows])}"
    missed = [row.what for row in rows if row.holds is False]
    text += f"\n\nMISS {'; '.join(missed)}" if missed else "\n\nok   all bounds hold"
    print(text)
    if given.save:
        save("gpu", text)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
