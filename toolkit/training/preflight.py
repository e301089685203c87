"""Check before it starts what a training run would refuse: without weights, without ranks, in seconds."""

from __future__ import annotations

import logging
import tempfile
from itertools import chain
from pathlib import Path

from toolkit.config.flags import Invocation
from toolkit.config.schema import DataConfig
from toolkit.data.dataset import load_dataset
from toolkit.data.sources import Part, sources_of
from toolkit.data.template_choice import rendering_of
from toolkit.engine.deepspeed.config import load_ds_config
from toolkit.engine.deepspeed.json_file import read_ds_config
from toolkit.inference.open_model import load_tokenizer_of
from toolkit.mask.layer_mask import LayerMask
from toolkit.mask.schedule import phase_masks
from toolkit.models.anatomy import Anatomy
from toolkit.models.load import end_tokens_of
from toolkit.planning.meta_model import meta_model
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import CheckpointError, PlanError
from toolkit.training.open_trackers import require_tracker_packages
from toolkit.training.row_checks import check_rows

log = logging.getLogger("frostline")

_QUICK_BYTES = 64 * 2**20
"""Data files up to this size are read and tokenised row by row; it takes about ten seconds."""


def preflight(invocation: Invocation, ranks: int) -> None:
    """Check DeepSpeed file, model, mask, tokenizer and rows of a run that is to start later on ``ranks`` ranks.

    Raises:
        UsageError: the one that the run itself would end with.
    """
    config, masks = invocation.config, None
    require_tracker_packages(config.output.report_to)
    try:
        masks = check_config(invocation, ranks)
    except PlanError as error:
        log.warning("mask and DeepSpeed file are not checked before the job runs: %s", error)
    tokenizer = load_tokenizer_of(config.model)
    if masks is not None:
        check_rows(*masks, tokenizer, config.model.add_tokens)
    if reason := _too_costly(config.data):
        log.warning("the rows are not checked before the job runs: %s", reason)
    else:
        ends, rendering = end_tokens_of(config.model), rendering_of(config.data, tokenizer)
        dataset = load_dataset(config.data, tokenizer, config.train.seed, ends=ends, rendering=rendering)
        log.info("data: %s", dataset.summary())


def check_config(invocation: Invocation, ranks: int) -> tuple[list[LayerMask], Anatomy]:
    """Check the masks and the DeepSpeed file of a run on ``ranks`` ranks against the model's config.json alone.

    Returns:
        The mask of each phase, and the parts of the model.

    Raises:
        UsageError: DeepSpeed file, model or mask is at fault.
        PlanError: the model's class cannot be built without weights, so nothing was checked.
    """
    config, path = invocation.config, invocation.deepspeed
    if path is not None:
        read_ds_config(path)  # before a class that cannot be built ends these checks
    meta = meta_model(config.model)
    masks = phase_masks(config.mask, meta.anatomy)
    load_ds_config(path, config, ranks, meta.hidden_size)
    return masks, meta.anatomy


def check_writable(run: Path, world: World) -> None:
    """Refuse a run directory that nothing can be written to, before anything costly; every rank calls it.

    Raises:
        CheckpointError: it cannot be written.
    """

    def write_file() -> None:
        try:
            tempfile.TemporaryFile(dir=run).close()
        except OSError as error:
            raise CheckpointError(
                f"run directory {run} cannot be written ({error.strerror}); choose another --output.dir"
            ) from None

    world.on_main(write_file)


def _too_costly(config: DataConfig) -> str | None:
    """Return why the rows are not checked in advance: on the Hub, or too large; None if they are checked."""
    parts: tuple[Part, ...] = ("train", "validation", "test")
    for source in chain.from_iterable(sources_of(config, part) for part in parts):
        if source.is_on_hub:
            return f"{source.path} is a data set on the Hub"
        if sum(file.stat().st_size for file in source.files) > _QUICK_BYTES:
            return f"{source.path} is larger than {_QUICK_BYTES // 2**20} MiB"
    return None
