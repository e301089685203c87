"""Talk with a model in a terminal, or answer the lines of the standard input."""

from __future__ import annotations

import contextlib
import sys

from toolkit.inference.chat import Chat
from toolkit.runtime.errors import DataError, UsageError
from toolkit.runtime.printable import printable


def converse(chat: Chat) -> None:
    """Answer each line of the standard input until its end or ``/quit``.

    Raises:
        DataError: a message cannot be asked, and nobody is at a terminal to ask another one.
        UsageError: there is no terminal, and no line.
    """
    talks, messages = sys.stdin is not None and sys.stdin.isatty(), 0
    if talks:
        print("/new begins a new conversation, /quit or Ctrl-D ends it, Ctrl-C an answer", file=sys.stderr)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its arrow keys
    while (message := _read_line(talks)) not in (None, "/quit"):
        if message == "/new":
            chat.forget()
        elif message:
            messages += 1
            _print_reply(chat, message, talks)
    if not messages and not talks:
        raise UsageError("there is no question; give --question or --input, or lines on the standard input")


def _read_line(talks: bool) -> str | None:
    """Return the next line, stripped; None after the last one, and without a standard input."""
    if sys.stdin is None:
        return None
    prompt = "> " if talks else ""
    if not sys.stdout.isatty():  # which holds the answers alone
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return input(prompt).strip()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"the standard input is not {error.encoding} text ({error.reason}); convert it") from None


def _print_reply(chat: Chat, message: str, talks: bool) -> None:
    """Print the answer to a message, on a terminal while it is given; Ctrl-C or an error there ends only the answer."""
    try:
        if sys.stdout.isatty():
            chat.reply(message, prints=True)
        else:
            print(printable(chat.reply(message)), flush=True)
    except KeyboardInterrupt:
        if not talks:
            raise
        print()
    except DataError as error:
        if not talks:
            raise
        print(f"error: {printable(str(error))}", file=sys.stderr)
