"""Names in the place of the numbers that ``datasets`` stores for them: columns of type ClassLabel."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def features_of(schema: Any) -> Mapping[str, Any]:
    """Return the features that ``datasets`` noted in an Arrow schema, as JSON values; none if it did not write it."""
    try:
        noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = noted["info"]["features"]
    except (ValueError, TypeError, KeyError):
        return {}
    return features if isinstance(features, Mapping) else {}


def named_columns(features: Mapping[str, Any]) -> dict[str, Any]:
    """Return the features within which there is a ClassLabel, by column."""
    return {name: feature for name, feature in features.items() if _has_names(feature)}


def with_names(value: Any, feature: Any) -> Any:
    """Return a value with the names of its classes in the place of their numbers; null for -1, which is no class."""
    if isinstance(value, list):
        item = _item(feature)
        return [with_names(one, feature if item is None else item) for one in value]
    names = _class_names(feature)
    if names is not None:
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if is_number and value == -1:
            return None
        return names[value] if is_number and 0 <= value < len(names) else value
    if isinstance(value, Mapping):
        item = _item(feature)
        fields = _fields(feature if item is None else item)  # a list of objects may be stored as an object of lists
        return {name: with_names(one, fields[name]) if name in fields else one for name, one in value.items()}
    return value


def _class_names(feature: Any) -> list[str] | None:
    """Return the names of a ClassLabel; None for any other feature."""
    is_label = isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel"
    return list(map(str, feature.get("names") or ())) if is_label else None


def _item(feature: Any) -> Any:
    """Return the feature of the items of a list; None if the feature is no list's."""
    if isinstance(feature, list):
        return feature[0] if feature else None
    is_list = isinstance(feature, Mapping) and feature.get("_type") in ("Sequence", "List", "LargeList")
    return feature.get("feature") if is_list else None


def _fields(feature: Any) -> Mapping[str, Any]:
    """Return the features of an object, by field; none if the feature is no object's."""
    return feature if isinstance(feature, Mapping) and not isinstance(feature.get("_type"), str) else {}


def _has_names(feature: Any) -> bool:
    """Return whether there is a ClassLabel within a feature."""
    item = _item(feature)
    if item is not None:
        return _has_names(item)
    return _class_names(feature) is not None or any(map(_has_names, _fields(feature).values()))
