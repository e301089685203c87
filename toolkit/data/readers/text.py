"""Text of a file: its encoding, asked for or detected, and its lines in a stream."""

from __future__ import annotations

import codecs
import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from toolkit.data.readers.content import Content
from toolkit.data.readers.row import ENCODING_ADVICE
from toolkit.runtime.errors import DataError

log = logging.getLogger("frostline")

HEAD_BYTES = 2**20
"""How much of a text file is looked at to detect its encoding, its separator and its form."""
LONGEST_LINE = 64 * 2**20
"""Longest line, field or JSON value in characters; a longer one is no row of text."""

_MOST_ASCII = 64 * 2**20
"""How far a file is searched for the first byte that is not ASCII, which tells encodings apart."""
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_TEXT_CHARACTER = re.compile(
    "[\t\n\r -~°±·×–—‘’“”…、-】ㄱ-ㅣ가-힣ぁ-ヿ一-鿿À-\u024f\uff00-\uff65"
    "\u0300-\u036f\u0370-\u052f\u0590-\u06ff\u0900-\u097f\u0e00-\u0e7f\u1100-\u11ff\u1e00-\u1eff]"
)
"""Characters of the scripts of many readers: Latin, also with marks apart, Korean, also in letters apart, Japanese and
Chinese, Greek, Cyrillic, Hebrew, Arabic, Devanagari and Thai. No blank of U+2000 is among them: it is an ASCII blank
whose bytes are in the other order."""
_LINE_END = re.compile(r"\r\n|[\r\n]")
_FEWEST_SYLLABLES = 4
"""Syllables below which a text is too short to tell its encoding."""
_SYLLABLES, _HANJA = re.compile("[가-힣]"), re.compile("[\u4e00-\u9fff\uf900-\ufaff]")
_FREQUENT = frozenset(
    "이다는을의에가고하로은지한기도를서과어인있해면리사자스으라나시수대것아정일그여부제전주보들상적성게오구동만원장안경비신화중니생"
)
"""Half of the syllables of a Korean text are of these: particles, endings and the commonest of words."""
_SHORTEST_WITH_FREQUENT = 12
"""Syllables from which on a text has some of the frequent ones, even a list of nouns."""


def encoding_of(content: Content, asked: str | None, by_line: bool, log_it: bool = True) -> str:
    """Return the encoding to decode a file with, and log it if it was detected and is not UTF-8.

    Args:
        content: the file.
        asked: ``data.encoding``; taken as it is, but for a byte order mark that UTF-8 may begin with.
        by_line: whether a line is a row, so that a few lines in another encoding are damage to these rows; else all of
            the file is looked at as one text.
        log_it: whether to log what was detected.

    Raises:
        DataError: ``asked`` is no encoding.
    """
    head = _head(content)
    if asked is not None:
        encoding = _known_encoding(asked)
        if encoding != "utf-16" or head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return encoding
        return "utf-16-be" if _is_plausible(head, "utf-16-be") else "utf-16-le"
    for mark, encoding in _BYTE_ORDER_MARKS:
        if head.startswith(mark) and (encoding != "utf-16" or b"\0" in head):
            if encoding != "utf-8-sig" and log_it:
                log.info("%s is read as %s, by its byte order mark", content.label, encoding.upper())
            return encoding
    encoding = _guess(head, by_line)
    if encoding != "utf-8" and log_it:
        log.info("%s is read as %s, as its bytes suggest; data.encoding names another", content.label, encoding)
    return encoding


@contextmanager
def open_text(content: Content, encoding: str, newline: str | None) -> Iterator[TextIO]:
    """Open a file as text; bytes that are not in its encoding become lone surrogates, to be found row by row.

    ``newline`` is that of ``io.TextIOWrapper``.
    """
    errors = "strict" if encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"
    with content.open() as binary, io.TextIOWrapper(binary, encoding, errors, newline) as text:
        try:
            yield text
        except UnicodeError as error:
            raise _wrong_encoding(content.label, encoding, error) from None


def lines_of(text: TextIO, label: str) -> Iterator[str]:
    """Yield the lines of a text, each of bounded length, with their ends.

    Raises:
        DataError: a line is longer than any row.
    """
    number = 0
    while line := text.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise DataError(
                f"{label}: line {number} is longer than {LONGEST_LINE:,} characters, as no row of text is; check that "
                "it is the file that you mean"
            )
        yield line


def decoded_head(content: Content, encoding: str) -> str:
    """Return the first part of a file as text, cut anywhere."""
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    try:
        return decoder.decode(content.head(HEAD_BYTES))
    except UnicodeError as error:
        raise _wrong_encoding(content.label, encoding, error) from None


def whole_lines(text: str) -> list[str]:
    """Return the lines of a text without their ends, as files have them, without blank ones.

    ``str.splitlines`` ends a line at U+2028 and others too, which stand within the texts of rows.
    """
    return [line for line in _LINE_END.split(text) if line.strip()]


def _wrong_encoding(label: str, encoding: str, error: UnicodeError) -> DataError:
    """Return the error for a file that cannot be decoded as a whole."""
    return DataError(f"{label}: is not {encoding} text throughout ({error}); {ENCODING_ADVICE}")


def _known_encoding(name: str) -> str:
    """Return the name of an encoding of text by which Python knows it; DataError if it knows none."""
    try:
        found = codecs.lookup(name)
        if not found._is_text_encoding:
            raise LookupError
    except (LookupError, ValueError):
        raise DataError(
            f"data.encoding is {name!r}, which is no encoding of text; expected one such as utf-8, utf-16, cp949, "
            "euc-kr, shift_jis or cp1252"
        ) from None
    return "utf-8-sig" if found.name == "utf-8" else found.name


def _head(content: Content) -> bytes:
    """Return the first bytes of a file, and more of them as long as they are all ASCII."""
    with content.open() as stream:
        head = stream.read(HEAD_BYTES)
        searched = len(head)
        while head and searched < _MOST_ASCII and head.isascii():
            more = stream.read(HEAD_BYTES)
            searched += len(more)
            if not more:
                break
            if not more.isascii():
                return head + more
        return head


def _guess(head: bytes, by_line: bool) -> str:
    """Return the encoding of bytes without a byte order mark: utf-8, utf-16-le, utf-16-be or cp949."""
    if head.count(0) * 50 > len(head):
        for encoding in ("utf-16-le", "utf-16-be"):
            if _is_plausible(head, encoding):
                return encoding
    if len(head) >= HEAD_BYTES:
        head = head[: _last_break(head)]
    lines = [line for line in head.splitlines() if line.strip()]
    kinds = [_is_utf8(line) for line in lines if not line.isascii()]
    wrong = kinds.count(False)
    if not wrong or True in kinds or (by_line and wrong * 2 <= len(lines)):
        return "utf-8"
    return "cp949" if _is_korean(b"\n".join(lines)) else "utf-8"


def _last_break(head: bytes) -> int:
    """Return where to end a head that was cut off anywhere, so that no character is cut: behind its last blank."""
    return max(head.rfind(blank) for blank in (b"\n", b"\r", b" ", b",")) + 1 or len(head)


def _is_utf8(line: bytes) -> bool:
    """Return whether bytes are UTF-8."""
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_plausible(head: bytes, encoding: str) -> bool:
    """Return whether bytes are text of a few scripts in this encoding, nearly all of it."""
    text = head[: len(head) // 2 * 2].decode(encoding, "replace")
    return len(_TEXT_CHARACTER.findall(text)) >= 0.95 * len(text) and any(mark in text for mark in "\n\r\t ,:")


def _is_korean(head: bytes) -> bool:
    """Return whether bytes are cp949 text in Korean.

    Text in a Western encoding can be valid cp949 too: ``37°C`` in cp1252 is a rare syllable. So most characters beyond
    ASCII have to be syllables, and most of these of the 2,350 usual ones, whose second byte is 0xA1 or above. A few
    damaged characters are let pass; their rows are named later. Chinese in GBK and Japanese in EUC-JP pass that, as
    rare syllables among Hanja: so syllables that any Korean text has must be frequent, the more so beside Hanja.
    """
    text = head.decode("cp949", "replace")
    syllables = _SYLLABLES.findall(text)
    usual = sum(len(syllable.encode("euc_kr")) == 2 for syllable in syllables)  # the others take 8 bytes
    if len(syllables) < _FEWEST_SYLLABLES or text.count("\ufffd") * 100 > len(syllables):
        return False
    if len(syllables) * 2 <= len(re.findall("[^\0-\x7f]", text)) or usual * 10 < len(syllables) * 8:
        return False
    hanja, frequent = len(_HANJA.findall(text)), sum(syllable in _FREQUENT for syllable in syllables) / len(syllables)
    if not hanja:
        return len(syllables) < _SHORTEST_WITH_FREQUENT or frequent >= 0.05
    return frequent >= (0.1 if hanja * 10 <= len(syllables) else 0.3)
