"""What the sections of a recipe have in common."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

from toolkit.config import yaml_text


class Section(BaseModel):
    """Base of recipe sections: immutable, rejects unknown keys, takes each field's help from its docstring."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _read_none(cls, values: Any) -> Any:
        """Read the word none as no value where a key may have none: in recipes and overrides as in flags."""
        if not isinstance(values, Mapping):
            return values
        optional = {info.alias or name for name, info in cls.model_fields.items() if takes_none(info.annotation)}
        return {key: None if key in optional and is_none(value) else value for key, value in values.items()}

    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, values: Any) -> Any:
        """Refuse true and false where a number is expected: Python takes them for 1 and 0."""
        for name, info in cls.model_fields.items() if isinstance(values, Mapping) else ():
            value = values.get(key := info.alias or name)
            if isinstance(value, bool) and takes_number(info.annotation):
                raise ValueError(f"{key} is {str(value).lower()}; expected a number")
        return values


def takes_none(annotation: Any) -> bool:
    """Return whether a key of this type may have no value."""
    return type(None) in typing.get_args(annotation)


def takes_number(annotation: Any) -> bool:
    """Return whether a key of this type may have a number, and is no switch."""
    members = union_members(annotation)
    return (int in members or float in members) and bool not in members


def union_members(annotation: Any) -> list[Any]:
    """Return the members of a union type, or the type itself, without ``Annotated``."""
    if typing.get_origin(annotation) is typing.Annotated:
        return union_members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in union_members(part)]
    return [annotation]


def is_none(value: Any) -> bool:
    """Return whether a value is the word for no value: none, or YAML's null, in any case."""
    return isinstance(value, str) and value.lower() in ("none", "null")


def switch(value: Any) -> Any:
    """Turn the boolean that YAML 1.1 makes of an unquoted on or off back into the word."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def parse_mapping(value: Any) -> Any:
    """Read a mapping that was given as text, as flags give it: {name: value}."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        return yaml_text.load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{value!r} is no mapping: {' '.join(str(error).split())[:200]}") from None
