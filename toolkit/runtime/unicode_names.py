"""Find files by names that look the same and are other bytes."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path


def as_spelled(path: str | Path) -> Path:
    """Return a path with each name in the Unicode form, composed or decomposed, in which it exists; else as it is.

    A Mac writes decomposed names (NFD), which look the same and are other bytes.
    """
    path, found = Path(path), Path()
    for part in path.parts:
        forms = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        there = (found / form for form in forms if part.isascii() or os.path.exists(found / form))  # noqa: PTH110
        if (found_part := next(there, None)) is None:
            return path
        found = found_part
    return found
