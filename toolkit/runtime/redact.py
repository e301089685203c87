"""Keep tokens and passwords out of all that a run says and writes. Imports no torch.

Two nets: what a secret looks like, and the values of environment variables that hold one. Text that is about to be
shown goes through ``redact``; a recipe, flag or DeepSpeed file that holds a secret is refused before it is saved
anywhere (``find_secret``), since no key of any of them needs one.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"

_SHAPES = (
    re.compile(r"(?P<keep>\b[a-zA-Z][\w+.-]*://)[^\s/@'\"]+(?=@)"),  # https://user:token@host
    re.compile(r"(?P<keep>[?&](?:(?:access_)?token|(?:api_?)?key|sig(?:nature)?|password|x-amz-[\w-]+)=)[^&\s]+", re.I),
    re.compile(r"(?P<keep>\b(?:authorization:\s*)?(?:bearer|basic)\s+)[\w.~+/=-]{16,}", re.I),
    re.compile(r"\bhf_[A-Za-z0-9]{16,}\b"),  # Hugging Face
    re.compile(r"\b(?:gh[opsur]|glpat|github_pat)[_-][A-Za-z0-9_-]{16,}\b"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{20,}\b"),
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
)
_NAMES = re.compile(r"(?:TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?|ACCESS_KEY)$", re.I)
_SHORTEST = 8
"""Characters below which the value of a variable is too common a word to be hidden."""


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return ``text`` with every secret in it replaced by ``***``."""
    for value in _values(environ):
        text = text.replace(value, HIDDEN)
    for shape in _SHAPES:
        text = shape.sub(lambda found: f"{found.groupdict().get('keep') or ''}{HIDDEN}", text)
    return text


def find_secret(values: Any, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return where nested mappings and sequences hold a secret, as ``section.key``, without the secret itself."""
    return list(dict.fromkeys(where or "value" for where, text in _texts(values) if redact(text, environ) != text))


class RedactingFormatter(logging.Formatter):
    """Formats a record, tracebacks included, without the secrets in it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line as it is shown."""
        return redact(super().format(record))


def _values(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield values of variables whose names say that they are secret, the longest first."""
    found = {value for name, value in environ.items() if _NAMES.search(name) and len(value) >= _SHORTEST}
    yield from sorted(found, key=len, reverse=True)


def _texts(values: Any) -> Iterator[tuple[str, str]]:
    """Yield every string of a nested value, keys included, with its place; what YAML's anchors share, once."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", values)]
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, str):
            yield where, value
            continue
        if not isinstance(value, (Mapping, list, tuple)) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            for key, part in value.items():
                name = redact(str(key)) if isinstance(key, str) else "a key"
                below = f"{where}.{name}" if where else name
                waiting += [(below, part), *([(below, key)] if isinstance(key, str) else [])]
        else:
            waiting += [(where, part) for part in value]
