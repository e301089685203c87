"""Print what a run will cost, from its recipe alone: memory by kind, compute and disk, before any weight is loaded.

    python launch/plan.py --config recipes/quickstart.yaml
    python launch/plan.py --ds ds_configs/zero2.json --world-size 8 --gpu-memory 24GiB --png plan.png

    python launch/plan.py --compare "last:4 head" "lora last:8" "lora all"
    python launch/plan.py --suggest spectrum --budget 0.25
    python launch/plan.py --suggest probe --rows 40 --gpu-memory 24GiB --png gain.svg

Takes every flag of launch/train.py. A model directory may hold a config.json alone; --suggest loads the weights, ranks
the blocks by the signal in them (spectrum) or by the loss's gradient on a few rows (gradient), and prints a mask; or
sets what training above every frost line is expected to gain, by a readout of some rows, beside its cost (probe).
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.commands.cli import verb_parser
from toolkit.runtime.errors import ConfigError, UsageError
from toolkit.runtime.json_text import to_json
from toolkit.runtime.printable import printable

if TYPE_CHECKING:
    from toolkit.config.flags import Invocation
    from toolkit.config.schema import RunConfig
    from toolkit.planning.device_fit import DeviceFit
    from toolkit.planning.planner import Plan


@dataclass(frozen=True)
class PlanReport:
    """The result of ``toolkit.plan``; printing it shows the table of ``launch/plan.py``."""

    plan: Plan
    """Memory by kind, floating-point operations and disk space."""
    fit: DeviceFit | None
    """Comparison with the memory of a GPU; None without ``gpu_memory``."""

    def __str__(self) -> str:
        """Return the table that ``launch/plan.py`` prints."""
        from toolkit.planning.table import as_text

        return as_text(self.plan, self.fit)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values, with bytes and floating-point operations as integers."""
        from toolkit.planning.table import as_dict

        return as_dict(self.plan, self.fit)

    def draw(self, path: str | Path) -> None:
        """Draw layers and memory; the suffix of ``path`` sets the format (png, svg, pdf).

        Raises:
            PlanError: the suffix is another one, or the file cannot be written.
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
    """Plan the memory, compute and disk space of a run, per rank and in total; no weight is loaded.

    Args:
        recipe: YAML file, nested values, or a ``RunConfig``. Defaults to the quickstart recipe.
        overrides: values by dotted key that override the recipe, as in ``{"train.epochs": 1}``.
        ds: DeepSpeed JSON, as in ``ds_configs/``. Without it torch alone trains.
        world_size: number of ranks, one GPU each.
        gpu_memory: memory of one GPU, in bytes or as ``"24GiB"``; if arguments, the report says whether the run fits.

    Raises:
        UsageError: the recipe, DeepSpeed file, model or mask is invalid.
    """
    from toolkit.commands.invocation import build_invocation

    return _plan(build_invocation(recipe, overrides, ds), world_size, gpu_memory)


def _plan(invocation: Invocation, ranks: int, gpu_memory: int | str | None) -> PlanReport:
    """Plan an invocation, see ``plan``."""
    from toolkit.config.flags import byte_size

    gpu_bytes = byte_size(gpu_memory) if isinstance(gpu_memory, str) else gpu_memory
    from toolkit.planning.command import plan_run  # imports torch, which an invalid flag need not wait for

    return PlanReport(*plan_run(invocation, ranks, gpu_bytes))


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, then plan, and return the exit code; see ``cli.verb_parser`` for ``program``."""
    from toolkit.config import flags
    from toolkit.runtime.shipped import QUICKSTART, shipped_file

    parser = verb_parser(__doc__, program)
    parser.add_argument("--world-size", type=flags.positive_int, default=1, help="ranks, one GPU each; default: 1")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="memory of one GPU, such as 24GiB: say whether it fits")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw layers and memory: .png, .svg, .pdf")
    parser.add_argument("--overwrite", action="store_true", help="replace --png if it exists")
    parser.add_argument(
        "--compare", nargs="+", metavar="MASK",
        help="plan several masks side by side in place of mask.train: the selectors of each in one word, with lora, "
        "rslora, dora or qlora before the selector of adapters, rows before a table and added, from:N, from:N,to:M or "
        "ids:N,M, or entries in YAML",
    )  # fmt: skip
    parser.add_argument(
        "--tflops", type=flags.positive_number,
        help="rate that all ranks sustain, for the time in --compare and --suggest probe",
    )  # fmt: skip
    parser.add_argument(
        "--suggest", choices=("spectrum", "gradient", "probe"),
        help="rank the blocks instead, or probe every frost line, and print a mask",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, help="share of blocks to suggest, default: 0.25; most of them for probe, default: 1"
    )
    parser.add_argument(
        "--rows", type=flags.positive_int, help="rows that gradient (default: 8) or probe (default: 40) looks at"
    )
    invocation = flags.parse(parser, shipped_file(QUICKSTART), words)
    arguments = invocation.arguments
    _refuse_idle_flags(arguments)
    picture = arguments.png and _picture_file(arguments.png, arguments.overwrite)
    if arguments.suggest:
        print(_suggest(invocation, picture))
        return 0
    gc.disable()  # garbage collection during imports takes a fifth of this short process
    if arguments.compare:
        from toolkit.planning.command import plan_masks
        from toolkit.planning.comparison import comparison_rows, comparison_text, parse_mask

        mask = invocation.config.mask
        if mask.changes:
            key = "mask.schedule" if mask.schedule else "mask.rotation"
            raise ConfigError([f"--compare compares masks, and {key} has several of them; leave it out"])
        masks = [parse_mask(text, mask) for text in arguments.compare]
        budget = flags.byte_size(arguments.gpu_memory) if arguments.gpu_memory else None
        plans = plan_masks(invocation, arguments.world_size, budget, masks)
        rows = comparison_rows(arguments.compare, plans, arguments.tflops)
        print(to_json(rows, indent=1) if arguments.json else printable(comparison_text(rows)))
        return 0
    report = _plan(invocation, arguments.world_size, arguments.gpu_memory)
    if picture is not None:
        report.draw(picture)
    print(to_json(report.as_dict(), indent=1) if arguments.json else printable(str(report)))
    return 0


def _picture_file(path: Path, overwrite: bool) -> Path:
    """Return where to draw, once it is known before any work that this can be done."""
    from toolkit.planning.chart import require_picture
    from toolkit.runtime.paths import output_file

    path = output_file(path, overwrite, "--png")
    require_picture(path)
    return path


def _refuse_idle_flags(given: argparse.Namespace) -> None:
    """Raise UsageError for flags that do nothing beside the others."""
    if given.compare and (given.suggest or given.png):
        raise UsageError("--compare prints a table of masks; leave out --suggest and --png, or --compare")
    if given.suggest in ("spectrum", "gradient") and (given.json or given.png):
        raise UsageError(f"--suggest {given.suggest} prints a ranking and a recipe as text; leave out --json and --png")
    if given.suggest in ("spectrum", "gradient") and (given.gpu_memory or given.ds or given.world_size > 1):
        raise UsageError(
            f"--suggest {given.suggest} plans nothing; leave out --gpu-memory, --world-size and --ds, or ask for probe"
        )
    if given.budget is not None and not given.suggest:
        raise UsageError("--budget goes with --suggest; leave it out")
    if given.rows and given.suggest not in ("gradient", "probe"):
        raise UsageError("--rows goes with --suggest gradient and --suggest probe; leave it out")
    if given.overwrite and not given.png:
        raise UsageError("--overwrite goes with --png; leave it out")
    if given.tflops and not (given.compare or given.suggest == "probe"):
        raise UsageError("--tflops is for the time in --compare and --suggest probe; add one of them, or leave it out")


def _suggest(invocation: Invocation, picture: Path | None) -> str:
    """Return what ``--suggest`` prints, and draw the picture of ``probe`` if one is asked for."""
    given = invocation.arguments
    if given.suggest != "probe":
        from toolkit.planning.suggest import suggest_for

        budget = 0.25 if given.budget is None else given.budget
        return printable(suggest_for(invocation.config, given.suggest, budget, given.rows or 8).table())
    from toolkit.config.flags import byte_size
    from toolkit.planning.line_choice import choose_line

    gpu_bytes = byte_size(given.gpu_memory) if given.gpu_memory else None
    budget = 1.0 if given.budget is None else given.budget
    choice = choose_line(invocation, given.world_size, gpu_bytes, budget, given.rows or 40, given.tflops)
    if picture is not None:
        from toolkit.planning.line_chart import draw_choice

        draw_choice(choice, picture)
    return to_json(choice.as_dict(), indent=1) if given.json else printable(choice.table())
