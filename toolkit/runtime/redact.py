"""Keep tokens and passwords out of logs and files. Imports no torch.

A secret is found by its pattern, or as the value of an environment variable whose name says that it is one. ``redact``
replaces secrets in text before it is shown. A recipe, flag or DeepSpeed file with a secret in it (``find_secrets``) is
refused before it is saved, since no key needs one.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

REDACTED = "***"
"""Replacement of a secret."""

_SECRET_PATTERNS = (
    re.compile(r"(?P<keep>\b[a-zA-Z][\w+.-]*://)[^\s/@'\"]+(?=@)"),  # https://user:token@host
    re.compile(r"(?P<keep>[?&](?:(?:access_)?token|(?:api_?)?key|sig(?:nature)?|password|x-amz-[\w-]+)=)[^&\s]+", re.I),
    re.compile(r"(?P<keep>\b(?:authorization:\s*)?(?:bearer|basic)\s+)[\w.~+/=-]{16,}", re.I),
    re.compile(r"\bhf_[A-Za-z0-9]{16,}\b"),  # Hugging Face
    re.compile(r"\b(?:gh[opsur]|glpat|github_pat)[_-][A-Za-z0-9_-]{16,}\b"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{20,}\b"),
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
)
_SECRET_VARIABLES = re.compile(r"(?:TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?|ACCESS_KEY)$", re.I)
_SHORTEST_SECRET = 8
"""Characters below which a variable's value is not hidden, because it may be a common word."""


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return ``text`` with every secret in it replaced by ``***``."""
    secrets = {
        value for name, value in environ.items() if _SECRET_VARIABLES.search(name) and len(value) >= _SHORTEST_SECRET
    }
    for value in sorted(secrets, key=len, reverse=True):  # longest first, so that no part of one remains
        text = text.replace(value, REDACTED)
    for pattern in _SECRET_PATTERNS:
        text = pattern.sub(lambda match: f"{match.groupdict().get('keep') or ''}{REDACTED}", text)
    return text


def find_secrets(values: Any, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the places of secrets in nested values, as ``section.key``, without the secrets themselves."""
    return list(dict.fromkeys(where or "value" for where, text in _strings_in(values) if redact(text, environ) != text))


class RedactingFormatter(logging.Formatter):
    """Log formatter that redacts secrets, also in tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record and redact the result."""
        return redact(super().format(record))


def _strings_in(values: Any) -> Iterator[tuple[str, str]]:
    """Yield the path and text of every string in a nested value, keys included; what YAML anchors share, once."""
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [("", values)]
    while pending:
        where, value = pending.pop()
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
                pending += [(below, part), *([(below, key)] if isinstance(key, str) else [])]
        else:
            pending += [(where, part) for part in value]
