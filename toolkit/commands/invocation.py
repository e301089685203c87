"""Build the ``Invocation`` of a command line from the arguments of ``toolkit.train`` and ``toolkit.plan``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from toolkit.config.flags import Invocation
from toolkit.config.recipe import build_config, merge, read_recipe
from toolkit.config.schema import RunConfig
from toolkit.runtime.errors import ConfigError
from toolkit.runtime.shipped import QUICKSTART, find_file, shipped_file

_UNNAMED_RECIPE = Path("run")
"""Recipe path of a run that was given values instead of a file; without output.dir it is written to ``runs/run``."""


def build_invocation(
    recipe: str | Path | Mapping[str, Any] | RunConfig | None,
    overrides: Mapping[str, Any] | None,
    ds: str | Path | None,
    resume_override: bool = False,
) -> Invocation:
    """Build and validate the config of a recipe with overrides; see ``toolkit.train`` for the arguments.

    Raises:
        ConfigError: the file cannot be read, or keys or values are invalid; one message lists all faults.
    """
    path = _UNNAMED_RECIPE
    values: Mapping[str, Any]
    if isinstance(recipe, RunConfig):
        values = recipe.model_dump()
    elif isinstance(recipe, Mapping):
        values = _paths_as_text(recipe)
    else:
        path = shipped_file(QUICKSTART) if recipe is None else find_file(recipe)
        values = read_recipe(path)
    flat = _paths_as_text(overrides or {})
    if malformed := [f"{key}: expected section.key, as in train.epochs" for key in flat if key.count(".") != 1]:
        raise ConfigError(malformed, "overrides")
    source = ("recipe" if path is _UNNAMED_RECIPE else f"recipe {path}") + (" and overrides" if flat else "")
    return Invocation(
        config=build_config(merge(values, flat), source),
        recipe=path,
        recipe_was_given=recipe is not None,
        deepspeed=None if ds is None else find_file(ds),
        arguments=argparse.Namespace(),
        resume_override=resume_override,
    )


def _paths_as_text(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values with every ``Path`` as a string, the type of the recipe's fields."""
    converted = {}
    for key, value in values.items():
        value = _paths_as_text(value) if isinstance(value, Mapping) else value
        converted[key] = str(value) if isinstance(value, PurePath) else value
    return converted
