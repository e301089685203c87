"""What a first look at the rows of a run found: counts of what a user would want to know, and personal identifiers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from toolkit.config.data_schema import DataConfig
from toolkit.data.rows import Rows
from toolkit.runtime.errors import DataError
from toolkit.runtime.shipped import command_line

_MOST_LISTED = 10
"""Most rows that a message lists."""


@dataclass(frozen=True)
class Screening:
    """Counts over all rows of a run; it never keeps an identifier, only its kind and the row's name."""

    rows: int = 0
    shortened: int = 0
    """Rows that lost context to ``data.max_length``."""
    repeated: int = 0
    """Rows whose tokens are those of a row before them."""
    composed: int = 0
    """Rows with text that was not in Unicode's composed form (NFC), as Korean from a Mac's file names."""
    identifiers: Counter[str] = field(default_factory=Counter)
    """Identifiers of each kind."""
    with_identifiers: int = 0
    """Rows that hold some."""
    first: str = ""
    """Origin of the first of these rows."""
    is_masked: bool = False

    @classmethod
    def of(cls, config: DataConfig, rows: Rows) -> Screening:
        """Look at all rows.

        Raises:
            DataError: rows hold identifiers and ``data.on_identifier`` is ``error``.
        """
        found = rows.with_identifiers.tolist()
        if found and config.on_identifier == "error":
            listed = [f"  - {rows.origin(at)}: {_text(Counter(rows.note(at).identifiers))}" for at in found]
            if len(listed) > _MOST_LISTED:
                listed[_MOST_LISTED:] = [f"  … and {len(listed) - _MOST_LISTED} more"]
            head = f"{len(found)} of {len(rows)} rows hold personal identifiers (data.on_identifier: error):"
            advice = "Remove them from the rows, or set data.on_identifier: mask"
            raise DataError("\n".join([head, *listed, advice]))
        identifiers: Counter[str] = Counter()
        for at in found:
            identifiers.update(rows.note(at).identifiers)
        distinct = np.unique(rows.contents)
        return cls(
            len(rows), rows.shortened, len(rows) - len(distinct), len(rows.normalised), identifiers, len(found),
            rows.origin(found[0]) if found else "", config.on_identifier == "mask",
        )  # fmt: skip

    def line(self) -> str:
        """Describe what was seen in one line for the log."""
        return (
            f"{self.rows} rows, {self.shortened} cut to data.max_length, {self.repeated} there more than once, "
            f"{self.composed} composed to NFC, {self._identifiers_text()}; all about them: "
            f"{command_line('data-check')}"
        )

    def warning(self) -> str | None:
        """Return a warning that identifiers are trained on; None if there are none, or they are masked."""
        if self.is_masked or not self.identifiers:
            return None
        return (
            f"{self._identifiers_text()}, the first in {self.first}: a model can repeat them. "
            "data.on_identifier: mask replaces them, error refuses them"
        )

    def _identifiers_text(self) -> str:
        if not self.identifiers:
            return "no identifiers found"
        masked = " masked" if self.is_masked else ""
        kinds = _text(self.identifiers)
        return f"{self.identifiers.total()} personal identifiers{masked} in {self.with_identifiers} rows ({kinds})"


def _text(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())
