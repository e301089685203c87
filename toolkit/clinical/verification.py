"""Check an answer by the rules that its task names (``verify`` in a task file), each finding with its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from toolkit.runtime.errors import UsageError

if TYPE_CHECKING:
    from toolkit.clinical.dictionary import Dictionary


@dataclass(frozen=True)
class Violation:
    """A rule that a row or an answer breaks."""

    row: int | str | None
    """Number or id of the row; None where a check sees one answer alone."""
    field: str
    """The field that is wrong, such as ``AESTDTC``; empty if it is the answer as a whole."""
    rule: str
    """Id of the rule."""
    value: str
    """What was found."""
    message: str
    """What was expected."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by their names."""
        return asdict(self)

    def __str__(self) -> str:
        where = f"row {self.row}, " if self.row is not None else ""
        return f"{where}{self.field or 'answer'}, {self.rule}: found {self.value!r}; {self.message}"


Check = Callable[[str, Mapping[str, Any]], list[Violation]]
"""Checks an answer against the columns of its row; returns what it breaks, in order, none if nothing is found."""

CHECKS = {
    "sdtm_ae": "toolkit.clinical.ae_check:check_answer",
    "grounded_document": "toolkit.clinical.document_checks:check_answer",
    "triage": "toolkit.clinical.triage:check_answer",
    "ae_triage": "toolkit.clinical.ae_triage:check_answer",
}
"""Where the check of each name that a task file may give as ``verify`` stands: ``module:function``."""


_WITH_DICTIONARY = ("sdtm_ae",)
"""Checks that take a dictionary, by which they look at codes too."""


def find_check(name: str, dictionary: Dictionary | None = None) -> Check:
    """Return the check of a name; one of codes looks them up in ``dictionary``, if there is one.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in CHECKS:
        raise UsageError(f"verify is {name}; expected one of {', '.join(sorted(CHECKS))}")
    module, function = CHECKS[name].split(":")
    check: Any = getattr(import_module(module), function)
    found: Check = partial(check, dictionary=dictionary) if name in _WITH_DICTIONARY else check
    return found
