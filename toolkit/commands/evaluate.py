"""Print the validation loss and perplexity of a run, an export, a delta or any model.

    python launch/evaluate.py runs/quickstart                                  # the rows its run held out
    python launch/evaluate.py runs/quickstart --data.path other.jsonl          # every row of that file
    python launch/evaluate.py HuggingFaceTB/SmolLM2-135M-Instruct --data.path other.jsonl

Prints a line for people, then one JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.commands.cli import verb_parser

if TYPE_CHECKING:
    from toolkit.checkpoint.choice import Step
    from toolkit.inference.evaluation import SourceEvaluation
    from toolkit.models.load import Dtype


def evaluate(
    source: str | Path,
    data: str | Path | None = None,
    *,
    split: str | None = None,
    batch_size: int = 1,
    step: Step | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    dtype: Dtype | None = None,
) -> SourceEvaluation:
    """Compute the loss of a model: the mean cross entropy over all supervised tokens of the rows.

    Args:
        source: run directory, checkpoint, export, delta, model directory, Hub id or bundled name.
        data: file or Hub data set; all its rows are used. Defaults to the rows that the run held out.
        split: split of a Hub data set. Defaults to its only one, or train.
        batch_size: rows computed at once.
        step: checkpoint of a run, by its number or as ``latest`` or ``best``. Defaults to the latest.
        base: new path of the base model of a run or delta, if it moved.
        trust_remote_code: run code that ships with the base model, if ``source`` was trained with it.
        dtype: precision of the computation. Defaults to the run's, or to that in which a model is stored.

    Raises:
        DataError: no ``data`` is given and ``source`` held no rows out, or rows are invalid.
        UsageError: ``source`` cannot be opened.
    """
    from toolkit.inference.evaluation import evaluate_source

    path = None if data is None else str(data)
    return evaluate_source(str(source), path, split, batch_size, step, base, trust_remote_code, dtype)


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, then evaluate, and return the exit code; see ``cli.verb_parser`` for ``program``."""
    from toolkit.config import flags

    parser = verb_parser(__doc__, program)
    parser.add_argument("source", help="run directory, export, delta, model directory or Hub id")
    parser.add_argument("--data.path", dest="data", help="rows to evaluate on; default: what the run held out")
    parser.add_argument("--data.split", dest="split", help="split of a Hub data set; default: its only one, or train")
    parser.add_argument("--batch-size", type=flags.positive_int, default=1, help="rows computed at once; default: 1")
    flags.add_open_model_flags(
        parser, "precision to compute in; default: the run's, or that in which a model is stored"
    )
    arguments = parser.parse_args(words)
    if arguments.split and not arguments.data:
        parser.error("--data.split goes with --data.path; the rows that a run held out are those of its recipe")
    evaluation = evaluate(**vars(arguments))
    tokens = f"{evaluation.supervised_tokens} supervised tokens of {evaluation.rows} rows"
    print(f"loss {evaluation.loss:.4f}, perplexity {evaluation.perplexity:.2f} over {tokens}")
    print(json.dumps({**asdict(evaluation), "perplexity": evaluation.perplexity}, ensure_ascii=False))
    return 0
