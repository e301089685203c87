"""Determine the row lengths for a plan: from the data if it is local and small, else the recipe's maximum."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from toolkit.config.schema import RunConfig
from toolkit.data.dataset import Dataset, load_dataset
from toolkit.inference.open_model import load_tokenizer_of
from toolkit.models.load import resolve_source
from toolkit.models.source_files import SourceFiles
from toolkit.runtime.errors import UsageError
from toolkit.runtime.shipped import find_file

_QUICK_BYTES = 4 * 2**20
"""A data file up to this size is read and tokenised for a plan; it takes about a second."""


@dataclass(frozen=True)
class Workload:
    """Lengths of the rows of a run."""

    tokens: int
    """Tokens of the longest row."""
    supervised: int
    """Supervised tokens of the row that has most."""
    lengths: tuple[tuple[int, int], ...] | None
    """(tokens, supervised tokens) of each training row; None if the data was not read."""
    source: str
    """Phrase that says where the lengths come from."""
    distinct: tuple[int, ...] | None = None
    """Tokens of each distinct row, validation rows included; None if the data was not read."""


def workload_of(dataset: Dataset) -> Workload:
    """Return the row lengths of a loaded data set."""
    lengths = tuple((len(example.token_ids), example.supervised_tokens) for example in dataset.train)
    return Workload(
        max(tokens for tokens, _ in lengths),
        max(supervised for _, supervised in lengths),
        lengths,
        f"the longest of {len(lengths):,} training rows",
        tuple(len(ids) for ids in {example.token_ids for example in (*dataset.train, *dataset.validation)}),
    )


def read_workload(config: RunConfig, positions: int | None) -> Workload:
    """Return the row lengths of the recipe's data if file and tokenizer are local and the file is small, else a bound.

    The bound is rows of ``data.max_length`` tokens, all of them supervised, or of ``positions``, the model's longest
    input in tokens (None if unlimited).
    """
    reason = _reason_not_to_read(config)
    if reason is None:
        try:
            source = resolve_source(config.model.name_or_path, needs_weights=False)
            ends = SourceFiles(source, config.model.revision).end_tokens()
            return workload_of(load_dataset(config.data, load_tokenizer_of(config.model), config.train.seed, ends=ends))
        except UsageError as error:
            first_bad_row = str(error).splitlines()[:2]
            reason = " ".join(line.strip(" -") for line in first_bad_row)
    tokens = min(config.data.max_length, positions or config.data.max_length)
    return Workload(tokens, tokens, None, f"data.max_length, all supervised; the data was not read: {reason}")


def _reason_not_to_read(config: RunConfig) -> str | None:
    """Return why the data is not read for a plan; None if it is read."""
    path = find_file(config.data.path)
    if not path.is_file():
        return f"{path} is no file here"
    if path.stat().st_size > _QUICK_BYTES:
        return f"{path} is larger than {_QUICK_BYTES // 2**20} MiB"
    source = Path(resolve_source(config.model.name_or_path, needs_weights=False))
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return f"{config.model.name_or_path} has no tokenizer here"
    return None
