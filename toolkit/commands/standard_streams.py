"""Standard input, output and error that a command began without, or whose other end is gone or full."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from toolkit.runtime.errors import DiskError


def open_missing_streams() -> None:
    """Open /dev/null in the place of a standard stream that is closed (``>&-``).

    Else the next file that is opened, such as a checkpoint's, gets its descriptor, and what a library prints is written
    into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest one that is free: this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - open until the end


@contextmanager
def checked_output() -> Iterator[None]:
    """Let what cannot be written to standard output in the body, or at its end, be one error.

    Raises:
        DiskError: it is on a full disk, or a pipe whose reader has ended; nothing more is written there.
    """
    stream = sys.stdout
    sys.stdout = cast("TextIO", _CheckedOutput(stream))
    try:
        yield
        sys.stdout.flush()
    except _OutputFailed as failed:
        with suppress(OSError, ValueError):  # else Python fails once more when it ends
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        raise DiskError(f"standard output cannot be written ({failed}), so not all of it was") from None
    finally:
        sys.stdout = stream


class _OutputFailed(Exception):
    """Says why standard output cannot be written; no OSError, which those who write files would take for their own."""


class _CheckedOutput:
    """A text stream that raises ``_OutputFailed`` for OSError."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with _explained():
            return self._stream.write(text)

    def flush(self) -> None:
        with _explained():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise _OutputFailed("what reads it has ended") from None
    except OSError as error:
        raise _OutputFailed(error.strerror) from None
