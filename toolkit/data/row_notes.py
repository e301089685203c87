"""What of a row is kept beside its tokens: the values that it is drawn and divided by, and identifiers found in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from toolkit.config.data_schema import DataConfig
from toolkit.data.column_text import column_text, label_of
from toolkit.data.identifiers import IdentifierFinder, digest


@dataclass(frozen=True)
class RowNote:
    """A note on one row; it never holds an identifier."""

    label: str | None = None
    """Value of ``data.oversample``."""
    group: str | None = None
    """Digest of the value of ``data.group_by``, which may be a patient's number; None if the row has none."""
    stratum: str | None = None
    """Value of ``data.stratify_by``; None if the row has none."""
    identifiers: Mapping[str, int] = field(default_factory=dict)
    """How many identifiers of each kind were found."""
    continues: bool = False
    """True for a later part of a row that is cut into several examples."""

    def to_json(self) -> bytes:
        """Return the note as JSON without what is empty; nothing if all is."""
        values = {key: value for key, value in vars(self).items() if value}
        return json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass") if values else b""

    @classmethod
    def from_json(cls, content: bytes) -> RowNote:
        """Return the note that ``to_json`` wrote."""
        return cls(**json.loads(content)) if content else cls()


class RowNoter:
    """Takes the notes that the data section asks for, and masks identifiers if it says so."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._finder = IdentifierFinder(config.identifier_patterns)

    def fault(self, fault: str) -> str:
        """Return what is wrong with a row without an identifier that it quotes."""
        return self._finder.mask(fault)

    def origin(self, origin: str) -> str:
        """Return the origin of a row without what the user's patterns find in its key in a JSON object."""
        file, of_key, key = origin.rpartition(" key ")
        return file + of_key + self._finder.mask(key) if of_key else origin

    def masked(self, values: Any) -> tuple[Any, Mapping[str, int]]:
        """Return a row's values, with identifiers masked under ``on_identifier: mask``, and how many there were."""
        found = self._finder.count(values)
        if found and self._config.on_identifier == "mask":
            values = self._finder.mask_values(values)
        return values, found

    def note(self, values: Any, identifiers: Mapping[str, int]) -> RowNote:
        """Return the note on a row with these values, before they were masked.

        Raises:
            DataError: it lacks the column of labels, ``data.oversample``.
        """
        config = self._config
        group, stratum = (path and column_text(values, path) for path in (config.group_by, config.stratify_by))
        return RowNote(
            None if config.oversample is None else self._finder.hide(label_of(values, config.oversample)),
            group and digest(group),
            self._finder.hide(stratum),
            dict(identifiers),
        )
