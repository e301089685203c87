"""Turn the arguments of ``toolkit.train`` and ``toolkit.plan`` into an ``Invocation``, as a command line gives one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from toolkit.config.flags import Invocation
from toolkit.config.recipe import build, merge, read_recipe
from toolkit.config.schema import RunConfig
from toolkit.runtime.errors import ConfigError
from toolkit.runtime.shipped import QUICKSTART, find_file, shipped_file

_UNNAMED = Path("run")
"""Stands for the recipe file where there is none: such a run is written to ``runs/run`` unless it has an output.dir."""


def read_input(
    recipe: str | Path | Mapping[str, Any] | RunConfig | None,
    overrides: Mapping[str, Any] | None,
    ds: str | Path | None,
    resume_override: bool = False,
) -> Invocation:
    """Build and validate the config of a recipe with overrides.

    Args:
        recipe: a file, nested values, or a config. Defaults to the quickstart recipe.
        overrides: value by dotted key, as in ``{"train.epochs": 1}``.
        ds: DeepSpeed JSON. Without it torch alone trains.
        resume_override: go on with a run although harmless keys differ.

    Raises:
        ConfigError: unknown keys and bad values, all in one message; or the file cannot be read.
    """
    values: Mapping[str, Any]
    if isinstance(recipe, RunConfig):
        values, path = recipe.model_dump(), _UNNAMED
    elif isinstance(recipe, Mapping):
        values, path = _plain(recipe), _UNNAMED
    else:
        path = shipped_file(QUICKSTART) if recipe is None else find_file(recipe)
        values = read_recipe(path)
    flat = _plain(overrides or {})
    if malformed := [f"{key}: expected section.key, as in train.epochs" for key in flat if key.count(".") != 1]:
        raise ConfigError(malformed, "overrides")
    source = ("recipe" if path is _UNNAMED else f"recipe {path}") + (" and overrides" if flat else "")
    return Invocation(
        config=build(merge(values, flat), source),
        recipe=path,
        recipe_was_given=recipe is not None,
        deepspeed=None if ds is None else find_file(ds),
        arguments=argparse.Namespace(resume_override=resume_override),
    )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with paths as text, which is what the recipe's fields hold."""
    plain = {}
    for key, value in values.items():
        value = _plain(value) if isinstance(value, Mapping) else value
        plain[key] = str(value) if isinstance(value, PurePath) else value
    return plain
