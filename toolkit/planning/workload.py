"""Read the row lengths for a plan: those of the data where it is here, else the longest that the recipe allows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from toolkit.config.schema import RunConfig
from toolkit.data.dataset import Dataset, load_dataset
from toolkit.models.end_tokens import model_ends
from toolkit.models.load import load_tokenizer, resolve_source
from toolkit.runtime.errors import UsageError
from toolkit.runtime.shipped import find_file

_QUICK_BYTES = 4 * 2**20
"""A data file up to this size is read and tokenised for a plan; it takes about a second."""


@dataclass(frozen=True)
class Workload:
    """Hold how long the rows are."""

    tokens: int
    """Of the longest row."""
    supervised: int
    """Most supervised tokens of a row."""
    lengths: tuple[tuple[int, int], ...] | None
    """(tokens, supervised tokens) of each training row; None where the data was not read."""
    source: str
    """Where this is from, as a phrase."""
    distinct: tuple[int, ...] | None = None
    """Tokens of each distinct row, validation rows included; None where the data was not read."""


def workload_of(dataset: Dataset) -> Workload:
    """Return the rows of a data set that was read."""
    lengths = tuple((len(example.token_ids), example.supervised_tokens) for example in dataset.train)
    return Workload(
        max(tokens for tokens, _ in lengths),
        max(supervised for _, supervised in lengths),
        lengths,
        f"the longest of {len(lengths):,} training rows",
        tuple(len(ids) for ids in {example.token_ids for example in (*dataset.train, *dataset.validation)}),
    )


def read_workload(config: RunConfig, positions: int | None) -> Workload:
    """Return the rows of ``config``'s data if file and tokenizer are on this machine and small, else a bound.

    The bound is ``data.max_length`` tokens, all of them supervised.

    Args:
        config: the run.
        positions: the model's longest input, if it has one.
    """
    reason = _why_not(config)
    if reason is None:
        try:
            ends = model_ends(resolve_source(config.model.name_or_path, needs_weights=False), config.model.revision)
            return workload_of(load_dataset(config.data, load_tokenizer(config.model), config.train.seed, ends=ends))
        except UsageError as error:
            reason = " ".join(line.strip(" -") for line in str(error).splitlines()[:2])  # of bad rows, the first
    tokens = min(config.data.max_length, positions or config.data.max_length)
    return Workload(tokens, tokens, None, f"data.max_length, all supervised; the data was not read: {reason}")


def _why_not(config: RunConfig) -> str | None:
    path = find_file(config.data.path)
    if not path.is_file():
        return f"{path} is no file here"
    if path.stat().st_size > _QUICK_BYTES:
        return f"{path} is larger than {_QUICK_BYTES // 2**20} MiB"
    source = Path(resolve_source(config.model.name_or_path, needs_weights=False))
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return f"{config.model.name_or_path} has no tokenizer here"
    return None
