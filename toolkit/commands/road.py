"""Walk notes from report to checked document: triage, records, rules, reporting clock, document, verification.

    python launch/road.py notes.csv --output road --triage RUN --coding RUN --document RUN --ae-triage RUN
    python launch/road.py a.txt b.txt --output road --triage RUN --coding RUN --document RUN --column LANGUAGE=en
    python launch/road.py labelled.jsonl --output road --triage RUN --coding RUN --document RUN --score

NOTE is a file of rows (.jsonl, .csv, .xlsx …), a directory or Hub data set of them, or a note as a .txt or .md file.
The runs stand on one base, which is loaded once; a note's common tokens are computed once for all steps. --output gets
road.jsonl, a line a note with what each step gave, a report a note, and ae.csv with all records; the same command goes
on after an interruption. No note is left out: what a step cannot do, or what breaks a rule, is flagged for a person
with the reason. For research; not for care (docs/clinical.md).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.commands.cli import verb_parser

if TYPE_CHECKING:
    from toolkit.clinical.road import Road, Walked
    from toolkit.data.questions import RowReader
    from toolkit.data.sources import Row
    from toolkit.inference.answer_file import AnswerFile
    from toolkit.inference.note_models import NoteModels

log = logging.getLogger("frostline")

_TEXTS = (".txt", ".md")
"""Endings of files that are a note each."""
RECORDS_TABLE, SCORES = "ae.csv", "scores.json"


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, walk the notes, and return the exit code; see ``cli.verb_parser`` for ``program``."""
    arguments = _parse(words, program)
    from toolkit.clinical.red_flags import OWN_RULES, read_red_flags
    from toolkit.clinical.road import TRIAGE, Road
    from toolkit.commands.road_files import LINES, open_lines
    from toolkit.commands.triage import least_confidence
    from toolkit.runtime.distributed import require_one_process
    from toolkit.runtime.paths import explain_refused_write, require_unused_folder

    require_one_process("road.py")
    is_begun = (arguments.output / f"{LINES}.part").exists()
    require_unused_folder(arguments.output, arguments.overwrite or is_begun)
    rules = read_red_flags(arguments.rules or OWN_RULES)
    least = least_confidence(arguments.sources[TRIAGE], arguments.confidence, arguments.risk)
    for source in _sources(arguments):
        source.check_there()
    readers, dictionary = _readers(arguments, rules)
    with explain_refused_write(arguments.output):
        arguments.output.mkdir(parents=True, exist_ok=True)
    steps, total = _checkpoints(arguments), _count(arguments)
    with open_lines(arguments, {"least": least, "checkpoints": steps, "notes": total}) as file:
        models = _open(arguments, readers, steps)
        road = Road(models, least, arguments.tries, dictionary, rules, arguments.score)
        walked = _walk(arguments, road, readers, file, total)
    for model in (models.models[step] for step in models.steps):
        model.answerer.report_control_tokens()
    _summarise(arguments, walked, road, models)
    return 0


def _sources(arguments: argparse.Namespace) -> list[Any]:
    """Return the sources of rows that the command line names; files of text are none."""
    from toolkit.data.sources import ReadOptions, Source

    options = ReadOptions.of(arguments.encoding, arguments.separator, arguments.sheet)
    return [
        Source(path, arguments.split, arguments.name, arguments.revision, options=options, key="--split")
        for path in arguments.notes
        if not _is_text(path)
    ]


def _is_text(path: str) -> bool:
    return Path(path).suffix.lower() in _TEXTS


def _rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of all notes, in the order of the command line, each with the columns of ``--column``."""
    from toolkit.clinical.case_files import read_case
    from toolkit.data.sources import Row, iter_rows
    from toolkit.runtime.errors import DataError

    tables = iter(_sources(arguments))
    for path in arguments.notes:
        if not _is_text(path):
            rows = iter_rows(next(tables))
        else:
            try:
                rows = iter([Row(path, read_case(Path(path)))])
            except DataError as error:
                rows = iter([Row(path, None, str(error))])
        for row in rows:
            if isinstance(row.values, Mapping):
                given = {name: value for name, value in row.values.items() if value not in (None, "")}
                yield replace(row, values={**row.values, **{k: v for k, v in arguments.column if k not in given}})
            else:
                yield row


def _readers(arguments: argparse.Namespace, rules: Any) -> tuple[dict[str, RowReader], Any]:
    """Return what reads rows for each step, and the dictionary of the records' step, before a model is loaded.

    Raises:
        UsageError: a run's task is not that of its step.
    """
    from toolkit.clinical.road import RECORDS, STEPS, TRIAGE
    from toolkit.clinical.triage import require_classes
    from toolkit.data.questions import RowReader
    from toolkit.data.retrieval import dictionary_of
    from toolkit.inference.open_model import data_settings
    from toolkit.runtime.errors import UsageError
    from toolkit.tasks.choose import task_for_questions
    from toolkit.tasks.output import labels_of

    readers, dictionary = {}, None
    for step, source in arguments.sources.items():
        data = data_settings(source, arguments.notes[0])[0]
        task = task_for_questions(data)
        if task.spec.verify != STEPS[step]:
            raise UsageError(
                f"{source} was trained by the task {task.name}, whose verify is {task.spec.verify or 'not set'}; "
                f"expected a run of a task with verify: {STEPS[step]}"
            )
        if step == TRIAGE:
            require_classes(labels_of(task.spec), rules)
        if step == RECORDS:
            dictionary = dictionary_of(data)
        readers[step] = RowReader(data, task)
    return readers, dictionary


def _checkpoints(arguments: argparse.Namespace) -> list[Any]:
    """Return the step of each run that is taken; None of a source that is no run."""
    from toolkit.checkpoint.choice import choose_checkpoint
    from toolkit.inference.open_model import is_run

    return [
        choose_checkpoint(Path(source), arguments.step).step if is_run(Path(source)) else None
        for source in arguments.sources.values()
    ]


def _open(arguments: argparse.Namespace, readers: Mapping[str, RowReader], steps: Sequence[Any]) -> NoteModels:
    """Load the base once, and what each run trained."""
    from toolkit.commands.answers import make_answerer
    from toolkit.inference.note_models import NoteModels, StepModel
    from toolkit.inference.shared_base import open_together
    from toolkit.runtime.distributed import World

    world, sources = World(), list(arguments.sources.values())
    opened = open_together(sources, world.device, steps, arguments.base, arguments.trust_remote_code)
    models = {}
    for (step, reader), one in zip(readers.items(), opened, strict=True):
        options = argparse.Namespace(
            max_new_tokens=arguments.max_new_tokens, batch_size=1, temperature=0.0, top_p=1.0, seed=arguments.seed,
            on_bad_row=None, constrain=reader.task.spec.output != "text", ds_config=None,
        )  # fmt: skip
        models[step] = StepModel(one, make_answerer(one, options, world), reader)
    return NoteModels(models, min(one.delta.mask.boundary for one in opened if one.delta is not None))


def _count(arguments: argparse.Namespace) -> int:
    return min(sum(1 for _ in _rows(arguments)), arguments.limit or 2**62)


def _walk(
    arguments: argparse.Namespace, road: Road, readers: Mapping[str, RowReader], file: AnswerFile, total: int
) -> list[Walked]:
    """Walk all notes that ``file`` lacks, keep what each gives as it is done, and publish the file."""
    from toolkit.commands.road_files import NoteLine, write_reports
    from toolkit.runtime.progress_bar import ProgressBar

    for name in (RECORDS_TABLE, SCORES):  # of --overwrite
        (arguments.output / name).unlink(missing_ok=True)
    if file.rows:
        log.info("%d of %d notes were walked before an interruption", len(file.rows), total)
    masking, notes = next(iter(readers.values())), []
    with ProgressBar("walking", total, "note", brief=True) as bar:
        for number, row in zip(range(1, total + 1), _rows(arguments), strict=False):
            values = row.values
            for reader in readers.values():  # what one run masks, no step and no output has
                values, masking = reader.masked(values), reader if reader.masks else masking
            origin, fault = masking.fault(row, "").strip(), row.fault and masking.fault(row, row.fault)
            given = values if isinstance(values, Mapping) else {}
            line = NoteLine(number - 1, {"NUMBER": number, "ORIGIN": origin, "ROW": dict(given)})
            before = file.further_columns(line)
            if before is not None:
                notes.append(road.recall(number, origin, given, before, fault))
            else:
                notes.append(road.walk(number, origin, values, fault))
                write_reports(arguments.output, notes[-1], arguments.format, len(str(total)))
                file.add(line, {}, notes[-1].results)
            bar.advance(1)
    file.publish()
    return notes


def _summarise(arguments: argparse.Namespace, notes: Sequence[Walked], road: Road, models: NoteModels) -> None:
    """Print what was done, and the scores if they are asked for."""
    import json

    from toolkit.clinical import RESEARCH_USE
    from toolkit.clinical.road_scores import road_scores, scores_table
    from toolkit.clinical.tables import write_table
    from toolkit.runtime.paths import replace_text

    if records := [record for note in notes if note.records for record in note.records["RECORDS"]]:
        write_table(arguments.output / RECORDS_TABLE, records)
    flagged = sum(bool(note.flags) for note in notes)
    print(f"{len(notes)} notes in {arguments.output}; {flagged} flagged for a person")
    log.info("%d common tokens passed the shared blocks once for all steps", models.shared.shared_tokens)
    if arguments.score:
        scores = road_scores(notes, road)
        values = {"notice": RESEARCH_USE, "scores": [one.as_dict() for one in scores]}
        replace_text(arguments.output / SCORES, json.dumps(values, ensure_ascii=False, indent=2) + "\n")
        print(scores_table(scores) if scores else "no note has a right answer to score by")
    print(RESEARCH_USE["en"])


def _column(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE")
    return name, value


def _parse(words: Sequence[str] | None, program: str | None) -> argparse.Namespace:
    """Parse the command line, and end the process if flags contradict each other."""
    from toolkit.clinical.road import CLOCK, DOCUMENT, RECORDS, TRIAGE
    from toolkit.config import flags

    parser = verb_parser(__doc__, program)
    parser.add_argument(
        "notes", nargs="+", metavar="NOTE", help="file of rows, directory, Hub data set, or .txt or .md"
    )
    parser.add_argument("--triage", required=True, metavar="RUN", help="run of the task triage")
    parser.add_argument("--coding", required=True, metavar="RUN", help="run of the task ae_coding")
    parser.add_argument("--document", required=True, metavar="RUN", help="run of the task grounded_document")
    parser.add_argument("--ae-triage", metavar="RUN", help="run of the task ae_triage; without it no reporting clock")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new or empty directory")
    parser.add_argument("--overwrite", action="store_true", help="replace files of the same names in --output")
    parser.add_argument(
        "--format", nargs="+", choices=("md", "docx"), default=["md"], help="of the reports; default: md"
    )
    parser.add_argument(
        "--score", action="store_true",
        help="score each step by the right answers of the rows, with the right inputs and with the predicted ones",
    )  # fmt: skip
    parser.add_argument(
        "--column", type=_column, action="append", default=[], metavar="NAME=VALUE",
        help="column of rows that lack it, as NOTE_DATE=2026-03-12 of notes as text; may be repeated",
    )  # fmt: skip
    flags.add_source_flags(parser)
    parser.add_argument("--limit", type=flags.positive_int, help="walk the first so many notes only")
    parser.add_argument(
        "--confidence", type=flags.probability, help="least probability of a class of triage, as triage.py has it"
    )
    parser.add_argument(
        "--risk", type=flags.probability, default=0.1, help="where no --confidence is named, as triage.py has it"
    )
    parser.add_argument("--rules", type=Path, help="red flags as YAML in place of those that come with Frostline")
    parser.add_argument(
        "--tries", type=flags.positive_int, default=3, help="most answers to a task whose rules they break; default: 3"
    )
    parser.add_argument(
        "--max-new-tokens", type=flags.positive_int, default=512, help="longest answer in tokens; default: 512"
    )
    parser.add_argument(
        "--seed", type=flags.whole_number, default=42, help="of what is drawn in further tries; default: 42"
    )
    parser.add_argument("--step", type=flags.checkpoint_step, metavar="{N,latest,best}", help="checkpoint of the runs")
    parser.add_argument("--base", help="where the base model is, if it moved since training")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code of a base that was trained with it")
    arguments = parser.parse_args(words)
    named = {TRIAGE: arguments.triage, RECORDS: arguments.coding, CLOCK: arguments.ae_triage,
             DOCUMENT: arguments.document}  # fmt: skip
    arguments.sources = {step: source for step, source in named.items() if source is not None}
    return arguments
