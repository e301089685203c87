"""Name the public source of rows, which a base model may have seen before it was trained here."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.data.row_samples import RowSample

_OF_PATHS = {"pubmedqa": "PubMed"}
"""Public sources by a word, in lower case, in the path or Hub id of a data set."""


def public_source(path: str) -> str | None:
    """Return the public source of a data set that its path or Hub id tells; None where it tells none."""
    return next((source for word, source in _OF_PATHS.items() if word in path.lower()), None)


def public_sources(rows: Sequence[RowSample]) -> tuple[str, ...]:
    """Return the public sources of rows: those of their tasks, or told by their paths."""
    found = dict.fromkeys(row.task.spec.public_source or public_source(row.origin) for row in rows)
    return tuple(source for source in found if source)
