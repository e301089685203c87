"""Print the validation loss and perplexity of a run, an export, a delta or any model.

    python launch/evaluate.py runs/quickstart                                  # the rows its run held out
    python launch/evaluate.py runs/quickstart --part test                      # its test rows (data.test, data.folds)
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
    from toolkit.inference.evaluation import Part, SourceEvaluation
    from toolkit.models.load import Dtype


def evaluate(
    source: str | Path,
    data: str | Path | None = None,
    *,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    encoding: str | None = None,
    separator: str | None = None,
    sheet: str | None = None,
    batch_size: int = 1,
    step: Step | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    dtype: Dtype | None = None,
    part: Part = "validation",
) -> SourceEvaluation:
    """Compute the loss of a model: the mean cross entropy over all supervised tokens of the rows.

    Args:
        source: run directory, checkpoint, export, delta, peft adapter, model directory, Hub id or bundled name.
        data: file, directory, pattern or Hub data set; all its rows are used. Defaults to the rows that the run held
            out.
        split: split of a Hub data set, directory or archive. Defaults to its only one, or train.
        name: configuration of a Hub data set, or folder of a directory.
        revision: branch, tag or commit of a Hub data set.
        encoding: encoding of text files. Defaults to what is detected.
        separator: character between the fields of a CSV file. Defaults to what is detected.
        sheet: sheet of an Excel workbook. Defaults to the first visible one that is not empty.
        batch_size: rows computed at once.
        step: checkpoint of a run, by its number or as ``latest`` or ``best``. Defaults to the latest.
        base: new path of the base model of a run, delta or adapter, if it moved.
        trust_remote_code: run code that ships with the model; with the base of a run or delta, if that was trained so.
        dtype: precision of the computation. Defaults to the run's, or to that in which a model is stored.
        part: which rows the run held out: ``validation`` (data.validation) or ``test`` (data.test, data.folds).

    Raises:
        DataError: no ``data`` is given and ``source`` held no rows out, or rows are invalid.
        UsageError: ``source`` cannot be opened.
    """
    from toolkit.data.sources import ReadOptions, Source
    from toolkit.inference.evaluation import evaluate_source

    rows = None
    if data is not None:
        rows = Source(str(data), split, name, revision, options=ReadOptions.of(encoding, separator, sheet))
    return evaluate_source(str(source), rows, split, batch_size, step, base, trust_remote_code, dtype, part)


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, then evaluate, and return the exit code; see ``cli.verb_parser`` for ``program``."""
    from toolkit.config import flags

    parser = verb_parser(__doc__, program)
    parser.add_argument("source", help="run directory, export, delta, peft adapter, model directory or Hub id")
    parser.add_argument("--data.path", dest="data", help="rows to evaluate on; default: what the run held out")
    flags.add_source_flags(parser, "data.")
    parser.add_argument(
        "--part", choices=("validation", "test"), default="validation",
        help="rows that the run held out: to choose by (data.validation), or to report on (data.test, data.folds); "
        "default: validation",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=flags.positive_int, default=1, help="rows computed at once; default: 1")
    flags.add_open_model_flags(
        parser, "precision to compute in; default: the run's, or that in which a model is stored"
    )
    arguments = parser.parse_args(words)
    for key in ("split", "name", "revision", "encoding", "separator", "sheet"):
        if getattr(arguments, key) and not arguments.data:
            parser.error(f"--data.{key} goes with --data.path; the rows that a run held out are those of its recipe")
    if arguments.part == "test" and arguments.data:
        parser.error("--part names rows that a run held out, and --data.path other ones; leave out one of the two")
    evaluation = evaluate(**vars(arguments))
    tokens = f"{evaluation.supervised_tokens} supervised tokens of {evaluation.rows} rows"
    print(f"loss {evaluation.loss:.4f}, perplexity {evaluation.perplexity:.2f} over {tokens}")
    print(json.dumps({**asdict(evaluation), "perplexity": evaluation.perplexity}, ensure_ascii=False))
    return 0
