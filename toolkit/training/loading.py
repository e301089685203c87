"""Load the rows and the model of a run, as the recipe renders and stores them."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from toolkit.config.schema import PrefixConfig, RunConfig
from toolkit.data.chat_rendering import prints_date, read_rendering
from toolkit.data.dataset import Dataset, load_dataset
from toolkit.data.examples import Encoder
from toolkit.data.sources import task_of
from toolkit.data.template_choice import rendering_of
from toolkit.inference.open_model import load_base
from toolkit.mask.layer_mask import build_mask
from toolkit.models.load import LoadedModel, end_tokens_of
from toolkit.planning.meta_model import meta_model
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import ConfigError
from toolkit.runtime.paths import explain_refused_write
from toolkit.runtime.signals import StopRequested
from toolkit.tasks.choose import AUTO, DEFAULT
from toolkit.training.rank_agreement import require_same_rows

log = logging.getLogger("frostline")


def load_rows(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, world: World, run_dir: Path | None
) -> tuple[Dataset, Encoder]:
    """Read the rows that ``config`` names, the same on every rank; every rank calls it.

    A date that the chat template prints is that of the run's beginning on all ranks and in all later commands, which
    find it in ``run_dir``; None saves nothing.

    Returns:
        The rows, and what encoded them.

    Raises:
        DataError: as ``load_dataset``.
        StopRequested: a signal came meanwhile; raised on every rank.
        UsageError: as ``require_same_rows``.
        DiskError: the run directory cannot be written.
    """
    rendering = rendering_of(config.data, tokenizer)
    if prints_date(tokenizer):
        saved = read_rendering(run_dir).now if run_dir is not None else None
        rendering = replace(rendering, now=world.broadcast_object(saved or datetime.now().replace(microsecond=0)))
        log.info("the chat template prints the date; it stays %s for this run", rendering.now)
    ends = end_tokens_of(config.model)
    with suppress(StopRequested):  # of this rank, which agrees with the others on it now
        dataset = load_dataset(config.data, tokenizer, config.train.seed, ends=ends, rendering=rendering)
    world.raise_if_stopping()
    require_same_rows(world, dataset, tokenizer)
    log.info("data: %s", dataset.summary())
    log.info("data check: %s", dataset.screening.line())
    if warning := dataset.screening.warning():
        log.warning("%s", warning)
    rendering = replace(
        rendering,
        reasons=dataset.train.reasons,
        task=dataset.task if task_of(config.data) == AUTO and dataset.task != DEFAULT else None,
    )
    if run_dir is not None and world.is_main:
        with explain_refused_write(run_dir):
            rendering.save(run_dir)
    return dataset, Encoder(tokenizer, config.data.max_length, ends, rendering)


def load_for_training(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
    """Load the model; with ``prefix.placement: disk``, all but the blocks below the frost line.

    Raises:
        UsageError: the model or the mask is at fault.
    """
    if config.prefix.placement != "disk":
        return load_base(config.model, tokenizer)
    anatomy = meta_model(config.model).anatomy  # which blocks are frozen is to be known before any is loaded
    return load_base(config.model, tokenizer, anatomy, build_mask(config.mask, anatomy).boundary)


def check_schedule_allowed(config: RunConfig, device: torch.device) -> None:
    """Refuse to store frozen weights otherwise where a later phase may train them.

    Raises:
        ConfigError: ``mask.schedule`` with ``prefix.precision`` or with ``prefix.placement``; that or
            ``mask.rotation`` with paged moments.
    """
    if config.mask.changes and config.optim.name == "paged_adamw_8bit":
        key = "mask.schedule" if config.mask.schedule else "mask.rotation"
        raise ConfigError(
            [
                f"optim.name is paged_adamw_8bit, but {key} exchanges the optimizer, and bitsandbytes never frees "
                f"memory that it paged; write optim.name: adamw_8bit, or leave out {key}"
            ],
            "recipe",
        )
    if not config.mask.schedule:
        return
    prefix = effective_prefix(config.prefix, device)
    if (prefix.precision, prefix.placement) != ("model", "device"):
        raise ConfigError(
            [
                f"prefix.precision is {prefix.precision} and prefix.placement is {prefix.placement}, but mask.schedule "
                "moves the frost line, so weights below it are to stay as they are; leave out both keys or the schedule"
            ],
            "recipe",
        )


def effective_prefix(config: PrefixConfig, device: torch.device) -> PrefixConfig:
    """Return the prefix section without the settings that change nothing where the run computes."""
    if config.placement == "cpu" and device.type == "cpu":
        return config.model_copy(update={"placement": "device"})
    return config
