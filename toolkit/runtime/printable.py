"""Show text of others without its control characters, so that it moves no cursor and forges no line. Imports no torch.

Names of files, keys and values come from strangers. What is printed or logged shows their control characters escaped,
as Python writes them in a string.
"""

from __future__ import annotations

import re

_MOVES = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
"""Control characters but for line feed and tab, breaks of lines, changes of direction, and halves of characters."""
_CONTROLS, _CONTROLS_AND_BREAKS = re.compile(f"[{_MOVES}]"), re.compile(f"[\n\t{_MOVES}]")


def printable(text: str) -> str:
    """Return text of several lines with every control character in it escaped, but for line feeds and tabs."""
    return _CONTROLS.sub(_escape, text)


def printable_json(text: str) -> str:
    """Return JSON with the control characters that may stand in its strings escaped as JSON does."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str) -> str:
    """Return text as one line, with every control character in it escaped."""
    return _CONTROLS_AND_BREAKS.sub(_escape, text)


def has_controls(text: str) -> bool:
    """Return whether a text holds a control character, a line feed or tab among them."""
    return _CONTROLS_AND_BREAKS.search(text) is not None


def _escape(found: re.Match[str]) -> str:
    return repr(found[0])[1:-1]
