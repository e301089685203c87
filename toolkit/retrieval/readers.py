"""Read the documents of a corpus as lines: txt, md, pdf, docx and hwpx, each with its own library."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.runtime.errors import DataError, UsageError

_INSTALL = 'pip install {package} (pip install -e ".[corpus]")'


@dataclass(frozen=True)
class DocumentLine:
    """A line or paragraph of a document."""

    text: str
    heading: int = 0
    """Level of a heading, from 1; 0 is none."""
    page: int | None = None
    """Page of a PDF, from 1."""


def read_lines(path: Path, content: bytes) -> list[DocumentLine]:
    """Return the lines of a document with this content, in Unicode's composed form; blank ones as empty texts.

    Raises:
        UsageError: the library for files of this kind is not installed.
        DataError: the file cannot be read as one of its kind.
    """
    reader = READERS[path.suffix.lower()]
    try:
        lines = list(reader(content))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except Exception as error:  # each library has errors of its own for a damaged file
        raise DataError(f"{path}: cannot be read as {path.suffix} ({type(error).__name__}: {error})") from None
    if not any(line.text.strip() for line in lines):
        raise DataError(f"{path}: holds no text; a scan needs text recognition first")
    return [DocumentLine(unicodedata.normalize("NFC", line.text), line.heading, line.page) for line in lines]


def _text(content: bytes) -> Iterator[DocumentLine]:
    for line in content.decode("utf-8-sig").splitlines():
        yield DocumentLine(line.strip())


def _markdown(content: bytes) -> Iterator[DocumentLine]:
    is_code = False
    for raw in content.decode("utf-8-sig").splitlines():
        line = raw.strip()
        is_code ^= line.startswith("```")
        marks = len(line) - len(line.lstrip("#"))
        if 0 < marks <= 6 and line[marks : marks + 1] == " " and not is_code:
            yield DocumentLine(_plain(line[marks:].strip(" #")), marks)
        else:
            yield DocumentLine(_plain(line))


def _plain(line: str) -> str:
    """Return a line without marks of emphasis."""
    return line.replace("**", "").replace("__", "")


def _pdf(content: bytes) -> Iterator[DocumentLine]:
    for number, page in enumerate(_import("pypdf", "pypdf").PdfReader(io.BytesIO(content)).pages, start=1):
        for line in page.extract_text().splitlines():
            yield DocumentLine(line.strip(), page=number)
        yield DocumentLine("", page=number)


def _docx(content: bytes) -> Iterator[DocumentLine]:
    document = _import("docx", "python-docx").Document(io.BytesIO(content))
    for block in document.iter_inner_content():
        if hasattr(block, "rows"):
            for row in block.rows:
                yield DocumentLine(" | ".join(cell.text.strip() for cell in row.cells))
        else:
            style = str(block.style.name)
            level = style.removeprefix("Heading ") if style.startswith("Heading ") else ""
            yield from (
                DocumentLine(text.strip(), int(level) if level.isdecimal() else 0) for text in block.text.split("\n")
            )
        yield DocumentLine("")


def _hwpx(content: bytes) -> Iterator[DocumentLine]:
    document = _import("hwpx", "python-hwpx").HwpxDocument.open(io.BytesIO(content))
    for paragraph in document.text.plain().splitlines():
        yield DocumentLine(paragraph.strip())


def _import(module: str, package: str) -> Any:
    try:
        return __import__(module)
    except ImportError:
        raise UsageError(f"this kind of file needs {package}: {_INSTALL.format(package=package)}") from None


READERS: dict[str, Callable[[bytes], Iterator[DocumentLine]]] = {
    ".txt": _text, ".md": _markdown, ".pdf": _pdf, ".docx": _docx, ".hwpx": _hwpx,
}  # fmt: skip
"""Reader by the ending of a file's name."""
