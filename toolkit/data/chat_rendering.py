"""What a run keeps of how its conversations are written, in a file of its directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from toolkit.runtime.paths import replace_text

_NAME = "rendering.json"


@dataclass(frozen=True)
class Rendering:
    """The settings that later commands need to render a run's conversations as it did."""

    now: datetime | None = None
    """What templates that print a date are told; none is the moment they ask."""
    reasons: bool = False
    """Answers of the run begin with a thought of their own, so generation does not begin behind an empty one."""

    def save(self, folder: Path) -> None:
        """Write it into a run directory, if it says anything.

        Raises:
            OSError: the disk.
        """
        if self == Rendering():
            return
        now = None if self.now is None else self.now.isoformat(timespec="seconds")
        replace_text(folder / _NAME, json.dumps({"now": now, "reasons": self.reasons}) + "\n")


def read_rendering(folder: Path) -> Rendering:
    """Read the rendering of a run directory; return the default one where none is kept or it cannot be read.

    Rows that are then written otherwise have another fingerprint than the run's, which refuses them.
    """
    try:
        kept = json.loads((folder / _NAME).read_text(encoding="utf-8"))
        now = kept["now"]
        return Rendering(None if now is None else datetime.fromisoformat(now), bool(kept["reasons"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return Rendering()


def prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template asks for the date."""
    return "strftime_now" in str(tokenizer.chat_template or "")


def date_parts(now: datetime) -> dict[str, str]:
    """Return the output of each ``strftime`` directive at ``now``, so that a template can compose a date."""
    directives = [*(f"-{letter}" for letter in "dmyHIMSj"), *"aAbBcCdDeFGHIjklmMpRSTuUVwWxXyYzZ%"]
    return {f"%{directive}": now.strftime(f"%{directive}") for directive in directives}
