"""Determine the row lengths for a plan: from the data if it is local and small, else the recipe's maximum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from toolkit.config.schema import RunConfig
from toolkit.data.dataset import Dataset, load_dataset
from toolkit.data.sources import sources_of
from toolkit.data.template_choice import rendering_of
from toolkit.inference.open_model import load_tokenizer_of
from toolkit.models.load import end_tokens_of, resolve_source
from toolkit.runtime.errors import UsageError

_QUICK_BYTES = 4 * 2**20
"""Data files up to this size are read and tokenised for a plan; it takes about a second."""


Lengths = np.ndarray | Sequence[tuple[int, int]]
"""Tokens and supervised tokens of rows."""


@dataclass(frozen=True)
class Workload:
    """Lengths of the rows of a run."""

    tokens: int
    """Tokens of the longest row."""
    supervised: int
    """Supervised tokens of the row that has most."""
    lengths: Lengths | None = field(compare=False)
    """[rows, 2]: tokens and supervised tokens of each training row; None if the data was not read."""
    source: str
    """Phrase that says where the lengths come from."""
    distinct: np.ndarray | Sequence[int] | None = field(default=None, compare=False)
    """Tokens of each distinct row, validation rows included; None if the data was not read."""

    @property
    def tokens_of_rows(self) -> np.ndarray:
        """[rows] tokens of each training row, which must have been read."""
        return np.asarray(self.lengths)[:, 0]

    @property
    def supervised_of_rows(self) -> np.ndarray:
        """[rows] supervised tokens of each training row, which must have been read."""
        return np.asarray(self.lengths)[:, 1]


def workload_of(dataset: Dataset) -> Workload:
    """Return the row lengths of a loaded data set."""
    lengths = np.stack([dataset.train.lengths, dataset.train.supervised], axis=1)
    tokens, supervised = lengths.max(axis=0).tolist()
    source = f"the longest of {len(lengths):,} training rows"
    return Workload(tokens, supervised, lengths, source, dataset.rows.distinct().lengths)


def read_workload(config: RunConfig, positions: int | None) -> Workload:
    """Return the row lengths of the recipe's data if file and tokenizer are local and the file is small, else a bound.

    The bound is rows of ``data.max_length`` tokens, all of them supervised, or of ``positions``, the model's longest
    input in tokens (None if unlimited).
    """
    reason = _reason_not_to_read(config)
    if reason is None:
        try:
            ends = end_tokens_of(config.model)
            tokenizer = load_tokenizer_of(config.model)
            rendering = rendering_of(config.data, tokenizer)
            return workload_of(load_dataset(config.data, tokenizer, config.train.seed, ends=ends, rendering=rendering))
        except UsageError as error:
            first_bad_row = str(error).splitlines()[:2]
            reason = " ".join(line.strip(" -") for line in first_bad_row)
    tokens = min(config.data.max_length, positions or config.data.max_length)
    return Workload(tokens, tokens, None, f"data.max_length, all supervised; the data was not read: {reason}")


def _reason_not_to_read(config: RunConfig) -> str | None:
    """Return why the data is not read for a plan; None if it is read."""
    for rows in (*sources_of(config.data, "train"), *sources_of(config.data, "validation")):
        if rows.is_on_hub:
            return f"{rows.path} is no file here"
        try:
            size = sum(file.stat().st_size for file in rows.files)
        except UsageError as error:
            return str(error)
        if size > _QUICK_BYTES:
            return f"{rows.path} is larger than {_QUICK_BYTES // 2**20} MiB"
    source = Path(resolve_source(config.model.name_or_path, needs_weights=False))
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return f"{config.model.name_or_path} has no tokenizer here"
    return None
