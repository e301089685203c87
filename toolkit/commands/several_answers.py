"""What ``frostline generate`` does with several runs over one base: answer each note by all of their tasks."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path

from toolkit.checkpoint.choice import Step, choose_checkpoint
from toolkit.commands.answers import make_answerer, open_answer_file, place, require_all_rows_fit, source_of
from toolkit.data.questions import Note, Notes, Questions
from toolkit.data.sources import iter_rows
from toolkit.inference.answer_file import AnswerFile
from toolkit.inference.answering import Answerer, QuestionError
from toolkit.inference.open_model import data_settings, is_run
from toolkit.inference.shared_base import open_together
from toolkit.inference.shared_prefix import SharedPrefix
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import DataError, UsageError
from toolkit.runtime.printable import printable
from toolkit.runtime.progress_bar import ProgressBar

log = logging.getLogger("frostline")


def answer_notes(arguments: argparse.Namespace, world: World) -> None:
    """Answer the rows of ``--input`` by each source; those in a begun file are left out.

    Raises:
        UsageError: two sources have the same name, several ranks were started, or as ``open_together``.
        DataError: rows cannot be asked about by the task of a source.
    """
    if world.size > 1:
        raise UsageError(
            "several sources answer in one process; start one, or ask each source by itself with several ranks"
        )
    sources = _named(arguments.sources)
    steps = {name: _step(path, arguments.step) for name, path in sources.items()}
    places = [place(path) for path in sources.values()]
    with open_answer_file(arguments, world, lambda: {"source": places, "step": list(steps.values())}) as file:
        if file is not None:
            require_all_rows_fit(arguments, source_of(arguments))
        notes = _read(arguments, sources)
        if file is not None:
            file.require_same(notes)
        opened = open_together(
            list(sources.values()), world.device, list(steps.values()), arguments.base, arguments.trust_remote_code
        )
        answerers = {name: make_answerer(one, arguments, world) for name, one in zip(sources, opened, strict=True)}
        boundary = min(one.delta.mask.boundary for one in opened if one.delta is not None)
        _answer(arguments, notes, SharedPrefix(answerers, boundary), answerers, file)
        if file is not None:
            print(file.publish())


def _named(paths: list[str]) -> dict[str, str]:
    """Return the sources by the names that their answers are given: the last part of each path."""
    names = [Path(path).resolve().name for path in paths]
    if twice := [name for at, name in enumerate(names) if name in names[:at]]:
        raise UsageError(
            f"two sources are named {twice[0]}, and so would their answers be (ANSWER_{twice[0]}); rename a directory"
        )
    return dict(zip(names, paths, strict=True))


def _step(path: str, step: Step | None) -> Step | None:
    """Return the number of a run's checkpoint, which is chosen once; ``step`` of another source."""
    return choose_checkpoint(Path(path), step).step if is_run(Path(path)) else step


def _read(arguments: argparse.Namespace, sources: Mapping[str, str]) -> Notes:
    """Return the rows as what each source's task asks about them."""
    questions, masks = {}, {}
    for name, path in sources.items():
        data, rendering = data_settings(path, arguments.input)
        masks[name] = data.on_identifier == "mask"
        column = f"{arguments.answer_column}_{name}" if arguments.output else None
        try:
            questions[name] = Questions(
                lambda: iter_rows(source_of(arguments)), data, rendering, arguments.limit,
                arguments.on_bad_row == "skip", column,
            )  # fmt: skip
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
    return Notes(questions, masks)


def _answer(
    arguments: argparse.Namespace, notes: Notes, shared: SharedPrefix, answerers: Mapping[str, Answerer],
    file: AnswerFile | None,
) -> None:  # fmt: skip
    """Keep the answers to each note as they are given, or print them."""
    done: frozenset[int] = frozenset() if file is None else file.rows
    with ProgressBar("answering", len(notes), "note", len(done), brief=True) as bar:
        for note in (note for note in notes if note.row not in done):
            answers = _answers(arguments, shared, note)
            if file is not None:
                file.add(note, answers)
            elif answers is not None:
                lines = [f"{name}: {answer}" for name, answer in answers.items()]
                print(printable("\n".join([f"row {note.row + 1}", *lines, ""])), flush=True)
            bar.advance(1)
    for answerer in answerers.values():
        answerer.report_control_tokens()


def _answers(arguments: argparse.Namespace, shared: SharedPrefix, note: Note) -> dict[str, str] | None:
    """Return the answers to a note; None if it is too long for one of the tasks, and such rows are skipped."""
    try:
        return shared.answer(note.samples, note.row)
    except QuestionError as error:
        if arguments.on_bad_row != "skip":
            raise DataError(f"{error}; --on-bad-row skip leaves such questions out") from None
        log.warning("skipped: %s", error)
        return None
