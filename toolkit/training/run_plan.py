"""What plans a run that has loaded its model."""

from __future__ import annotations

import logging

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


def planners_of(config: RunConfig, loaded: LoadedModel, dataset: Dataset, device: torch.device) -> list[Planner]:
    """Give what plans each phase; nothing, and a word in the log, where the architecture does not allow it.

    Args:
        config: the recipe.
        loaded: the model, before a mask is applied.
        dataset: the rows.
        device: where the run computes.
    """
    config = config.model_copy(update={"prefix": effective(config.prefix, device)})
    try:
        return phase_planners(config, meta_model_of(loaded), workload_of(dataset))
    except PlanError as error:
        log.warning("%s", error)
        return []
