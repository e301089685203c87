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
from functools import lru_cache
from typing import Any

from toolkit.runtime.printable import printable

REDACTED = "***"
"""Replacement of a secret."""

_SECRET_PATTERNS = (
    re.compile(r"(?P<keep>\b[a-zA-Z][\w+.-]{0,30}://)[^\s/@'\"]+(?=@)"),  # https://user:token@host
    re.compile(r"(?P<keep>[?&](?:(?:access_)?token|(?:api_?)?key|sig(?:nature)?|password|x-amz-[\w-]+)=)[^&\s]+", re.I),
    re.compile(r"(?P<keep>\b(?:authorization:\s*)?(?:bearer|basic)\s+)[\w.~+/=-]{16,}", re.I),
    re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}\b"),  # Hugging Face
    re.compile(r"\b(?:gh[oprsu]|glpat|gldt|glrt|github_pat)[_-][A-Za-z0-9_-]{16,}"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{20,}|\b(?:(?:sk|rk|pk)_(?:live|test)|whsec)_[A-Za-z0-9]{16,}"),  # OpenAI, Stripe
    re.compile(r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b"),  # AWS
    re.compile(r"\bAIza[A-Za-z0-9_-]{35}|\bya29\.[A-Za-z0-9._-]{20,}|\bGOCSPX-[A-Za-z0-9_-]{20,}"),  # Google
    re.compile(r"\bx(?:ox[a-z]|app)-[A-Za-z0-9-]{10,}|(?<=hooks\.slack\.com/)(?:services|workflows)/[\w/]{20,}"),
    re.compile(r"\b(?:npm_|pypi-AgE|dckr_pat_|dop_v1_|hv[sbr]\.|gsk_|nvapi-|pplx-|xai-|r8_|lsv2_\w\w_|wandb_v1_|sbp_|"
               r"shp(?:at|ca|pa|ss)_|PMAK-|lin_api_|ntn_|figd_|csk-|tgp_v1_|jina_|ATATT3|ATCTT3|sq0[a-z]{3}-|glsa_|"
               r"NRAK-|tvly-|pcsk_|dp\.(?:pt|st|ct)\.)(?=[\w.-]{0,99}\d)[\w.-]{20,}"),
    re.compile(r"\b(?:dapi|key-)[0-9a-f]{32}\b"),  # Databricks, Mailgun
    re.compile(r"\bSG\.[\w-]{16,}\.[\w-]{16,}|\bSK[0-9a-f]{32}\b|\b\d{8,10}:AA[\w-]{32,}"),
    re.compile(r"\beyJ[\w-]{8,2000}\.[\w-]{8,}\.[\w-]*"),  # JSON Web Token
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S),
    re.compile(r"(?P<keep>\b(?:AccountKey|SharedAccessKey)=)[\w+/=]{16,}"),  # Azure
    re.compile(r"(?P<keep>\b(?:(?:[A-Z][A-Z0-9]*_)*(?:TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|"
               r"(?:ACCESS|SECRET|PRIVATE|ACCOUNT|SIGNING|ENCRYPTION|AUTH)_?KEY)|(?:[A-Z][A-Z0-9]*_)+(?:PASS|PWD|PAT))"
               r"(?:_?\d+)?=)[^\s'\"<]{8,}"),
    re.compile(r"(?P<keep>\b(?:\w+_)?(?:password|passwd|passphrase|api_?key|access_token)=)[^\s'\"<&]{8,}"),
)  # fmt: skip
"""Patterns of the common vendors' tokens, whose beginnings say what they are, and of assignments to such a variable."""
_SECRET_VARIABLES = re.compile(
    r"(?:TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|(?:^|_)PASS|_PWD|_PAT|"
    r"(?:ACCESS|SECRET|PRIVATE|ACCOUNT|SIGNING|ENCRYPTION|MASTER|AUTH)_?KEY)(?:_?\d+)?$",
    re.I,
)
"""Names of variables that hold a secret, the second and later ones of a kind (``HF_TOKEN_2``) among them."""
_SHORTEST_SECRET = 8
"""Characters below which a variable's value is not hidden, because it may be a common word."""


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return ``text`` with every secret in it replaced by ``***``."""
    secrets = {value for name, value in environ.items() if len(value) >= _SHORTEST_SECRET and _names_a_secret(name)}
    for value in sorted(secrets, key=len, reverse=True):  # longest first, so that no part of one remains
        text = text.replace(value, REDACTED)
    for pattern in _SECRET_PATTERNS:
        text = pattern.sub(lambda match: f"{match.groupdict().get('keep') or ''}{REDACTED}", text)
    return text


def find_secrets(values: Any, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the places of secrets in nested values, as ``section.key``, without the secrets themselves."""
    return list(
        dict.fromkeys(
            where or "value"
            for where, text in strings_in(values)
            if redact(text, environ) != text or _is_named_as_secret(where.rpartition(".")[2], text)
        )
    )


def _is_named_as_secret(name: str, text: str) -> bool:
    """Return whether the key of a value says that it is a secret; a tokenizer's ``eos_token`` and its kin do not."""
    is_tokens = re.search(r"(?:bos|eos|pad|unk|sep|cls|mask|turn|text)_token$", name, re.I)
    return text != name and len(text) >= _SHORTEST_SECRET and not is_tokens and _names_a_secret(name)


@lru_cache(maxsize=4096)
def _names_a_secret(variable: str) -> bool:
    """Return whether the name of a variable or key says that its value is a secret; asked for each line of a log."""
    return bool(_SECRET_VARIABLES.search(variable))


class RedactingFormatter(logging.Formatter):
    """Log formatter that redacts secrets and escapes control characters, also in tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record, redact the result and escape its control characters."""
        return printable(redact(super().format(record)))


def strings_in(values: Any) -> Iterator[tuple[str, str]]:
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
