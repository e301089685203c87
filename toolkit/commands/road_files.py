"""The files of the clinical road: ``road.jsonl``, which the same command goes on with, and a report a note."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from toolkit.clinical.road import Walked
    from toolkit.inference.answer_file import AnswerFile

LINES = "road.jsonl"


class NoteLine(NamedTuple):
    """A note as the file of lines has it."""

    row: int
    """Its number, from 0."""
    columns: Mapping[str, Any]


def write_reports(folder: Path, note: Walked, formats: Sequence[str], width: int = 1) -> None:
    """Write a note's report in each of some formats, named by its number with ``width`` digits or more: note-01.md.

    Raises:
        UsageError: .docx is asked for and python-docx is not installed.
        DiskError: a file cannot be written.
    """
    from toolkit.clinical.road_report import report_of
    from toolkit.runtime.paths import replace_bytes, replace_text

    for kind in formats:
        report, path = report_of(note, kind), folder / f"note-{note.number:0{width}d}.{kind}"
        replace_bytes(path, report) if isinstance(report, bytes) else replace_text(path, report)


def open_lines(arguments: argparse.Namespace, more: Mapping[str, Any]) -> AnswerFile:
    """Open ``road.jsonl``, or what a command of the same settings, ``more`` among them, has begun of it.

    Raises:
        UsageError: what is there was begun with other settings, and ``--overwrite`` is not set.
    """
    from toolkit.commands.answers import place
    from toolkit.inference.answer_file import AnswerFile

    names = ("tries", "max_new_tokens", "seed", "score", "format", "column", "split", "name", "revision", "encoding",
             "separator", "sheet")  # fmt: skip
    files = {"rules": arguments.rules and str(arguments.rules), "base": arguments.base, **arguments.sources}
    settings = {name: getattr(arguments, name) for name in names} | {key: place(file) for key, file in files.items()}
    return AnswerFile(arguments.output / LINES, {**settings, **more}, "", arguments.overwrite)
