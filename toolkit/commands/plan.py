"""Print what a run will cost, from its recipe alone: memory by kind, compute and disk, before any weight is loaded.

    python launch/plan.py --config recipes/quickstart.yaml
    python launch/plan.py --ds ds_configs/zero2.json --world-size 8 --gpu-memory 24GiB --png plan.png

    python launch/plan.py --suggest spectrum --budget 0.25

Takes every flag of launch/train.py. A model directory may hold a config.json alone; --suggest loads the weights, ranks
the blocks by the signal in them (spectrum) or by the loss's gradient on a few rows (gradient), and prints a mask.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.commands.cli import describe

if TYPE_CHECKING:
    from toolkit.config.flags import Invocation
    from toolkit.config.schema import RunConfig
    from toolkit.planning.device_fit import DeviceFit
    from toolkit.planning.planner import Plan


@dataclass(frozen=True)
class PlanReport:
    """The outcome of ``toolkit.plan``; ``print`` shows the table of ``launch/plan.py``."""

    plan: Plan
    """Memory by kind, operations and disk."""
    fit: DeviceFit | None
    """Whether the run fits; None without ``gpu_memory``."""

    def __str__(self) -> str:
        from toolkit.planning.table import as_text

        return as_text(self.plan, self.fit)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values; bytes and floating-point operations as whole numbers."""
        from toolkit.planning.table import as_dict

        return as_dict(self.plan, self.fit)

    def draw(self, path: str | Path) -> None:
        """Draw layers and memory; the ending of ``path`` chooses the format (png, svg, pdf).

        Raises:
            PlanError: matplotlib is not installed, or the file cannot be written.
        """
        from toolkit.planning.chart import draw

        draw(self.plan, Path(path), self.fit)


def plan(
    recipe: str | Path | Mapping[str, Any] | RunConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    ds: str | Path | None = None,
    world_size: int = 1,
    gpu_memory: int | str | None = None,
) -> PlanReport:
    """Return what a run will cost on one rank, and in all; no weight is loaded.

    Args:
        recipe: YAML file, nested values, or a ``RunConfig``. Defaults to the quickstart recipe.
        overrides: value by dotted key, laid over the recipe, as in ``{"train.epochs": 1}``.
        ds: DeepSpeed JSON, as in ``ds_configs/``. Without it torch alone trains.
        world_size: ranks, one GPU each.
        gpu_memory: of one GPU, in bytes or as ``"24GiB"``, to say whether the run fits.

    Raises:
        UsageError: recipe, DeepSpeed file, model or mask is at fault.
    """
    from toolkit.commands.recipe_input import read_input

    return _plan(read_input(recipe, overrides, ds), world_size, gpu_memory)


def _plan(invocation: Invocation, ranks: int, gpu_memory: int | str | None) -> PlanReport:
    from toolkit.config.flags import byte_size

    budget = byte_size(gpu_memory) if isinstance(gpu_memory, str) else gpu_memory
    from toolkit.planning.command import plan_run  # imports torch, which --help and a faulty flag need not wait for

    return PlanReport(*plan_run(invocation, ranks, budget))


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, then plan.

    Args:
        words: arguments of the command line. Defaults to those of the process.
        program: name to show in the help. Defaults to the script's.

    Returns:
        The exit code, 0.
    """
    from toolkit.config import flags
    from toolkit.runtime.shipped import QUICKSTART, shipped_file

    parser = describe(flags.parser(__doc__ or ""), program)
    parser.add_argument("--world-size", type=flags.positive, default=1, help="ranks, one GPU each; default: 1")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="memory of one GPU, such as 24GiB: say whether it fits")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw layers and memory (needs matplotlib)")
    parser.add_argument("--suggest", choices=("spectrum", "gradient"), help="rank the blocks instead, and print a mask")
    parser.add_argument("--budget", type=float, default=0.25, help="share of blocks to suggest; default: 0.25")
    parser.add_argument("--rows", type=flags.positive, default=8, help="rows that gradient looks at; default: 8")
    invocation = flags.parse(parser, shipped_file(QUICKSTART), words)
    given = invocation.arguments
    if given.suggest:
        from toolkit.planning.suggest import suggest_for

        print(suggest_for(invocation.config, given.suggest, given.budget, given.rows).table())
        return 0
    gc.disable()  # a fifth of this short process would go into looking over the modules it imports
    report = _plan(invocation, given.world_size, given.gpu_memory)
    if given.png is not None:
        report.draw(given.png)
    print(json.dumps(report.as_dict(), indent=1) if given.json else report)
    return 0
