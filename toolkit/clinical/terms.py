"""A term of a dictionary, with what it rolls up to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Term:
    """A lowest level term, its preferred term and that one's primary system organ class."""

    code: int | str
    """Code of the lowest level term; the same in every language."""
    name: str
    """In English where the dictionary has it."""
    pt_code: int | str
    pt: str
    soc_code: int | str
    soc: str
    is_current: bool = True
    """False if it is kept for old data alone."""
    other_names: tuple[str, ...] = ()
    """The same term in other languages."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the term's names, English first."""
        return (self.name, *self.other_names)

    def as_fields(self) -> dict[str, Any]:
        """Return the fields of an SDTM record that it decides."""
        return {
            "AELLT": self.name, "AELLTCD": self.code, "AEDECOD": self.pt, "AEPTCD": self.pt_code,
            "AEBODSYS": self.soc, "AEBDSYCD": self.soc_code, "AESOC": self.soc, "AESOCCD": self.soc_code,
        }  # fmt: skip

    def shown(self, language: str = "") -> str:
        """Return the term as a candidate in a prompt: its name in the note's language where it has one."""
        return self.other_names[0] if language == "ko" and self.other_names else self.name
