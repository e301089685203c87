"""Check records or answers by the rules of a task; each finding has its row, field, rule and value.

    python launch/verify.py answers.jsonl                               # what generate.py --output wrote
    python launch/verify.py records.csv --dictionary path/to/MedDRA     # records: .jsonl, .csv, .xpt …
    python launch/verify.py answers.jsonl --dictionary toy --records ae.xpt

A file of answers has the columns of its rows and the answers (ANSWER, or --answer-column). A file of records has a
record a row, under the names of SDTM or CDASH. Nothing is changed. The exit code is 1 if anything is found. For
research; not for care.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.commands.cli import verb_parser

if TYPE_CHECKING:
    from toolkit.clinical.dictionary import Dictionary
    from toolkit.clinical.verification import Violation

_RECORD_FIELD = "AETERM"
_MOST_SHOWN = 50


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, check the file, and return 1 if anything is found; see ``cli.verb_parser``."""
    from toolkit.clinical.dictionary import open_dictionary
    from toolkit.clinical.tables import ENDINGS, write_table
    from toolkit.clinical.verification import CHECKS

    parser = verb_parser(__doc__, program)
    parser.add_argument("file", type=Path, help="answers or records: .jsonl, .json, .csv, .xlsx, .xpt …")
    parser.add_argument("--check", choices=sorted(CHECKS), default="sdtm_ae", help="of answers; default: sdtm_ae")
    parser.add_argument(
        "--dictionary", metavar="PATH", help="check codes too: a directory of MedDRA's .asc files, toy or icd10cm"
    )
    parser.add_argument("--notes", metavar="FILE", help="of records: rows with USUBJID, NOTE and NOTE_DATE")
    parser.add_argument("--answer-column", default="ANSWER", help="name of the answers; default: ANSWER")
    parser.add_argument(
        "--records", type=Path, metavar="FILE", help=f"also write the whole records: {', '.join(ENDINGS)}"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write what is found, as JSON lines or .csv")
    parser.add_argument("--overwrite", action="store_true", help="replace --records and --output if they exist")
    given = parser.parse_args(words)
    for path in (given.records, given.output):
        if path is not None and path.exists() and not given.overwrite:
            parser.error(f"{path} exists; --overwrite replaces it")
        if path is not None and path.suffix not in (ENDINGS if path is given.records else (".jsonl", ".csv")):
            parser.error(f"{path} ends in {path.suffix or 'nothing'}; expected .jsonl or .csv, or .xpt for --records")
    dictionary = None if given.dictionary is None else open_dictionary(given.dictionary)
    rows = _read(given.file)
    if any(given.answer_column in row for row in rows):
        violations, records = _check_answers(rows, given.check, given.answer_column, dictionary)
    else:
        violations, records = _check_records(rows, given.file, given.notes, dictionary)
    if given.records is not None:
        write_table(given.records, records)
    if given.output is not None:
        write_table(given.output, [one.as_dict() for one in violations])
    _print(violations, len(rows), dictionary)
    return 1 if violations else 0


def _check_answers(
    rows: Sequence[Mapping[str, Any]], name: str, column: str, dictionary: Dictionary | None
) -> tuple[list[Violation], list[dict[str, Any]]]:
    """Check answers; return what is found, and the whole records of those that are events."""
    from dataclasses import replace

    from toolkit.clinical.records import RecordsError, complete, read_events
    from toolkit.clinical.verification import find_check
    from toolkit.runtime.errors import DataError

    check = find_check(name, dictionary)
    violations, records = [], list[dict[str, Any]]()
    for number, row in enumerate(rows, start=1):
        if column not in row:
            raise DataError(f"row {number} has no {column}; expected an answer in each row, or records in all")
        answer = row[column] if isinstance(row[column], str) else _json(row[column])
        violations += [replace(one, row=number) for one in check(answer, row)]
        try:
            records += complete(read_events(answer), row, dictionary) if name == "sdtm_ae" else []
        except RecordsError:
            continue  # which the check has found
    return violations, records


def _check_records(
    rows: Sequence[Mapping[str, Any]], file: Path, notes: str | None, dictionary: Dictionary | None
) -> tuple[list[Violation], list[dict[str, Any]]]:
    """Check records, each against the note of its subject if notes are given."""
    from toolkit.clinical.context import Context
    from toolkit.clinical.records import in_order, to_sdtm
    from toolkit.clinical.rules import check_records
    from toolkit.runtime.errors import DataError

    records = [{**{str(name).strip().upper(): "" for name in row}, **to_sdtm(row)} for row in rows]
    if not any(_RECORD_FIELD in record for record in records):
        names = ", ".join(dict.fromkeys(str(name) for row in rows for name in row))
        raise DataError(f"{file} has neither answers nor a column {_RECORD_FIELD}; it has {names}")
    of_subject: dict[str, Mapping[str, Any]] = {}
    for row in _read(Path(notes)) if notes is not None else ():
        of_subject[str(row.get("USUBJID"))] = row
    contexts = []
    for record in records:
        note = of_subject.get(str(record.get("USUBJID")), {})
        contexts.append(Context(note.get("NOTE"), note.get("NOTE_DATE"), note, dictionary))
    return check_records(records, contexts), [in_order(record) for record in records]


def _read(file: Path) -> list[Mapping[str, Any]]:
    """Return the rows of a file; DataError if one cannot be read or is no object."""
    from toolkit.clinical.tables import read_xpt
    from toolkit.data.sources import read_rows
    from toolkit.runtime.errors import DataError

    if file.suffix.lower() == ".xpt":
        if not file.is_file():
            raise DataError(f"{file}: no such file; expected records in SAS transport format")
        return list(read_xpt(file))
    rows = read_rows(str(file))
    for row in rows:
        if row.fault or not isinstance(row.values, Mapping):
            raise DataError(f"{row.origin} {row.fault or 'is no object'}; expected columns with names")
    return [row.values for row in rows]


def _json(value: Any) -> str:
    from toolkit.runtime.json_text import to_json

    return to_json(value, ensure_ascii=False)


def _print(violations: Sequence[Violation], rows: int, dictionary: Dictionary | None) -> None:
    """Print what is found: first by rule, then each."""
    from toolkit.clinical import RESEARCH_USE
    from toolkit.clinical.rules import rules
    from toolkit.runtime.printable import printable

    sources = {rule.id: rule.source for rule in rules()}
    if not violations:
        print(f"{rows} rows, nothing found")
    else:
        broken = len({one.row for one in violations})
        print(f"{rows} rows, of which {broken} break a rule")
        for rule, count in Counter(one.rule for one in violations).most_common():
            print(f"{count:6}  {rule}{f' ({sources[rule]})' if rule in sources else ''}")
        print()
        for one in violations[:_MOST_SHOWN]:
            print(printable(str(one)))
        if len(violations) > _MOST_SHOWN:
            print(f"and {len(violations) - _MOST_SHOWN} more; --output FILE keeps all")
    print(f"codes are those of {dictionary.version}" if dictionary else "codes are not checked (--dictionary)")
    print(RESEARCH_USE["en"])
