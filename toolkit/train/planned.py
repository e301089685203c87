"""What plans a run that has loaded its model."""

from __future__ import annotations

import logging

import torch

from toolkit.config.schema import RunConfig
from toolkit.data.dataset import Dataset
from toolkit.errors import PlanError
from toolkit.models.load import LoadedModel
from toolkit.plan.load import load_of
from toolkit.plan.phases import phase_planners
from toolkit.plan.planner import Planner
from toolkit.plan.skeleton import skeleton_of
from toolkit.train.cut import effective

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
        return phase_planners(config, skeleton_of(loaded), load_of(dataset))
    except PlanError as error:
        log.warning("%s", error)
        return []
