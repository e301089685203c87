"""Settings that a run's conversations are rendered with, saved in its run directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from toolkit.runtime.paths import replace_text

_FILE_NAME = "rendering.json"


@dataclass(frozen=True)
class Rendering:
    """The settings that later commands need to render a run's conversations as it did."""

    now: datetime | None = None
    """Date for templates that print one; None is the moment at which they are rendered."""
    reasons: bool = False
    """True if the run's answers begin with a thought, so the prompt must not end with an empty one."""
    template: str | None = None
    """Chat template of the run with its switches; None is the model's own."""
    parses_special: bool = False
    """True if control tokens in a row's text are read as such (``data.special_tokens: parse``)."""
    task: str | None = None
    """Task that ``data.task: auto`` took for the training rows; None if the recipe names it."""

    def save(self, folder: Path) -> None:
        """Write the settings into a run directory, unless they are the defaults.

        Raises:
            OSError: the disk is full or refuses.
        """
        if self == Rendering():
            return
        now = None if self.now is None else self.now.isoformat(timespec="seconds")
        saved: dict[str, Any] = {"now": now, "reasons": self.reasons}
        default = Rendering()
        more = ("template", "parses_special", "task")
        saved |= {name: getattr(self, name) for name in more if getattr(self, name) != getattr(default, name)}
        replace_text(folder / _FILE_NAME, json.dumps(saved, ensure_ascii=False) + "\n")


def read_rendering(folder: Path) -> Rendering:
    """Read the rendering of a run directory; return the default if there is none or it cannot be read.

    No error is needed: rows rendered with other settings have another fingerprint, and the run refuses them.
    """
    try:
        saved = json.loads((folder / _FILE_NAME).read_text(encoding="utf-8"))
        now, template, task = saved["now"], saved.get("template"), saved.get("task")
        return Rendering(
            None if now is None else datetime.fromisoformat(now),
            bool(saved["reasons"]),
            None if template is None else str(template),
            bool(saved.get("parses_special")),
            None if task is None else str(task),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Rendering()


def prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template prints the current date."""
    return "strftime_now" in str(tokenizer.chat_template or "")


def date_parts(now: datetime) -> dict[str, str]:
    """Return the output of each ``strftime`` directive at ``now``, so that a template can compose a date."""
    directives = [*(f"-{letter}" for letter in "dmyHIMSj"), *"aAbBcCdDeFGHIjklmMpRSTuUVwWxXyYzZ%"]
    return {f"%{directive}": now.strftime(f"%{directive}") for directive in directives}
