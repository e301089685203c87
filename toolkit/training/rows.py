"""Read the rows of a run, rendered as they were when it began."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from toolkit.config.schema import RunConfig
from toolkit.data.chat_rendering import Rendering, prints_date, read_rendering
from toolkit.data.dataset import Dataset, load_dataset
from toolkit.data.examples import Encoder
from toolkit.models.load import resolve_source
from toolkit.models.source_files import SourceFiles
from toolkit.runtime.distributed import World
from toolkit.runtime.paths import explain_refused_write
from toolkit.training.rank_agreement import require_same_rows

log = logging.getLogger("frostline")


def load_rows(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, world: World, run_dir: Path | None
) -> tuple[Dataset, list[int]]:
    """Read the rows that ``config`` names, the same on every rank; every rank calls it.

    A date that the chat template prints is that of the run's beginning on all ranks and in all later commands, which
    find it in ``run_dir``; None saves nothing.

    Returns:
        The rows, and the tokens that end an answer.

    Raises:
        DataError: as ``load_dataset``.
        UsageError: as ``require_same_rows``.
        DiskError: the run directory cannot be written.
    """
    rendering = Rendering()
    if prints_date(tokenizer):
        saved = read_rendering(run_dir).now if run_dir is not None else None
        rendering = Rendering(world.broadcast_object(saved or datetime.now().replace(microsecond=0)))
        log.info("the chat template prints the date; it stays %s for this run", rendering.now)
    source = resolve_source(config.model.name_or_path, needs_weights=False)
    ends = SourceFiles(source, config.model.revision).end_tokens()
    dataset = load_dataset(config.data, tokenizer, config.train.seed, ends=ends, rendering=rendering)
    require_same_rows(world, dataset, tokenizer)
    log.info("data: %s", dataset.summary())
    rendering = replace(rendering, reasons=any(example.reasons for example in dataset.train))
    if run_dir is not None and world.is_main:
        with explain_refused_write(run_dir):
            rendering.save(run_dir)
    return dataset, Encoder(tokenizer, config.data.max_length, ends, rendering).stop_ids()
