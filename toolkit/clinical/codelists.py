"""Read the codelists of controlled terminology that come with Frostline (``codelists.yaml``)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from toolkit.config import yaml_text


@cache
def _content() -> Mapping[str, Any]:
    text = (Path(__file__).parent / "codelists.yaml").read_text(encoding="utf-8")
    content: Mapping[str, Any] = yaml_text.load(text)
    return content


@cache
def values_of(name: str) -> tuple[str, ...]:
    """Return the values of a codelist, such as ``OUT``, in its order."""
    return tuple(_content()["codelists"][name]["values"])


@cache
def codelist_of_field() -> Mapping[str, str]:
    """Return the name of the codelist of each field that has one."""
    return {field: name for name, one in _content()["codelists"].items() for field in one["fields"]}


def attribution() -> str:
    """Return where the values come from, with the date of their package."""
    return f"{_content()['attribution']}, package {_content()['package']}"
