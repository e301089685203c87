"""Write the answers to a file of questions: each is kept at once, and the file appears when all are there."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from toolkit.runtime.errors import DataError, UsageError
from toolkit.runtime.file_lock import NO_LOCK_ERRORS, FileLock
from toolkit.runtime.json_text import to_json
from toolkit.runtime.paths import explain_refused_write, sync_directory

log = logging.getLogger("frostline")

_MARK = "frostline answers"
"""First key of a begun file, by which it is known; its value is the version of the form."""


class NumberedRow(Protocol):
    """A row to be answered."""

    @property
    def row(self) -> int:
        """Return its number, from 0."""

    @property
    def columns(self) -> Mapping[str, Any]:
        """Return what the file has of it beside the answer."""


class AnswerFile:
    """Rows with answers on their way into a JSON lines file; a context manager.

    A line has the columns of its row, the answer, and under QUESTION, CONTEXTS and REFERENCE what was asked, where the
    row has no such column.

    Until ``publish``, answers are in a file beside it, ``PATH.part``: the settings, then a line a row with its number,
    in any order. The same command finds it after an interruption and goes on.

    Args:
        path: the file to write.
        settings: what decides the answers, by name; a begun file of other settings is not gone on with.
        answer_column: name of the answers.
        overwrite: whether a file at ``path``, or a begun one of other settings, may be replaced.

    Raises:
        UsageError: there is such a file and ``overwrite`` is not set, PATH.part is something else, or another process
            is writing it.
        DiskError: the files cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], answer_column: str, overwrite: bool) -> None:
        self.path = path = path.resolve()  # what a link points to is replaced, not the link
        self._part = path.with_name(f"{path.name}.part")
        self._answer_column = answer_column
        self._settings = _plain({_MARK: 1, **settings, "answer_column": answer_column})
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is no file; leave --output out to print the answers")
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists; --overwrite replaces it, another --output leaves it")
        self._mode = path.stat().st_mode & 0o777 if path.exists() else 0o666
        with explain_refused_write(path.parent):
            self._lock = self._take()
        self._places = dict[int, int]()
        """Where the line of each row begins in the begun file."""
        self._end = 0
        """Where the next line begins; 0 where the file is begun anew, once there is an answer."""
        try:
            self._find_rows(overwrite)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def rows(self) -> frozenset[int]:
        """Numbers of the rows that are there, with an answer or skipped."""
        return frozenset(self._places)

    def add(
        self, question: NumberedRow, answer: str | Mapping[str, str] | None, more: Mapping[str, Any] | None = None
    ) -> None:
        """Keep an answer, or that there is none, so that a process that is killed now has not lost it.

        Answers by name, to a note that several tasks ask about, are in columns of their own, ``ANSWER_NAME``.
        ``more`` are further columns of its line, after the answer.

        Raises:
            DiskError: the disk is full.
        """
        with explain_refused_write(self._part):
            if self._end == 0:
                os.ftruncate(self._lock.descriptor, 0)
                self._append(self._settings)
            place = self._end
            kept = {"row": question.row, "columns": question.columns, "answer": answer}
            self._append({**kept, **({"more": dict(more)} if more else {})})
            self._places[question.row] = place

    def further_columns(self, question: NumberedRow) -> dict[str, Any] | None:
        """Return the ``more`` that was kept with a row's answer; None if the row has none yet.

        Raises:
            DataError: the row was another one when it was answered.
        """
        if question.row not in self._places:
            return None
        with self._reader() as file:
            kept = self._read(file, question.row)
        if kept["columns"] != _plain(question.columns):
            raise self._another_row(question.row)
        more: dict[str, Any] = kept.get("more", {})
        return more

    def require_same(self, questions: Iterable[NumberedRow]) -> None:
        """Raise DataError if a row that is there is not among ``questions``, or was another one when it was answered.

        ``questions`` are not read where no row is there.
        """
        missing = set(self._places)
        with self._reader() as file:
            for question in questions if missing else ():
                if question.row in missing and self._read(file, question.row)["columns"] == _plain(question.columns):
                    missing.discard(question.row)
        if missing:
            raise self._another_row(min(missing))

    def publish(self) -> Path:
        """Write all lines in the order of their rows, put the file in its place, and return that.

        Raises:
            DiskError: the disk is full; what was answered is kept.
        """
        staging = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.staging")
        with explain_refused_write(self.path.parent):
            try:
                new = os.O_EXCL | os.O_NOFOLLOW
                with open(staging, "wb", opener=lambda name, flags: os.open(name, flags | new, self._mode)) as out:
                    out.writelines(map(_encoded, self._lines()))
                    out.flush()
                    os.fsync(out.fileno())
                staging.replace(self.path)
            except OSError:
                with suppress(OSError):
                    staging.unlink()
                raise
            self._part.unlink()
            sync_directory(self.path.parent)
        return self.path

    def close(self) -> None:
        """Release the file; what was added stays, and an empty one is removed."""
        is_empty = self._lock.descriptor >= 0 and os.fstat(self._lock.descriptor).st_size == 0
        self._lock.release(remove=is_empty)

    def _another_row(self, row: int) -> DataError:
        return DataError(
            f"row {row + 1} is not the one that was answered before an interruption; put the rows back, "
            f"remove {self._part} to begin anew, or choose another --output"
        )

    def _take(self) -> FileLock:
        """Open and lock the begun file, which is made if there is none."""
        while True:
            lock = FileLock(self._part, mode=self._mode)
            try:
                is_free = lock.acquire()
            except OSError as error:
                if error.errno not in NO_LOCK_ERRORS:
                    raise
                log.warning("%s: this file system has no locks; let no other command write it", self._part)
                return lock
            if not is_free:
                lock.release()
                raise UsageError(f"another process is writing {self._part}; wait for it, or choose another --output")
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.descriptor), self._part.stat()):
                    return lock
            lock.release()  # the process before has published it meanwhile

    def _find_rows(self, overwrite: bool) -> None:
        """Find the rows of a begun file. One of other settings stays until there is an answer in its place."""
        with self._reader() as file:
            head = file.readline()
            settings = _parsed(head)
            if not head or (not head.endswith(b"\n") and _line(self._settings).startswith(head)):
                return  # none, or one that was killed as it began
            if not (isinstance(settings, dict) and _MARK in settings):
                raise UsageError(
                    f"{self._part} is in the way and holds no answers; move it, or choose another --output"
                )
            if settings != self._settings:
                if not overwrite:
                    raise UsageError(
                        f"{self._part} holds {sum(1 for _ in file)} answers of a command that was interrupted, which "
                        f"had {_differences(settings, self._settings)}; go on with the former, begin anew with "
                        "--overwrite, or choose another --output"
                    )
                return
            places, place = dict[int, int](), len(head)
            for number, line in enumerate(file, start=2):
                content = _parsed(line)
                if not line.endswith(b"\n"):
                    break  # the process was killed as it wrote
                if not (isinstance(content, dict) and content.keys() - {"more"} == {"row", "columns", "answer"}):
                    raise UsageError(
                        f"{self._part} line {number} is damaged; remove the file, or choose another --output"
                    )
                places[content["row"]] = place
                place += len(line)
        self._places, self._end = places, place

    def _append(self, content: Any) -> None:
        """Write a line at the end; what a full disk has taken of it is not counted."""
        line, written = _line(content), 0
        while written < len(line):
            written += os.pwrite(self._lock.descriptor, line[written:], self._end + written)
        os.ftruncate(self._lock.descriptor, self._end + len(line))  # what was there of a line that was cut off
        self._end += len(line)

    def _reader(self) -> Any:
        """Open the begun file to read, from its beginning."""
        os.lseek(self._lock.descriptor, 0, os.SEEK_SET)
        return os.fdopen(os.dup(self._lock.descriptor), "rb")

    def _read(self, file: Any, row: int) -> dict[str, Any]:
        """Return what is kept of a row."""
        file.seek(self._places[row])
        kept: dict[str, Any] = json.loads(file.readline())
        return kept

    def _lines(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of the rows with an answer, in order."""
        with self._reader() as file:
            for row in sorted(self._places):
                kept = self._read(file, row)
                if kept["answer"] is not None:
                    column, answer = self._answer_column, kept["answer"]
                    named = answer if isinstance(answer, dict) else None
                    answers = {column: answer} if named is None else {f"{column}_{key}": named[key] for key in named}
                    yield {**kept["columns"], **answers, **kept.get("more", {})}


def _plain(content: Any) -> Any:
    """Return ``content`` as JSON gives it back."""
    return json.loads(_line(content))


def _line(content: Any) -> bytes:
    """Return a JSON line in ASCII, in which every string can be written."""
    return to_json(content, default=str).encode() + b"\n"


def _parsed(line: bytes) -> Any:
    """Return the content of a line; None if it is not JSON."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe the settings that differ: ``step 116 (now 120)``."""
    keys = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    return ", ".join(f"{key} {before.get(key)} (now {now.get(key)})" for key in keys)


def _encoded(line: Mapping[str, Any]) -> bytes:
    """Return a JSON line; one with half a surrogate pair, which UTF-8 lacks, has escapes in place of its characters."""
    try:
        return f"{to_json(line, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:
        return _line(line)
