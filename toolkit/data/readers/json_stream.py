"""JSON values of a text in a stream, whatever its size: elements of a list, entries of an object, or one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from toolkit.data.readers.row import without_repeats
from toolkit.data.readers.text import LONGEST_LINE
from toolkit.runtime.errors import DataError

_CHUNK = 2**16


@dataclass
class JsonStream:
    """A text of JSON values, of which no more than a value is held.

    Every method raises DataError, with line and column, where the text is not JSON, or a value is longer than any row.
    """

    text: TextIO
    label: str
    advice: str = ""
    """What to do about a text that is not JSON, as the end of a message."""

    def __post_init__(self) -> None:
        self._buffer, self._at, self._ended = "", 0, False
        self._line, self._counted = 1, 0  # number of the line at a place in the buffer, up to which lines are counted
        self._column = 1  # of the first character of the buffer
        self._decoder = json.JSONDecoder(object_pairs_hook=without_repeats)

    @property
    def line(self) -> int:
        """Return the number of the line that is read next, from 1."""
        self._line += self._buffer.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def peek(self) -> str:
        """Return the next character that is not blank; an empty string at the end."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in " \t\n\r\ufeff":
                self._at += 1
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._fill():
                return ""

    def take(self, character: str) -> bool:
        """Step over the next character that is not blank, if it is this one."""
        if self.peek() != character:
            return False
        self._at += 1
        return True

    def value(self, longest: int | None = None) -> tuple[Any, str]:
        """Return the next value, and its text, of at most ``longest`` characters; None allows those of a row."""
        self.peek()
        while True:
            fault: json.JSONDecodeError
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                fault = error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nested too deeply
                raise DataError(
                    f"{self.label}: not readable JSON ({str(error)[:100]}); expected rows of text and lists of texts"
                ) from None
            else:
                if end < len(self._buffer) or not self._fill(keep=True):
                    written = self._buffer[self._at : end]
                    self._at = end
                    return value, written
                continue  # a number may go on in what was read just now
            if len(self._buffer) - self._at > (longest or LONGEST_LINE):
                raise DataError(
                    f"{self.label}: a value at line {self.line} has more than {longest or LONGEST_LINE:,} characters, "
                    "or is no JSON; save the rows as JSON lines"
                )
            if not self._fill(keep=True):
                raise self.fault(fault.msg[:1].lower() + fault.msg[1:], fault.pos)

    def elements(self) -> Iterator[tuple[Any, str]]:
        """Yield the elements of the list that comes next, each with its text."""
        self.take("[")
        if self.take("]"):
            return
        while True:
            if self.peek() == "]":
                raise self.fault("a comma with no row after it")
            yield self.value()
            if self.take("]"):
                return
            if not self.take(","):
                raise self.fault("expected a comma or ] after a row" if self.peek() else "it ends within the list")

    def entries(self) -> Iterator[tuple[str, Any, str]]:
        """Yield key, value and the value's text of each entry of the object that comes next."""
        self.take("{")
        if self.take("}"):
            return
        while True:
            if self.peek() != '"':
                raise self.fault("expected a key in double quotes" if self.peek() else "it ends within the object")
            key, _ = self.value()
            if not self.take(":"):
                raise self.fault("expected a colon after a key")
            yield str(key), *self.value()
            if self.take("}"):
                return
            if not self.take(","):
                raise self.fault("expected a comma or } after a value" if self.peek() else "it ends within the object")

    def fault(self, reason: str, at: int | None = None) -> DataError:
        """Return the error for a fault at a place of the buffer, or at the next character."""
        before = self._buffer[: self._at if at is None else at]
        line = self.line + before.count("\n", self._at)
        column = len(before) - before.rfind("\n") if "\n" in before else self._column + len(before)
        return DataError(f"{self.label}: not valid JSON at line {line}, column {column}: {reason}{self.advice}")

    def _fill(self, keep: bool = False) -> bool:
        """Read on, as much again as the value that is kept; return False at the end of the text."""
        if self._ended:
            return False
        kept = len(self._buffer) - self._at if keep else 0
        if not (chunk := self.text.read(max(_CHUNK, kept))):
            self._ended = True
            return False
        done = self._buffer[: self._at]
        self._line = self.line
        self._column = len(done) - done.rfind("\n") if "\n" in done else self._column + len(done)
        self._buffer, self._at, self._counted = self._buffer[self._at :] + chunk, 0, 0
        return True
