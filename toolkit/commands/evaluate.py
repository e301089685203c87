"""Compare runs, exports, deltas and any models on rows that they were not trained on.

    python launch/evaluate.py runs/quickstart                                  # the rows its run held out
    python launch/evaluate.py base runs/quickstart runs/quickstart@best        # each against the base model
    python launch/evaluate.py base runs/quickstart --part test --answers all   # its test rows, answers too
    python launch/evaluate.py runs/quickstart --data.path other.jsonl          # every row of that file
    python launch/evaluate.py runs/quickstart --drift --forgetting items.jsonl # and what else it did to the model
    python launch/evaluate.py HuggingFaceTB/SmolLM2-135M-Instruct --data.path other.jsonl

Prints loss and perplexity for people, a table if there is more to compare, then one JSON object.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.commands.cli import verb_parser
from toolkit.runtime.json_text import to_json

if TYPE_CHECKING:
    from toolkit.checkpoint.choice import Step
    from toolkit.evaluation.comparison import AnsweredRow, Comparison
    from toolkit.evaluation.rows import Part
    from toolkit.models.load import Dtype

log = logging.getLogger("frostline")


def evaluate(
    sources: str | Path | Sequence[str | Path],
    data: str | Path | None = None,
    *,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    encoding: str | None = None,
    separator: str | None = None,
    sheet: str | None = None,
    task: str | Mapping[str, Any] | None = None,
    batch_size: int = 1,
    answers: int = 0,
    max_new_tokens: int = 256,
    constrain: bool = False,
    shots: int = 0,
    seed: int = 42,
    step: Step | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    dtype: Dtype | None = None,
    part: Part = "validation",
    keeps_predictions: bool = False,
    drift: bool = False,
    drift_max_new_tokens: int = 64,
    forgetting: str | Path | None = None,
    forgetting_task: str | Mapping[str, Any] | None = None,
) -> Comparison:
    """Compute the scores of models on the same rows: loss, likelihood of options, and metrics of generated answers.

    Args:
        sources: one or more run directories, each with ``@STEP`` or not, checkpoints, exports, deltas, peft adapters,
            model directories, Hub ids or bundled names; ``base`` is the model that the first run began from.
        data: file, directory, pattern or Hub data set; all its rows are used. Defaults to the rows that the first run
            held out.
        split: split of a Hub data set, directory or archive. Defaults to its only one, or train.
        name: configuration of a Hub data set, or folder of a directory.
        revision: branch, tag or commit of a Hub data set.
        encoding: encoding of text files. Defaults to what is detected.
        separator: character between the fields of a CSV file. Defaults to what is detected.
        sheet: sheet of an Excel workbook. Defaults to the first visible one that is not empty.
        task: name or file of a task, or a mapping, by which ``data`` is read. Defaults to the run's, or to the one that
            fits the columns.
        batch_size: rows computed at once.
        answers: so many rows, from the first, are answered by generation too.
        max_new_tokens: longest answer in tokens.
        constrain: generate these answers a second time, as nothing but one of the options, or JSON by the schema.
        shots: answered training rows before each question to the base, which is evaluated with and without them.
        seed: of resampling, of the shots and of trivial answers.
        step: checkpoint of a run that names none, by its number or as ``latest`` or ``best``. Defaults to the latest.
        base: new path of the base model of runs, deltas or adapters, if it moved.
        trust_remote_code: run code that ships with the model; with the base of a run or delta, if that was trained so.
        dtype: precision of the computation. Defaults to the run's, or to that in which a model is stored.
        part: which rows the run held out: ``validation`` (data.validation) or ``test`` (data.test, data.folds).
        keeps_predictions: end before anything is computed if rows have neither options nor answers to keep.
        drift: score the base's own answers to everyday prompts under every source, for ``Comparison.drift``.
        drift_max_new_tokens: longest of these answers in tokens.
        forgetting: file of labelled items with options, or a task file of lm-eval that names its rows, on which base
            and sources are compared too, for ``Comparison.forgetting``.
        forgetting_task: task by which these items are read, or a task file of lm-eval. Defaults to ``choice``.

    Raises:
        DataError: no ``data`` is given and the first source held no rows out, or rows are invalid.
        UsageError: a source cannot be opened; or ``drift`` or ``forgetting`` is asked for, and the base of the first
            source is not known.
    """
    from toolkit.data.sources import ReadOptions, Source
    from toolkit.evaluation.outputs import Asked
    from toolkit.evaluation.side_effects import SideEffects, compare_with_side_effects
    from toolkit.evaluation.sources import BASE, OpenOptions

    rows = None
    if data is not None:
        reading = ReadOptions.of(encoding, separator, sheet)
        rows = Source(str(data), split, name, revision, options=reading, task=task)
    options = OpenOptions(step, base, trust_remote_code, dtype)
    asked = Asked(batch_size, answers, max_new_tokens, constrain, keeps_predictions)
    named = [sources] if isinstance(sources, str | Path) else sources
    if BASE in named and Path(BASE).exists():
        log.warning("%s is the model that the first run began from; the directory of that name is ./%s", BASE, BASE)
    side_effects = SideEffects(
        drift_max_new_tokens if drift else None, None if forgetting is None else str(forgetting), forgetting_task
    )
    return compare_with_side_effects(list(map(str, named)), rows, part, asked, options, shots, seed, side_effects)


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, then evaluate, and return the exit code; see ``cli.verb_parser`` for ``program``."""
    arguments = vars(_parse(words, program))
    from toolkit.commands.saved_evaluation import runs_among, save_evaluation
    from toolkit.evaluation.table import report, summary
    from toolkit.runtime.distributed import require_one_process
    from toolkit.runtime.paths import explain_refused_write, output_file, replace_text, require_unused_folder
    from toolkit.runtime.printable import printable, printable_json

    require_one_process("evaluate.py")
    output, predictions, overwrite = (arguments.pop(name) for name in ("output", "predictions", "overwrite"))
    if output is not None:
        output = output_file(output, overwrite, reads=(arguments["data"], arguments["forgetting"]))
    if predictions is not None:
        require_unused_folder(predictions, overwrite, "--predictions")
    runs = runs_among(arguments["sources"]) if arguments.pop("save") else []
    comparison = evaluate(**arguments, keeps_predictions=predictions is not None)
    for line in (summary(comparison), *report(comparison)):
        print(printable(line))
    text = to_json(comparison.as_dict(), ensure_ascii=False)
    if output is not None:
        with explain_refused_write(output.parent):
            replace_text(output, f"{text}\n")
    print(printable_json(text))
    if predictions is not None:
        save_predictions(comparison, predictions)
    save_evaluation(comparison, runs)
    return 0


def save_predictions(comparison: Comparison, folder: Path) -> None:
    """Write what each model gives the rows into a folder.

    Of questions with options a file MODEL.json, as PubMedQA's official script takes it: the likeliest option by the
    row's id. Of generated answers a file MODEL.jsonl with id, QUESTION, CONTEXTS, REFERENCE and ANSWER, and
    MODEL.constrained.jsonl of those that constrained decoding gave.

    Raises:
        DiskError: the folder cannot be written.
    """
    from toolkit.runtime.paths import explain_refused_write, replace_text

    texts = {
        (name, ".json"): to_json(options, ensure_ascii=False, indent=1) + "\n"
        for name, options in comparison.predictions.items()
    }
    rows = comparison.answered_rows
    for suffix, kind in ((".jsonl", "answers"), (".constrained.jsonl", "constrained")):
        for name in getattr(rows[0], kind) if rows else ():
            lines = (to_json(_answer_line(row, getattr(row, kind)[name]), ensure_ascii=False) for row in rows)
            texts[name, suffix] = "".join(f"{line}\n" for line in lines)
    with explain_refused_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stems = _file_stems([name for name, _ in texts])
        for (name, suffix), text in texts.items():
            path = folder / f"{stems[name]}{suffix}"
            replace_text(path, text)
            log.info("predictions of %s: %s", name, path)


def _answer_line(row: AnsweredRow, answer: str) -> dict[str, Any]:
    asked = {"id": row.id, "QUESTION": row.question, "CONTEXTS": list(row.contexts)}
    return {**asked, "REFERENCE": row.reference, "ANSWER": answer}


def _file_stems(names: Iterable[str]) -> dict[str, str]:
    """Return a file name of each model's own, without its suffix."""
    stems = dict[str, str]()
    for name in dict.fromkeys(names):
        stem = re.sub(r"[^\w@.-]+", "_", name).strip("_.") or "model"
        possible = chain([stem], (f"{stem}-{number}" for number in count(2)))
        stems[name] = next(one for one in possible if one not in stems.values())
    return stems


def _parse(words: Sequence[str] | None, program: str | None) -> argparse.Namespace:
    """Parse the command line, and end the process if flags contradict each other."""
    from toolkit.commands.side_effect_flags import add_side_effect_flags
    from toolkit.config import flags

    parser = verb_parser(__doc__, program)
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE",
        help="run directory, RUN@STEP, export, delta, peft adapter, model directory or Hub id; base is the model that "
        "the first run began from",
    )  # fmt: skip
    parser.add_argument("--data.path", dest="data", help="rows to evaluate on; default: what the first run held out")
    flags.add_source_flags(parser, "data.")
    parser.add_argument(
        "--data.task", dest="task", type=flags.name_or_mapping, metavar="TASK",
        help="task by which they are read: a name, a file, or a mapping in YAML; default: the run's, or what fits the "
        "columns",
    )  # fmt: skip
    parser.add_argument(
        "--part", choices=("validation", "test"), default="validation",
        help="rows that the run held out: to choose by (data.validation), or to report on (data.test, data.folds); "
        "default: validation",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=flags.positive_int, default=1, help="rows computed at once; default: 1")
    parser.add_argument(
        "--answers", type=flags.row_count, default=0, metavar="{N,all}",
        help="answer so many rows by generation, and score the answers; default: 0",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", type=flags.positive_int, default=256, help="longest answer in tokens; default: 256"
    )
    parser.add_argument(
        "--constrain", action="store_true",
        help="generate --answers a second time, as nothing but one of the options or labels, or JSON by the schema: "
        "tells format and knowledge apart",
    )  # fmt: skip
    parser.add_argument(
        "--shots", type=flags.whole_number, default=0,
        help="answered training rows before each question to the base, which is evaluated with and without them",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=flags.whole_number, default=42, help="of resampling, shots and trivial answers; default: 42"
    )
    _add_output_flags(parser)
    add_side_effect_flags(parser)
    flags.add_open_model_flags(
        parser, "precision to compute in; default: the run's, or that in which a model is stored"
    )
    arguments = parser.parse_args(words)
    _check(parser, arguments)
    return arguments


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is written, and where."""
    parser.add_argument("--output", type=Path, help="file for the JSON, which is printed too")
    parser.add_argument("--overwrite", action="store_true", help="replace --output, and files in --predictions")
    parser.add_argument(
        "--save", action="store_true",
        help="write the JSON to evaluation.json of each run among the sources, and its scores to its metrics.jsonl and "
        "to TensorBoard as evaluation/METRIC",
    )  # fmt: skip
    parser.add_argument(
        "--predictions", type=Path, metavar="FOLDER",
        help="folder for files of each source: the option of each row by its id, as PubMedQA's official script takes "
        "them (.json), and generated answers (.jsonl)",
    )  # fmt: skip


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End the process if flags contradict each other."""
    from toolkit.commands.side_effect_flags import check_side_effect_flags

    for key in ("split", "name", "revision", "encoding", "separator", "sheet", "task"):
        if getattr(arguments, key) and not arguments.data:
            parser.error(f"--data.{key} goes with --data.path; the rows that a run held out are those of its recipe")
    if arguments.part == "test" and arguments.data:
        parser.error("--part names rows that a run held out, and --data.path other ones; leave out one of the two")
    if arguments.output is not None and arguments.output.is_dir():
        parser.error(f"--output {arguments.output} is a directory; expected a file")
    if arguments.predictions is not None and arguments.predictions.is_file():
        parser.error(f"--predictions {arguments.predictions} is a file; expected a folder")
    if arguments.overwrite and arguments.output is None and arguments.predictions is None:
        parser.error("--overwrite goes with --output or --predictions")
    check_side_effect_flags(parser, arguments)
    if arguments.max_new_tokens != 256 and not arguments.answers:
        parser.error("--max-new-tokens goes with --answers; without it nothing is generated")
    if arguments.constrain and not arguments.answers:
        parser.error("--constrain goes with --answers; without it nothing is generated")
