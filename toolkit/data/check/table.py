"""Show a data check's report as text for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from toolkit.data.check.report import LEAK_NOTE, NAMES_NOTE, CheckReport, Match

_MOST_LISTED = 10
"""Most rows that are listed of one kind; the JSON has all."""


def table(report: CheckReport) -> str:
    """Return the report as text of many lines."""
    return "\n".join(_lines(report))


def rows_text(report: CheckReport) -> str:
    """Describe the rows of each part, and those that cannot be used."""
    parts = [f"{count:,} {part}" for part, count in report.rows.items() if count]
    return f"{', '.join(parts) or 'none'}; {len(report.bad_rows)} cannot be used"


def languages_text(counts: dict[str, int]) -> str:
    """Describe languages by their share, the most frequent first."""
    total = sum(counts.values())
    return ", ".join(f"{name} {count / total:.0%} ({count})" for name, count in list(counts.items())[:6]) or "none"


def match_text(match: Match) -> str:
    """Describe two rows that are alike."""
    how = match.kind if match.similarity == 1 else f"{match.kind} {match.similarity:.2f}"
    return f"{' and '.join(match.sides)}: {how}"


def _lines(report: CheckReport) -> Iterator[str]:
    yield f"data      {report.data}, as {report.model} reads it, data.max_length {report.max_length}"
    yield f"rows      {rows_text(report)}"
    yield from _listed([f"{bad.row} {bad.what}" for bad in report.bad_rows])
    for part, of_part in report.lengths.items():
        yield (
            f"tokens    {part}: median {of_part.median:,}, 95 % up to {of_part.percentile_95:,}, longest "
            f"{of_part.longest:,}; {of_part.supervised:,} supervised"
        )
    yield f"cut       {len(report.cut)} rows lose context, {report.cut_tokens:,} tokens in all"
    yield from _listed([f"{cut.row}: {cut.what}" for cut in report.cut])
    yield f"alike     {len(report.duplicates)} pairs within a part"
    yield from _listed([match_text(match) for match in report.duplicates])
    yield f"leaks     {len(report.leaks)} pairs across parts and test sets"
    yield from _listed([match_text(match) for match in report.leaks])
    for comparison in report.comparisons:
        yield f"test set  {comparison.name}: {comparison.verdict}"
    yield f"          {LEAK_NOTE}"
    yield f"answers   {len(report.odd_answers)} empty or suspicious"
    yield from _listed([f"{odd.row} {odd.what}" for odd in report.odd_answers])
    if report.languages is None:
        yield "language  not looked at: py3langid is missing (pip install 'frostline[check]')"
    for what, counts in (report.languages or {}).items():
        yield f"language  {what}: {languages_text(counts)}"
    yield f"NFC       {len(report.not_nfc)} rows hold text in another Unicode form"
    yield from _listed(report.not_nfc)
    kinds = Counter(place.kind for place in report.identifiers)
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    yield f"personal  {len(report.identifiers)} identifiers{': ' if shown else ''}{shown}"
    yield from _listed(
        [
            f"{place.row}, {place.column}, characters {place.start}-{place.end}: {place.kind}"
            for place in report.identifiers
        ]
    )
    yield f"          {NAMES_NOTE}"
    yield from (f"note      {note}" for note in report.notes)
    if report.example:
        yield f"example   {report.example_row}; «» is supervised, identifiers are masked"
    yield from (f"  | {line}" for line in _example(report).splitlines())


def _example(report: CheckReport) -> str:
    """Return the rendered example, with marks around what is supervised."""
    text, inside = "", False
    for piece, supervised in report.example:
        text += ("«" if supervised else "»") * (supervised != inside) + piece
        inside = supervised
    return text + "»" * inside


def _listed(lines: Sequence[str]) -> Iterator[str]:
    """Yield the first lines, and how many more there are."""
    yield from (f"  - {line}" for line in lines[:_MOST_LISTED])
    if len(lines) > _MOST_LISTED:
        yield f"  … and {len(lines) - _MOST_LISTED} more (--json FILE has all)"
