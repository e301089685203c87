"""Plan a run that has loaded its model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from toolkit.config.schema import RunConfig
from toolkit.data.dataset import Dataset
from toolkit.models.load import LoadedModel
from toolkit.planning.meta_model import meta_model_of
from toolkit.planning.phase_plans import phase_planners
from toolkit.planning.planner import Planner
from toolkit.planning.workload import workload_of
from toolkit.runtime.errors import PlanError
from toolkit.training.cut import effective

log = logging.getLogger("frostline")


def planners_of(
    config: RunConfig, loaded: LoadedModel, dataset: Dataset, device: torch.device, passes: Sequence[float]
) -> list[Planner]:
    """Return the planner of each phase; none, and a warning, where the architecture cannot be planned.

    Args:
        config: the recipe.
        loaded: the model, before a mask is applied.
        dataset: the rows.
        device: where the run computes.
        passes: over the training rows, one number a phase.
    """
    config = config.model_copy(update={"prefix": effective(config.prefix, device)})
    try:
        return phase_planners(config, meta_model_of(loaded), workload_of(dataset), passes)
    except PlanError as error:
        log.warning("%s", error)
        return []
