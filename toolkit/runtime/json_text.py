"""Write JSON that every reader takes: JSON has no NaN and no infinity, which Python writes all the same."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(value: Any, **options: Any) -> str:
    """Return ``json.dumps(value, **options)`` with null for each number that is not finite."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # once in a while; a circular value raises it again
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    """Return a value with None for each number in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value
