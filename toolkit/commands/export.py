"""Export a run as a model directory for transformers, or as a delta of the trained tensors alone.

python launch/export.py runs/quickstart                      # -> runs/quickstart/export
python launch/export.py runs/quickstart --dtype float32 --output my-model
python launch/export.py runs/quickstart --delta              # -> runs/quickstart/export-delta
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.commands.cli import verb_parser
from toolkit.runtime.errors import UsageError

if TYPE_CHECKING:
    from toolkit.checkpoint.choice import Step
    from toolkit.exporting.run_export import Rounding
    from toolkit.models.load import Dtype


def export(
    run: str | Path,
    output: str | Path | None = None,
    *,
    delta: bool = False,
    dtype: Dtype | None = None,
    rounding: Rounding | None = None,
    step: Step | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write a trained model that ``from_pretrained`` loads, or its trained tensors alone; return the directory.

    Args:
        run: run directory.
        output: target directory, empty or not existing. Defaults to ``export`` or ``export-delta`` in ``run``.
        delta: write the trained tensors alone.
        dtype: precision of the weights. Defaults to the run's for a model, to float32 for a delta.
        rounding: how a model's fp32 masters are rounded to bfloat16. ``nearest``, the default, gives the weights of
            the training; ``stochastic`` preserves the masters on average (docs/fp32-masters.md).
        step: checkpoint of the run, by its number or as ``latest`` or ``best``. Defaults to the latest.
        base: new path of the base model, if it moved.
        trust_remote_code: run code that ships with the base model, if the run was trained with it.

    Raises:
        CheckpointError: ``run`` is not a run directory, ``output`` is not empty, or the base model changed.
        DiskError: ``output`` cannot be written.
        UsageError: ``rounding``, ``base`` or ``trust_remote_code`` is given for a delta, or ``rounding`` is
            ``stochastic`` for weights that are not bfloat16.
    """
    if delta and rounding:
        raise UsageError("--rounding goes with a whole model; a delta holds the float32 masters")
    if delta and (base is not None or trust_remote_code):
        raise UsageError("--base and --trust-remote-code go with a whole model; a delta is written without the base")
    from toolkit.exporting.run_export import export_delta, export_model

    run = Path(run)
    target = Path(output) if output is not None else run / ("export-delta" if delta else "export")
    if delta:
        export_delta(run, target, dtype or "float32", step)
    else:
        export_model(run, target, dtype, step, base, trust_remote_code, rounding or "nearest")
    return target


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, then export, and return the exit code; see ``cli.verb_parser`` for ``program``."""
    from toolkit.config import flags

    parser = verb_parser(__doc__, program)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--output", type=Path, help="target directory; default: RUN/export, or RUN/export-delta")
    parser.add_argument("--delta", action="store_true", help="write the trained tensors alone")
    flags.add_open_model_flags(parser, "precision of the weights; default: the run's for a model, float32 for a delta")
    parser.add_argument(
        "--rounding",
        choices=("nearest", "stochastic"),
        help="of a model to bfloat16: nearest, the default, gives the weights that trained; stochastic keeps what the "
        "float32 masters learned beyond them",
    )
    print(export(**vars(parser.parse_args(words))))
    return 0
