"""Where a value of a row comes from, as a task file says it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from toolkit.config.section import Section
from toolkit.runtime.paths import read_regular
from toolkit.runtime.shipped import find_file

Kind = Literal["text", "raw", "texts", "messages", "pairs", "options", "choice", "any"]
"""How a column is read: a text; a text with the blanks around it; a list of texts; a conversation; pairs of earlier
questions and answers; the options of a question; the answer that is one of them; anything, as the templates use it."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def as_column(value: Any) -> Any:
    """Turn a path, or several, into what a column is."""
    return {"path": value} if isinstance(value, str | list) else value


class ColumnSpec(Section):
    """Says where a value of a row comes from."""

    path: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
    """Paths in a row; the first that is there is taken (``toolkit.tasks.columns.find``)."""
    kind: Kind = "text"
    """How it is read."""
    default: Any = None
    """Value where a row has none. A column with ``optional: true`` and no default is then empty."""
    default_file: str | None = None
    """Text file whose content is the default, such as a reference text that all rows share."""
    optional: bool = False
    """True if rows may lack it."""

    @model_validator(mode="before")
    @classmethod
    def _read_default(cls, values: Any) -> Any:
        """Take the content of ``default_file`` as the default."""
        if not isinstance(values, dict) or values.get("default_file") is None:
            return values
        file = values["default_file"]
        try:
            return {**values, "default": read_regular(Path(find_file(str(file))), 2**24).removeprefix("\ufeff").strip()}
        except (OSError, ValueError) as error:
            raise ValueError(f"default_file is {file}, which cannot be read ({error})") from None

    @property
    def may_be_missing(self) -> bool:
        """Return whether a row without it is a good one."""
        return self.optional or "default" in self.model_fields_set
