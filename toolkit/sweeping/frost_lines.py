"""Find the frost line of each trial of a sweep before it runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from toolkit.config.policy import refuse_cache
from toolkit.config.schema import RunConfig
from toolkit.runtime.errors import ConfigError, PlanError
from toolkit.sweeping.definition import Settings, describe

log = logging.getLogger("frostline")


def find_lines(trials: Mapping[int, tuple[Settings, RunConfig]]) -> dict[int, int]:
    """Find the frost line of each trial, by number, by the model's config.json alone, and check its mask against that.

    A line that cannot be told without weights is left out.

    Raises:
        ConfigError: masks do not fit the model; lists those of all trials.
    """
    from toolkit.activation_cache.policy import mask_obstacle
    from toolkit.mask.schedule import phase_masks
    from toolkit.planning.meta_model import meta_model
    from toolkit.runtime.errors import MaskError

    models, faults, lines = dict[str, Any](), [], dict[int, int]()
    for number, (settings, config) in trials.items():
        model = config.model
        try:
            if (key := model.model_dump_json()) not in models:
                models[key] = meta_model(model).anatomy
            mask = phase_masks(config.mask, models[key])[0]
        except PlanError as error:
            log.warning("the frost line of trial %d is not known before it runs: %s", number, error)
            continue
        except MaskError as error:
            faults.append(f"trial {number} ({describe(settings, config)}): {error}")
            continue
        is_cached = refuse_cache(config.prefix.model_copy(update={"cache": "auto"}), mask_obstacle(mask)) is None
        lines[number] = mask.boundary if is_cached else 0
    if faults:
        raise ConfigError(faults, "sweep, read against the model")
    return lines
