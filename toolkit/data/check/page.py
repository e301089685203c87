"""Show a data check's report as one HTML page: no script, nothing from elsewhere, light and dark, wide and narrow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape

from toolkit.data.check.report import LEAK_NOTE, NAMES_NOTE, CheckReport
from toolkit.data.check.table import languages_text

_MOST_LISTED = 200
"""Most rows of a table; the JSON has all."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1b2733; --quiet: #5b6b7a; --paper: #fbfcfd; --line: #d9e0e6; --card: #fff;
  --good: #14693f; --bad: #a4341f; --mark: #cfe8ff; --mark2: #b5dafc; --stripe: #eef2f5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e9ee; --quiet: #9aa9b6; --paper: #12181e; --line: #2c3843;
  --card: #19212a; --good: #6fd3a0; --bad: #ff9d85; --mark: #1d4a73; --mark2: #285d8e; --stripe: #222c36; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, "Noto Sans KR", "Apple SD Gothic Neo", sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
p { margin: .3rem 0; } .quiet { color: var(--quiet); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: .6rem; margin: 1.2rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .6rem .8rem; }
.card b { display: block; font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card span { color: var(--quiet); font-size: .85rem; }
.bad b, .bad { color: var(--bad); } .good b { color: var(--good); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .6rem; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .7rem; vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--quiet); font-weight: 600; white-space: nowrap; } tr + tr td { border-top: 1px solid var(--line); }
.example { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .92rem; line-height: 1.8; }
.example span { border-radius: .2rem; padding: .1rem 0; } .example span:nth-child(even) { background: var(--stripe); }
.example .s { background: var(--mark); } .example .s:nth-child(even) { background: var(--mark2); }
@media (max-width: 40rem) { .cards { grid-template-columns: repeat(2, 1fr); } tr:first-child { display: none; }
  tr, td { display: block; } tr + tr { border-top: 1px solid var(--line); padding: .3rem 0; } tr + tr td { border: 0; }
  td { padding: .1rem .7rem; } td::before { content: attr(data-name) "  "; color: var(--quiet); font-size: .85em; } }
"""


def page(report: CheckReport) -> str:
    """Return the report as an HTML document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Data check: {escape(report.data)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(_body(report))
        + "\n</body></html>\n"
    )


def _body(report: CheckReport) -> Iterator[str]:
    yield "<h1>Data check</h1>"
    yield _quiet(f"{report.data}, as {report.model} reads it, data.max_length {report.max_length}")
    yield _cards(report)
    for comparison in report.comparisons:
        yield f"<p{' class=bad' if comparison.leaked else ''}>{escape(f'{comparison.name}: {comparison.verdict}')}</p>"
    yield from (_quiet(note) for note in report.notes)
    if report.example:
        yield "<h2>One row as the model reads it</h2>"
        yield _quiet(f"{report.example_row}. Coloured tokens are supervised. Identifiers are masked here.")
        spans = (f"<span{' class=s' if on else ''}>{escape(text)}</span>" for text, on in report.example)
        yield f'<div class="example">{"".join(spans)}</div>'
    yield _section(
        "Tokens", ("part", "rows", "median", "95 %", "longest", "supervised"),
        [
            (part, f"{of.rows:,}", f"{of.median:,}", f"{of.percentile_95:,}", f"{of.longest:,}", f"{of.supervised:,}")
            for part, of in report.lengths.items()
        ],
    )  # fmt: skip
    yield _section("Cut to data.max_length", ("row", "what"), [(cut.row, cut.what) for cut in report.cut])
    yield _section("Rows that cannot be used", ("row", "fault"), [(bad.row, bad.what) for bad in report.bad_rows])
    matches = ("row", "is like", "how", "similarity")
    for title, found in (
        ("Leaks across parts and test sets", report.leaks),
        ("Alike within a part", report.duplicates),
    ):
        yield _section(
            title, matches,
            [(*each.sides, each.kind, f"{each.similarity:.2f}") for each in found],
        )  # fmt: skip
        if found is report.leaks:
            yield _quiet(f"Note: {LEAK_NOTE}.")
    yield _section("Suspicious answers", ("row", "the answer"), [(odd.row, odd.what) for odd in report.odd_answers])
    yield _section(
        "Personal identifiers", ("row", "column", "characters", "kind"),
        [(place.row, place.column, f"{place.start}-{place.end}", place.kind) for place in report.identifiers],
    )  # fmt: skip
    yield _quiet(f"Note: {NAMES_NOTE}.")
    languages = report.languages or {}
    yield _section("Languages", ("texts", "by share"), [(what, languages_text(of)) for what, of in languages.items()])
    if report.languages is None:
        yield _quiet("Not looked at: py3langid is missing (pip install 'frostline[check]').")
    yield _section("Text not in Unicode's NFC", ("row",), [(row,) for row in report.not_nfc])


def _cards(report: CheckReport) -> str:
    """Return the counts that matter most."""
    kinds = Counter(place.kind for place in report.identifiers)
    counts = [
        (sum(report.rows.values()), "rows", None), (len(report.bad_rows), "cannot be used", True),
        (len(report.cut), "cut", True), (len(report.duplicates), "alike", True), (len(report.leaks), "leaks", True),
        (len(report.odd_answers), "odd answers", True), (kinds.total(), "identifiers", True),
        (len(report.not_nfc), "not in NFC", True),
    ]  # fmt: skip
    cards = (
        f'<div class="card {"" if is_fault is None else "bad" if count else "good"}">'
        f"<b>{count:,}</b><span>{name}</span></div>"
        for count, name, is_fault in counts
    )
    return f'<div class="cards">{"".join(cards)}</div>'


def _section(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table under a title; nothing without rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-name="{name}">{escape(str(cell))}</td>' for name, cell in zip(columns, row, strict=True))
        + "</tr>"
        for row in rows[:_MOST_LISTED]
    )
    more = _quiet(f"… and {len(rows) - _MOST_LISTED} more; --json FILE has all.") if len(rows) > _MOST_LISTED else ""
    return f'<h2>{escape(title)}</h2><div class="scroll"><table><tr>{head}</tr>{body}</table></div>{more}'


def _quiet(text: str) -> str:
    return f'<p class="quiet">{escape(text)}</p>'
