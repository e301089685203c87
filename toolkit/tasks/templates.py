"""The templates of tasks: Jinja2 in a sandbox, in which a task file can neither run code nor reach files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from toolkit.tasks.row_values import LETTERS
from toolkit.tasks.sample import RowFaultError

OWN_VARIABLES = frozenset({"letters", "letter", "number", "label", "labels"})
"""What templates know beside columns: the letters of options, and an answer's letter, number and text."""


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["tojson"] = _to_json  # jinja's own writes < as \u003c, for web pages
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


ENVIRONMENT = _environment()


@lru_cache(maxsize=256)
def _compiled(source: str) -> Template:
    return ENVIRONMENT.from_string(source)


def render(source: str, variables: Mapping[str, Any], key: str) -> str:
    """Render a template with the values of a row.

    Raises:
        RowFaultError: it fails on this row.
    """
    try:
        return _compiled(source).render(variables, letters=LETTERS)
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, OverflowError) as error:
        raise RowFaultError(f"cannot be rendered by the task's {key}: {error}") from None
