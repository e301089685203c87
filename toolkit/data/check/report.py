"""What a data check found, as plain values: no identifier, and no text but the one rendered example."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

MatchKind = Literal["same row", "same question", "same answer", "same contexts", "near-duplicate", "translation"]
"""How two rows are alike."""


@dataclass(frozen=True)
class Match:
    """Names two rows that are alike."""

    kind: MatchKind
    row: str
    part: str
    other: str
    other_part: str
    similarity: float
    """1 for the same; Jaccard similarity of shingles; of a translation, the share of its marks."""

    @property
    def sides(self) -> tuple[str, str]:
        """Return both rows by name, those of the data with their part."""
        return _side(self.row, self.part), _side(self.other, self.other_part)


@dataclass(frozen=True)
class IdentifierPlace:
    """Locates an identifier without holding it."""

    row: str
    column: str
    kind: str
    start: int
    """Its first character in the column's text, counted from 0."""
    end: int


@dataclass(frozen=True)
class Finding:
    """A row, and what is to be said about it."""

    row: str
    what: str


@dataclass(frozen=True)
class Lengths:
    """Token counts of the rows of a part, before anything is cut."""

    rows: int
    median: int
    percentile_95: int
    longest: int
    supervised: int
    """Supervised tokens of all rows."""


@dataclass(frozen=True)
class TestSetOverlap:
    """A named test set, and how many of its rows are in the data."""

    name: str
    rows: int
    leaked: int
    """Of its rows, those that a row of the data is like."""

    @property
    def verdict(self) -> str:
        """Return what that means for a score on the set."""
        if self.leaked:
            return f"{self.leaked} of {self.rows} rows are in the data: no score on this set may be called official"
        return f"none of {self.rows} rows was found in the data"


@dataclass
class CheckReport:
    """Everything that a data check found."""

    data: str
    """What was read, as the recipe names it."""
    model: str
    max_length: int
    rows: dict[str, int] = field(default_factory=dict)
    """Usable rows of each part."""
    bad_rows: list[Finding] = field(default_factory=list)
    lengths: dict[str, Lengths] = field(default_factory=dict)
    cut: list[Finding] = field(default_factory=list)
    cut_tokens: int = 0
    duplicates: list[Match] = field(default_factory=list)
    """Within a part."""
    leaks: list[Match] = field(default_factory=list)
    """Between parts, and between the data and the sets that they are compared with."""
    comparisons: list[TestSetOverlap] = field(default_factory=list)
    odd_answers: list[Finding] = field(default_factory=list)
    languages: dict[str, dict[str, int]] | None = None
    """Of questions, contexts and answers; None if py3langid is not installed."""
    not_nfc: list[str] = field(default_factory=list)
    identifiers: list[IdentifierPlace] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    example_row: str = ""
    example: list[tuple[str, bool]] = field(default_factory=list)
    """Pieces of one row as the model sees it, identifiers masked, with whether each is supervised."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as values for JSON."""
        values = asdict(self)
        values["comparisons"] = [{**asdict(part), "verdict": part.verdict} for part in self.comparisons]
        values["example"] = [{"text": text, "supervised": supervised} for text, supervised in self.example]
        return values


def _side(row: str, part: str) -> str:
    return f"{row} ({part})" if part in ("train", "validation", "test") else row


NAMES_NOTE = (
    "names and addresses are not found: no pattern tells them from other words. An empty list is no proof that the "
    "rows are anonymous"
)
"""Said wherever identifiers are listed."""
LEAK_NOTE = (
    "a translation is recognised by the numbers, units and Latin abbreviations that survive it, where a row has enough "
    "of them; one with few is not found"
)
"""Said wherever leaks are listed."""
