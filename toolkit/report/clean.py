"""Make any text fit to stand in a page: what no HTML file may hold is shown as a sign instead."""

from __future__ import annotations

import re

_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_INVALID = re.compile("[\x80-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_DIRECTIONS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """Return text with control characters as their pictures (␀), and lone surrogates and noncharacters as �."""
    text = _CONTROLS.sub(lambda found: chr(0x2421 if found[0] == "\x7f" else 0x2400 + ord(found[0])), text)
    text = "".join("\ufffd" if ord(c) & 0xFFFE == 0xFFFE else c for c in text) if not text.isascii() else text
    return _INVALID.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def clean_title(text: str) -> str:
    """Return text for a place without markup, where a change of its direction could not be kept to it."""
    return " ".join(_DIRECTIONS.sub("", clean(text)).split())
