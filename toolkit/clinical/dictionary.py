"""Read a dictionary of adverse events: MedDRA's files from the user's own path, or the toy one, and find its terms.

MedDRA is never shipped. Its codes are the same in every language, so that a Korean term leads to the English preferred
term. An event is coded at the lowest level (LLT); preferred term (PT) and primary system organ class (SOC) follow.
"""

from __future__ import annotations

import csv
import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

from toolkit.clinical.meddra import read_meddra
from toolkit.clinical.terms import Term
from toolkit.retrieval.index import TextIndex
from toolkit.runtime.errors import DataError

TOY = "toy"
"""Name of the dictionary that comes with Frostline, in place of a path."""
_PER_PART = 2
"""Terms that are found for each sentence or clause of a note, so that no event takes the places of the others."""
ICD10 = "icd10cm"
"""Name of the dictionary that the package simple-icd-10-cm has, to try retrieval on something big."""


@dataclass(frozen=True)
class Dictionary:
    """Terms, their index, and the version that records name."""

    version: str
    terms: Sequence[Term]

    def find(self, name: str) -> Term | None:
        """Return the term of a name in any language, but for case and blanks; None if there is none."""
        return self._by_name.get(_folded(name))

    def of_code(self, code: int | str) -> Term | None:
        """Return the term of a code of the lowest level; None if there is none."""
        return self._by_code.get(str(code))

    def candidates(self, text: str, most: int, per_part: int | None = None) -> list[Term]:
        """Return the terms that fit a text best, the best first, each once.

        With ``per_part``, the text is searched part by part (a sentence, a clause) for so many terms each, so that a
        note of several events finds candidates for all; the parts take turns.
        """
        parts = [text] if per_part is None else parts_of(text)
        found = [self._search(part, per_part or most) for part in parts]
        turns = [of_part[place] for place in range(per_part or most) for of_part in found if place < len(of_part)]
        return list(dict.fromkeys(turns))[:most]

    def candidate_names(self, text: str, most: int) -> list[str]:
        """Return the names of the terms that fit the parts of a note best, in its language where they have one."""
        language = "ko" if any("가" <= letter <= "힣" for letter in text) else "en"
        return [term.shown(language) for term in self.candidates(text, most, _PER_PART)]

    @cached_property
    def fingerprint(self) -> str:
        """Return a SHA-256 of the terms, and of how they are found."""
        names = "\n".join(f"{term}" for term in self.terms)
        return hashlib.sha256(f"{self._index.fingerprint}\n{self.version}\n{names}".encode()).hexdigest()

    def _search(self, text: str, most: int) -> list[Term]:
        """Return the best terms: a term has an entry a language, of which the better counts."""
        entries = self._index.search(text, 4 * most)
        return list(dict.fromkeys(self._entries[number][1] for number, _ in entries))[:most]

    @cached_property
    def _entries(self) -> list[tuple[str, Term]]:
        """Return the names that are searched, of current terms alone."""
        return [(name, term) for term in self.terms if term.is_current for name in term.names]

    @cached_property
    def _index(self) -> TextIndex:
        return TextIndex([name for name, _ in self._entries])

    @cached_property
    def _by_name(self) -> Mapping[str, Term]:
        """Return the terms by name; a current one goes before another of that name."""
        ordered = sorted(self.terms, key=lambda term: term.is_current)
        return {_folded(name): term for term in ordered for name in term.names}

    @cached_property
    def _by_code(self) -> Mapping[str, Term]:
        return {str(term.code): term for term in self.terms}


def open_dictionary(name: str | Path) -> Dictionary:
    """Open a dictionary: ``toy``, ``icd10cm``, or a directory with MedDRA's .asc files (see ``meddra.read_meddra``).

    Raises:
        DataError: there are no such files, or they cannot be read.
        UsageError: ``icd10cm`` is named and simple-icd-10-cm is not installed.
    """
    if str(name) in (TOY, ICD10):
        return _shipped(str(name))
    path = Path(name)
    if not path.is_dir():
        raise DataError(
            f"dictionary {name} is no directory; expected one with MedDRA's .asc files, or {TOY} or {ICD10}"
        )
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() == ".asc")
    return _read(path, tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=2)
def _read(path: Path, state: tuple[tuple[str, int, int], ...]) -> Dictionary:
    """Read MedDRA's files, once for each ``state`` of them."""
    return Dictionary(*read_meddra(path))


@cache
def _shipped(name: str) -> Dictionary:
    if name == TOY:
        return toy()
    from toolkit.clinical.icd10 import read_icd10

    return Dictionary(*read_icd10())


def toy() -> Dictionary:
    """Return the toy dictionary: 200 terms written for this project, with codes of its own."""
    with (Path(__file__).parent / "toy_dictionary.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return Dictionary("Frostline toy-1", [_toy_term(row) for row in rows])


def _toy_term(row: Mapping[str, Any]) -> Term:
    return Term(
        int(row["llt_code"]), row["llt_en"], int(row["pt_code"]), row["pt_en"], int(row["soc_code"]), row["soc_en"],
        other_names=(row["llt_ko"],),
    )  # fmt: skip


def parts_of(text: str) -> list[str]:
    """Return the sentences and clauses of a note, or the note where it has one."""
    marks = str.maketrans(dict.fromkeys(".,;:!?·/\n()[]", "\n"))
    return [part.strip() for part in text.translate(marks).split("\n") if part.strip()] or [text]


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())
