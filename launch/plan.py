"""What a run will cost, from its recipe alone: memory by kind, compute and disk, before any weight is loaded.

    python launch/plan.py --config recipes/quickstart.yaml
    python launch/plan.py --ds ds_configs/zero2.json --world-size 8 --gpu-memory 24GiB --png plan.png

    python launch/plan.py --suggest spectrum --budget 0.25

Takes every flag of launch/train.py. A model directory may hold a config.json alone; --suggest loads the weights, ranks
the blocks by the signal in them (spectrum) or by the loss's gradient on a few rows (gradient), and prints a mask.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from toolkit.runtime.environment import require_packages

require_packages(ROOT)

from toolkit.commands.cli import leave, run_command
from toolkit.config import flags


def main() -> int:
    """Parse the command line, then plan."""
    parser = flags.parser(__doc__ or "")
    parser.add_argument("--world-size", type=flags.positive, default=1, help="ranks, one GPU each; default: 1")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="memory of one GPU, such as 24GiB: say whether it fits")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw layers and memory (needs matplotlib)")
    parser.add_argument("--suggest", choices=("spectrum", "gradient"), help="rank the blocks instead, and print a mask")
    parser.add_argument("--budget", type=float, default=0.25, help="share of blocks to suggest; default: 0.25")
    parser.add_argument("--rows", type=flags.positive, default=8, help="rows that gradient looks at; default: 8")
    invocation = flags.parse(parser, ROOT / "recipes" / "quickstart.yaml")
    given = invocation.arguments
    if given.suggest:
        from toolkit.planning.suggest import suggest_for

        print(suggest_for(invocation.config, given.suggest, given.budget, given.rows).table())
        return 0
    budget = flags.byte_size(given.gpu_memory) if given.gpu_memory is not None else None
    gc.disable()  # a fifth of this short process would go into looking over the modules it imports
    from toolkit.planning.command import plan_command  # imports torch, which --help and a faulty flag need not wait for

    plan_command(invocation, given.world_size, budget, given.json, given.png)
    return 0


if __name__ == "__main__":
    leave(run_command(main), at_once=True)  # nothing is left to clean up
