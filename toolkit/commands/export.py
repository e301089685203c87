"""Export a run as a model directory for transformers, as a peft adapter, or as a delta of the trained tensors alone.

python launch/export.py runs/quickstart                      # -> runs/quickstart/export
python launch/export.py runs/quickstart --dtype float32 --output my-model
python launch/export.py runs/quickstart --delta              # -> runs/quickstart/export-delta
python launch/export.py runs/adapters --adapter              # -> runs/adapters/export-adapter
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.commands.cli import verb_parser
from toolkit.runtime.errors import UsageError
from toolkit.runtime.privacy import users_umask

if TYPE_CHECKING:
    from toolkit.checkpoint.choice import Step
    from toolkit.exporting.run_export import Rounding
    from toolkit.models.load import Dtype


def export(
    run: str | Path,
    output: str | Path | None = None,
    *,
    delta: bool = False,
    adapter: bool = False,
    dtype: Dtype | None = None,
    rounding: Rounding | None = None,
    step: Step | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write a trained model that ``from_pretrained`` loads, or what trained alone; return the directory.

    Args:
        run: run directory.
        output: target directory, empty or not existing. Defaults to ``export``, ``export-delta`` or
            ``export-adapter`` in ``run``.
        delta: write the trained tensors alone.
        adapter: write the trained adapters as a directory that peft's ``PeftModel.from_pretrained`` loads.
        dtype: precision of the weights. Defaults to the run's for a model, to float32 for a delta or an adapter.
        rounding: how a model's fp32 masters are rounded to bfloat16. ``nearest``, the default, gives the weights of
            the training; ``stochastic`` preserves the masters on average (docs/fp32-masters.md).
        step: checkpoint of the run, by its number or as ``latest`` or ``best``. Defaults to the latest.
        base: new path of the base model, if it moved.
        trust_remote_code: run code that ships with the base model, if the run was trained with it.

    Raises:
        CheckpointError: ``run`` is not a run directory, ``output`` is not empty, the base model changed, or the run
            cannot be said as a peft adapter.
        DiskError: ``output`` cannot be written.
        UsageError: both ``delta`` and ``adapter``, or an argument that changes nothing for them; or ``rounding`` is
            ``stochastic`` for weights that are not bfloat16.
    """
    if delta and adapter:
        raise UsageError("--delta and --adapter are two forms of what trained; choose one")
    if (delta or adapter) and rounding:
        raise UsageError("--rounding goes with a whole model; a delta or adapter holds the float32 masters")
    if delta and (base is not None or trust_remote_code):
        raise UsageError("--base and --trust-remote-code go with a whole model; a delta is written without the base")
    from toolkit.exporting.run_export import export_delta, export_model

    run = Path(run)
    name = "export-delta" if delta else "export-adapter" if adapter else "export"
    target = Path(output) if output is not None else run / name
    if adapter:
        from toolkit.exporting.adapter_directory import export_adapter

        export_adapter(run, target, dtype or "float32", step, base, trust_remote_code)
    elif delta:
        export_delta(run, target, dtype or "float32", step)
    else:
        export_model(run, target, dtype, step, base, trust_remote_code, rounding or "nearest")
    return target


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, then export, and return the exit code; see ``cli.verb_parser`` for ``program``."""
    from toolkit.config import flags

    parser = verb_parser(__doc__, program)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--output", type=Path, help="target directory; default: RUN/export, -delta or -adapter")
    parser.add_argument("--delta", action="store_true", help="write the trained tensors alone")
    parser.add_argument("--adapter", action="store_true", help="write the adapters as peft loads them")
    flags.add_open_model_flags(parser, "precision of the weights; default: the run's for a model, else float32")
    parser.add_argument(
        "--rounding",
        choices=("nearest", "stochastic"),
        help="of a model to bfloat16: nearest, the default, gives the weights that trained; stochastic keeps what the "
        "float32 masters learned beyond them",
    )
    arguments = parser.parse_args(words)
    with users_umask():  # an export is made to be handed out
        print(export(**vars(arguments)))
    return 0
