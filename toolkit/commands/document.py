"""Write grounded documents with their sources and what is not verified, or make rows of case files.

    python launch/document.py answers.jsonl --output documents                    # Markdown and .docx of each answer
    python launch/document.py note.txt bundle.json --rows rows.jsonl              # what generate.py --input reads

The rows of answers have the columns that generate.py wrote, with the passages that were retrieved (PASSAGES). A case
file is a note in plain text, SOAP or not, or a FHIR bundle. The summary counts sentences that are not verified and,
where rows have a reference, precision and recall of the citations. For research; not for care.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.commands.cli import verb_parser


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, then write documents or rows, and return the exit code."""
    parser = verb_parser(__doc__, program)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="answers, or case files with --rows")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=Path, metavar="DIR", help="directory for the documents")
    target.add_argument("--rows", type=Path, metavar="FILE", help="JSON lines file for the rows of case files")
    parser.add_argument("--format", nargs="+", choices=("md", "docx"), help="of the documents; default: md docx")
    parser.add_argument("--answer-column", help="column of the documents; default: ANSWER")
    parser.add_argument(
        "--type", choices=("narrative", "site_letter", "deviation_report"), help="DOCUMENT_TYPE of rows"
    )
    parser.add_argument("--language", choices=("ko", "en"), help="LANGUAGE of rows; default: ko")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    arguments = parser.parse_args(words)
    if arguments.rows and (arguments.format or arguments.answer_column):
        parser.error("--format and --answer-column go with --output")
    if arguments.output and (arguments.type or arguments.language):
        parser.error("--type and --language go with --rows")
    if arguments.rows:
        _write_rows(arguments)
    else:
        _write_documents(arguments)
    return 0


def _write_rows(arguments: argparse.Namespace) -> None:
    from toolkit.clinical.case_files import REQUESTS, read_case
    from toolkit.runtime.paths import make_parent, replace_text

    language, kind = arguments.language or "ko", arguments.type or "narrative"
    more = {"LANGUAGE": language, "DOCUMENT_TYPE": kind, "REQUEST": REQUESTS[language][kind]}
    rows = [{**read_case(path), **more} for path in arguments.files]
    _require_new([arguments.rows], arguments.overwrite)
    make_parent(arguments.rows)
    replace_text(arguments.rows, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{arguments.rows}: {len(rows)} rows")


def _write_documents(arguments: argparse.Namespace) -> None:
    from toolkit.clinical import RESEARCH_USE
    from toolkit.clinical.document_checks import score_citations, unverified
    from toolkit.clinical.document_output import GroundedDocument
    from toolkit.clinical.document_text import sentences
    from toolkit.runtime.paths import make_parent, replace_bytes, replace_text

    column, formats = arguments.answer_column or "ANSWER", arguments.format or ["md", "docx"]
    rows = [row for path in arguments.files for row in _rows(path, column)]
    width = len(str(len(rows)))
    names = [arguments.output / f"document-{number:0{width}d}" for number in range(1, len(rows) + 1)]
    _require_new([name.with_suffix(f".{kind}") for name in names for kind in formats], arguments.overwrite)
    make_parent(names[0])
    count = flagged = 0
    for name, row in zip(names, rows, strict=True):
        document = GroundedDocument.of(row[column], row)
        if "md" in formats:
            replace_text(name.with_suffix(".md"), document.markdown())
        if "docx" in formats:
            replace_bytes(name.with_suffix(".docx"), document.docx())
        count += sum(not sentence.is_heading for sentence in sentences(row[column]))
        flagged += len(unverified(row[column], row))
    print(f"{len(rows)} documents in {arguments.output}; {flagged} of {count} sentences are not verified")
    pairs = [(row[column], row.get("REFERENCE") or row.get("DOCUMENT")) for row in rows]
    if known := [(answer, reference) for answer, reference in pairs if isinstance(reference, str)]:
        score = score_citations(*map(list, zip(*known, strict=True)))
        print(f"citations beside the references': precision {score.precision:.3f}, recall {score.recall:.3f}")
    print(RESEARCH_USE["en"])


def _rows(path: Path, column: str) -> list[dict[str, Any]]:
    """Return the rows of a file of answers; DataError if one has no document."""
    from toolkit.data.sources import read_rows
    from toolkit.runtime.errors import DataError

    rows = []
    for row in read_rows(str(path)):
        if row.fault or not isinstance(row.values, dict) or not isinstance(row.values.get(column), str):
            raise DataError(
                f"{row.origin} {row.fault or f'has no text in {column}'}; name the column by --answer-column"
            )
        rows.append(row.values)
    return rows


def _require_new(paths: Sequence[Path], overwrite: bool) -> None:
    """Raise UsageError if a file exists that is not to be replaced."""
    from toolkit.runtime.errors import UsageError

    if not overwrite and (there := next((path for path in paths if path.exists()), None)):
        raise UsageError(f"{there} exists; name another place, or --overwrite")
