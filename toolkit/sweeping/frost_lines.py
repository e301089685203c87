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
    """Find the frost line of each trial, by number, by the model's config.json alone.

    Raises:
        ConfigError: ``lines_and_faults`` finds faults; lists those of all trials.
    """
    lines, faults = lines_and_faults(trials)
    if faults:
        texts = [f"trial {number} ({describe(*trials[number])}): {fault}" for number, fault in faults.items()]
        raise ConfigError(texts, "sweep, read against the model")
    return lines


def lines_and_faults(trials: Mapping[int, tuple[Settings, RunConfig]]) -> tuple[dict[int, int], dict[int, str]]:
    """Return the frost line of each trial by number, and the faults of those that the model does not take.

    These are masks that do not fit it, and ``prefix.cache: on`` where there is nothing to cache. A line that cannot be
    told without weights is left out.
    """
    from toolkit.activation_cache.policy import mask_obstacle
    from toolkit.mask.schedule import phase_masks
    from toolkit.planning.meta_model import meta_model
    from toolkit.runtime.errors import MaskError

    models, lines, faults = dict[str, Any](), dict[int, int](), dict[int, str]()
    for number, (settings, config) in trials.items():
        model = config.model
        try:
            if (key := model.model_dump_json()) not in models:
                models[key] = meta_model(model).anatomy
            mask = phase_masks(config.mask, models[key])[0]
            obstacle = mask_obstacle(mask)
            refuse_cache(config.prefix, obstacle)
        except PlanError as error:
            text = describe(settings, config)
            log.warning("the frost line of (%s) is not known before it runs: %s", text, error)
            continue
        except (MaskError, ConfigError) as error:
            faults[number] = "; ".join(error.faults) if isinstance(error, ConfigError) else str(error)
            continue
        lines[number] = mask.boundary if obstacle is None else 0
    return lines, faults
