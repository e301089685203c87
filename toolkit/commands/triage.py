"""Decide on patients' reports, or assess adverse event notes, with a run of the task triage or ae_triage.

    python launch/triage.py runs/triage --input reports.jsonl --output triaged.jsonl --confidence 0.7
    python launch/triage.py runs/triage --input reports.jsonl --output triaged.jsonl --rules our_red_flags.yaml
    python launch/triage.py runs/ae_triage --input notes.jsonl --output assessed.jsonl

A report gets the model's class; none where the model is less sure than --confidence; and what a red flag asks for,
whatever the model says. A note gets the model's fields, the reporting clock and the questions to the site that follow
from them. For research; not for care (docs/triage.md).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.commands.cli import verb_parser
from toolkit.runtime.errors import DataError, UsageError

if TYPE_CHECKING:
    from toolkit.data.questions import Question
    from toolkit.inference.open_model import OpenedModel

log = logging.getLogger("frostline")

_COLUMNS = {
    "triage": (
        "DECISION", "DECIDED_BY", "MODEL_CLASS", "CONFIDENCE", "RED_FLAGS", "DENIED", "NOTICE", "PROBABILITIES",
        "MODEL_REASON", "VIOLATIONS",
    ),
    "ae_triage": ("ANSWER", "FIELDS", "CLOCK", "QUESTIONS", "NOTICE", "VIOLATIONS"),
}  # fmt: skip
"""Columns of the output beside those of the rows, by the ``verify`` of the task files that this command is for."""


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, then decide, and return the exit code; see ``cli.verb_parser`` for ``program``."""
    arguments = _parse(words, program)
    from toolkit.clinical.red_flags import OWN_RULES, read_red_flags
    from toolkit.data.questions import Questions
    from toolkit.data.sources import ReadOptions, Source, iter_rows
    from toolkit.inference.open_model import data_settings, open_model
    from toolkit.runtime.distributed import require_one_process
    from toolkit.runtime.json_text import to_json
    from toolkit.runtime.paths import make_parent, replace_text

    require_one_process("triage.py")
    if arguments.output.exists() and not arguments.overwrite:
        raise UsageError(f"{arguments.output} exists; --overwrite replaces it, another --output leaves it")
    reading = ReadOptions.of(arguments.encoding, arguments.separator, arguments.sheet)
    source = Source(
        arguments.input, arguments.split, arguments.name, arguments.revision, options=reading, key="--split"
    )  # fmt: skip
    questions = Questions(lambda: iter_rows(source), *data_settings(arguments.source, arguments.input))
    kind = questions.task.spec.verify
    if kind not in _COLUMNS:
        raise UsageError(
            f"{arguments.source} was trained by the task {questions.task.name}, whose verify is {kind or 'not set'}; "
            f"expected a run of a task with verify: {' or '.join(_COLUMNS)}"
        )
    rules = read_red_flags(arguments.rules or OWN_RULES)
    least = least_confidence(arguments.source, arguments.confidence, arguments.risk) if kind == "triage" else 0.0
    asked = list(questions)
    _require_room(asked, _COLUMNS[kind])
    make_parent(arguments.output)
    opened = open_model(
        arguments.source, arguments.step, arguments.base, arguments.trust_remote_code, arguments.dtype
    )  # fmt: skip
    decided = _decide(arguments, opened, asked, least, rules) if kind == "triage" else _assess(arguments, opened, asked)
    lines = (to_json({**_values(one), **own}, ensure_ascii=False) for one, own in zip(asked, decided, strict=True))
    replace_text(arguments.output, "".join(f"{line}\n" for line in lines))
    print(arguments.output)
    return 0


def _decide(
    arguments: argparse.Namespace, opened: OpenedModel, asked: Sequence[Question], least: float, rules: Any
) -> list[dict[str, Any]]:
    """Return the columns of each report: the decision, who made it, and the reason that the model gives its class."""
    from toolkit.clinical.triage import decided, require_classes
    from toolkit.evaluation.label_probabilities import label_probabilities

    samples = [question.sample for question in asked]
    require_classes(samples[0].options, rules)
    origins = [f"row {question.row + 1}" for question in asked]
    found = label_probabilities(opened, samples, origins, arguments.batch_size)
    own = [sample.options[int(of_row.argmax())] for sample, of_row in zip(samples, found, strict=True)]
    forced = [replace(sample, allowed=_only(label)) for sample, label in zip(samples, own, strict=True)]
    answers = _answers(arguments, opened, forced)
    columns = []
    for question, of_row, answer in zip(asked, found, answers, strict=True):
        row, options = _values(question), question.sample.options
        columns.append(decided(row, options, of_row.tolist(), answer, least, rules))
    counts = Counter(one["DECIDED_BY"] for one in columns)
    log.info(
        "%d reports: %d by the model, %d by a red flag, %d left to a person below %.3f",
        len(columns), counts["model"], counts["rule"], counts["nobody"], least,
    )  # fmt: skip
    return columns


def _assess(
    arguments: argparse.Namespace, opened: OpenedModel, asked: Sequence[Question]
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the columns of each note: the model's fields, and what follows from them."""
    from toolkit.clinical.ae_triage import assessed

    answers = _answers(arguments, opened, [one.sample for one in asked])
    return [assessed(answer, _values(question)) for question, answer in zip(asked, answers, strict=True)]


def _answers(arguments: argparse.Namespace, opened: OpenedModel, samples: Sequence[Any]) -> list[str]:
    """Generate the answers within the task's format, in order."""
    from toolkit.commands.answers import make_answerer
    from toolkit.runtime.distributed import World

    options = argparse.Namespace(
        max_new_tokens=arguments.max_new_tokens, batch_size=arguments.batch_size, temperature=0.0, top_p=1.0, seed=42,
        on_bad_row=None, constrain=True, ds_config=None,
    )  # fmt: skip
    answerer = make_answerer(opened, options, World())
    return [answer or "" for _, answer in answerer.in_order(enumerate(samples))]


def least_confidence(source: str, chosen: float | None, risk: float) -> float:
    """Return the ``chosen`` confidence, or the one that the run's evaluation shows to be right often enough.

    Raises:
        UsageError: the run has no evaluation on its validation rows with an abstention.
    """
    if chosen is not None:
        return chosen
    file = Path(source) / "evaluation.json"
    advice = f"name --confidence, or run evaluate.py {source} --save first, which shows what each would give"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        points = values["abstention"][source]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{file} holds no abstention of {source}; {advice}") from None
    if not values["held_out"] or "(data.test" in values["data"]:
        raise UsageError(f"{file} is of {values['data']}; a confidence is chosen on validation rows: {advice}")
    good = [point["confidence"] for point in points if point["risk"] <= risk]
    if not good:
        log.warning(
            "at no confidence were at most %.0f %% of the answered validation rows wrong: all reports but those with "
            "a red flag are left to a person", 100 * risk,
        )  # fmt: skip
        return math.inf
    log.info("confidence %.3f, chosen on %d validation rows (--risk %s)", min(good), values["rows"], risk)
    return float(min(good))


def _values(question: Question) -> dict[str, Any]:
    return dict(question.values) if isinstance(question.values, Mapping) else {}


def _require_room(asked: Sequence[Question], columns: Sequence[str]) -> None:
    """Raise DataError if a row has a column of the output already, as an output does."""
    for question in asked:
        if taken := [name for name in columns if name in _values(question)]:
            raise DataError(f"row {question.row + 1} has a column {taken[0]}, where its decision would go; rename it")


def _only(label: str) -> Any:
    return lambda: (label,)


def _parse(words: Sequence[str] | None, program: str | None) -> argparse.Namespace:
    """Parse the command line, and end the process if flags contradict each other."""
    from toolkit.config import flags

    parser = verb_parser(__doc__, program)
    parser.add_argument("source", help="run directory, export, delta, peft adapter, model directory or Hub id")
    parser.add_argument("--input", required=True, help="file, directory, pattern or Hub data set of reports or notes")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines file for the rows with what was decided")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    flags.add_source_flags(parser)
    parser.add_argument(
        "--confidence", type=flags.probability,
        help="least probability of the likeliest class; below it a report is left to a person. Default: the least of "
        "the run's evaluation.json at which at most --risk of the validation rows are wrong",
    )  # fmt: skip
    parser.add_argument(
        "--risk", type=flags.probability, default=0.1,
        help="most errors among the answered validation rows, where no --confidence is named; default: 0.1",
    )  # fmt: skip
    parser.add_argument("--rules", type=Path, help="red flags as YAML in place of those that come with Frostline")
    parser.add_argument(
        "--batch-size", type=flags.positive_int, default=8, help="rows computed at once; default: 8"
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", type=flags.positive_int, default=256, help="longest answer in tokens; default: 256"
    )
    flags.add_open_model_flags(
        parser, "precision to compute in; default: the run's, or that in which a model is stored"
    )
    arguments = parser.parse_args(words)
    if arguments.output.is_dir():
        parser.error(f"--output {arguments.output} is a directory; expected a file")
    return arguments
