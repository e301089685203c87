"""Check Frostline on a GPU: is it right there, how fast is it, and where does a step go?

    python benchmarks/gpu.py [--only PART ...] [--save]       on a CUDA card of 40 GB or more, at most nine minutes
    python benchmarks/gpu.py --dry-run [--only PART ...]      what would be measured, and the minutes that it takes
    python benchmarks/gpu.py --device cpu --tiny              the same path, with tiny sizes, to try the script itself

It needs no network and no checkpoint: models have random weights and a tokenizer of bytes. The parts:

    ceilings  what the card does at best: copies, matrix products, transfers from the host
    loss      the tiled cross entropy against float64, and its time by the size of its blocks
    update    AdamW on float32 masters against the CPU's, and its time for one tensor and for many
    runs      short trainings with and without cache, offload, quantisation, checkpointing, packing: the same losses?
    steps     steps of EXAONE-3.5-2.4B's shape beside a plain loop; kernels, and what waits for the device
    trainer   the same of transformers' Trainer
    adapters  the same of LoRA in the last 8 blocks and in all, beside peft's under a plain loop
    large     the last 4 blocks of a 32B shape within 24 GiB; its frozen blocks are streamed from disk and from the host
    zero      steps of EXAONE-3.5-2.4B's shape under DeepSpeed's ZeRO-2 on one rank, beside torch alone

Prints a table for each part as soon as it is measured; exits 1 if a bound is missed, 2 without a card or without a
package that is needed. datasets is not needed; what needs bitsandbytes or DeepSpeed is left out where that is missing.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from toolkit.commands.cli import set_up_memory  # noqa: E402
from toolkit.runtime.environment import PACKAGES  # noqa: E402

if TYPE_CHECKING:
    import torch

    from benchmarks.gpu_table import Row, Sizes


@dataclass(frozen=True)
class Part:
    """A function of a module of benchmarks, and the minutes that an H100 is expected to take for it."""

    module: str
    minutes: float


PARTS = {
    "ceilings": Part("gpu_parts", 0.2), "loss": Part("gpu_parts", 0.5), "update": Part("gpu_parts", 0.7),
    "runs": Part("gpu_runs", 1.5), "steps": Part("gpu_steps", 0.8), "trainer": Part("gpu_peers", 0.5),
    "adapters": Part("gpu_adapters", 1.0), "large": Part("gpu_large", 2.0), "zero": Part("gpu_peers", 0.8),
}  # fmt: skip
"""By name, which is the function's, in the order in which they are measured."""
NOT_NEEDED = {"bitsandbytes", "datasets", "deepspeed", "pyarrow"}
"""Of what Frostline requires, the packages that only other commands import, or only parts that are left out."""
COLUMNS = ["measured", "value", "bound", ""]


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


def dry_run(parts: Sequence[str]) -> str:
    """Return the parts with their expected minutes."""
    lines = [f"{part:<10}{PARTS[part].minutes:>5.1f} min" for part in parts]
    total = sum(PARTS[part].minutes for part in parts)
    return "\n".join([*lines, f"{'all':<10}{total:>5.1f} min expected on one H100; nothing was measured"])


def measure(parts: Sequence[str], device: torch.device, sizes: Sizes) -> Iterator[list[Row]]:
    """Measure the named parts one after the other; one that raises is a missed bound, and the others go on."""
    import torch

    from benchmarks.gpu_table import Row

    for part in parts:
        rows: list[Row] = []
        started = time.perf_counter()
        try:
            found = getattr(importlib.import_module(f"benchmarks.{PARTS[part].module}"), part)
            function: Callable[[torch.device, Sizes], Iterator[Row]] = found
            for row in function(device, sizes):
                print(" ".join(row.cells), file=sys.stderr, flush=True)
                rows.append(row)
        except Exception as error:
            traceback.print_exc()
            rows.append(Row(f"{part} to its end", type(error).__name__, "no error", holds=False))
        rows.append(Row(f"{part}: seconds in all", f"{time.perf_counter() - started:.0f}"))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield rows


def main() -> int:
    """Measure the parts and print a table for each; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure; default: all")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny sizes, in which nothing is worth its time; so on CPUs"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the parts and their expected minutes alone")
    parser.add_argument("--save", action="store_true", help="write the result under benchmarks/results/")
    given = parser.parse_args()
    parts = [part for part in PARTS if part in given.only]
    if given.dry_run:
        print(dry_run(parts))
        return 0
    # before torch looks: the toolkit takes a card where there is one, and the Trainer would share rows among several
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if given.device == "cpu" else first
    set_up_memory()  # as a run does
    if found := trouble(given.device):
        print(f"error: {found}", file=sys.stderr)
        return 2
    import torch

    from benchmarks.gpu_table import FULL, TINY
    from benchmarks.report import head_lines, save, table

    texts, missed = [head_lines()], []
    print(texts[0], flush=True)
    sizes = TINY if given.tiny or given.device == "cpu" else FULL
    # with an index, as a run has it: threads that copy take the card of their thread's own
    device = torch.device("cuda", 0) if given.device == "cuda" else torch.device("cpu")
    for rows in measure(parts, device, sizes):
        missed += [row.what for row in rows if row.holds is False]
        texts.append(table(COLUMNS, [row.cells for row in rows]) + "\n")
        print(texts[-1], flush=True)  # a run that is cut off has shown what it had
    texts.append(f"MISS {'; '.join(missed)}" if missed else "ok   all bounds hold")
    print(texts[-1])
    if given.save:
        save("gpu", "\n".join(texts))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
