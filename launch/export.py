"""Export a run as a model directory for transformers, or as a delta of the trained tensors alone.

python launch/export.py runs/quickstart                      # -> runs/quickstart/export
python launch/export.py runs/quickstart --dtype float32 --output my-model
python launch/export.py runs/quickstart --delta              # -> runs/quickstart/export-delta
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from toolkit.runtime.environment import require_packages

require_packages(ROOT)

from toolkit.commands.cli import run_command
from toolkit.config import flags


def main() -> int:
    """Parse the command line, then export."""
    parser = flags.parser(__doc__ or "")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--output", type=Path, help="target directory; default: RUN/export, or RUN/export-delta")
    parser.add_argument("--delta", action="store_true", help="write the trained tensors alone")
    flags.add_opening(parser, "precision of the weights; default: the run's for a model, float32 for a delta")
    parser.add_argument(
        "--rounding",
        choices=("nearest", "stochastic"),
        help="of a model to bfloat16: nearest, the default, gives the weights that trained; stochastic keeps what the "
        "float32 masters learned beyond them",
    )
    arguments = parser.parse_args()
    if arguments.delta and arguments.rounding:
        parser.error("--rounding goes with a whole model; a delta holds the float32 masters")
    from toolkit.exporting.export import export_delta, export_model

    if arguments.delta:
        target = arguments.output or arguments.run / "export-delta"
        export_delta(arguments.run, target, arguments.dtype or "float32", arguments.step)
    else:
        target = arguments.output or arguments.run / "export"
        export_model(
            arguments.run,
            target,
            arguments.dtype,
            arguments.step,
            arguments.base,
            arguments.trust_remote_code,
            arguments.rounding or "nearest",
        )
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
