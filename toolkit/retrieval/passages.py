"""A passage of a document: its id, place and version, and how it stands in a prompt and is read back from there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_HEAD = re.compile(r"\[P:(?P<id>[^\]\s]+)\] (?P<place>[^\n]*?)(?: \((?P<since>[\d-]*) ~ ?(?P<until>[\d-]*)\))?\n")


@dataclass(frozen=True)
class Passage:
    """A part of a document, such as a paragraph of an article.

    In a prompt it is ``text_in_prompt``, from which ``passages_of`` reads all but ``file``, ``page`` and ``source``.
    """

    id: str
    """The document's id, a slash and its place: ``SOP-AE-2/4.1``. It is what a text cites, as ``[P:SOP-AE-2/4.1]``."""
    place: str
    """Title of the document and place within it, for a reader: ``이상사례 보고 절차 제4조(보고) 제1항``."""
    text: str
    since: str = ""
    """First day on which it is in force, as an ISO date; empty if it is not known."""
    until: str = ""
    """Last such day; empty if there is none yet."""
    file: str = ""
    """Path below the corpus."""
    page: int | None = None
    """Page of a PDF on which it begins, from 1."""
    source: str = ""
    """Where the document is from, as its front matter or the manifest says."""

    def in_force(self, day: str) -> bool:
        """Return whether this version is in force on a day, an ISO date; where nothing is known it is."""
        return (not self.since or self.since <= day) and (not self.until or day <= self.until)

    def text_in_prompt(self) -> str:
        """Return the passage as a row's column of texts holds it: a line with id, place and version, then the text."""
        version = f" ({self.since} ~ {self.until}".rstrip() + ")" if self.since or self.until else ""
        return f"[P:{self.id}] {self.place}{version}\n{self.text}"


def passages_of(texts: Iterable[str]) -> dict[str, Passage]:
    """Return the passages that a row's column of texts holds, by id; a text without the head of one is left out."""
    found = {}
    for text in texts:
        if head := _HEAD.match(text):
            found[head["id"]] = Passage(
                head["id"], head["place"], text[head.end() :], head["since"] or "", head["until"] or ""
            )
    return found
