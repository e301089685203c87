"""Names in the place of the numbers that ``datasets`` stores for them: columns of type ClassLabel."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

Decoder = Callable[[Any], Any]
"""Returns a value of a column with names in the place of the numbers of classes."""


def features_of(schema: Any) -> Mapping[str, Any]:
    """Return the features that ``datasets`` noted in an Arrow schema, as JSON values; none if it did not write it."""
    try:
        noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = noted["info"]["features"]
    except (ValueError, TypeError, KeyError):
        return {}
    return features if isinstance(features, Mapping) else {}


def decoders_of(features: Mapping[str, Any]) -> dict[str, Decoder]:
    """Return what puts names in the place of numbers, for each column within which there is a ClassLabel."""
    found = {name: _decoder_of(feature) for name, feature in features.items()}
    return {name: decoder for name, decoder in found.items() if decoder is not None}


def _decoder_of(feature: Any) -> Decoder | None:
    """Return the decoder of a feature, also of each in a list: a list of objects may be stored as an object of lists.

    None if there is no ClassLabel within it.
    """
    if isinstance(feature, list):
        return _decoder_of(feature[0]) if feature else None
    kind = feature.get("_type") if isinstance(feature, Mapping) else ""
    if kind in ("Sequence", "List", "LargeList"):
        return _decoder_of(feature.get("feature"))
    if kind == "ClassLabel":
        decode_one = partial(_name, tuple(map(str, feature.get("names") or ())))
    elif not isinstance(kind, str) and (fields := decoders_of(feature)):
        decode_one = partial(_with_names, fields)
    else:
        return None

    def decode(value: Any) -> Any:
        return list(map(decode, value)) if isinstance(value, list) else decode_one(value)

    return decode


def _name(names: Sequence[str], value: Any) -> Any:
    """Return the name of a class by its number; null for -1, which is no class, and other values as they are."""
    if not isinstance(value, int) or isinstance(value, bool) or not -1 <= value < len(names):
        return value
    return None if value == -1 else names[value]


def _with_names(fields: Mapping[str, Decoder], value: Any) -> Any:
    """Return an object with the names of classes in those of its fields that have them."""
    if not isinstance(value, Mapping):
        return value
    return {name: fields[name](one) if name in fields else one for name, one in value.items()}
