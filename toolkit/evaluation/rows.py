"""The rows that models are evaluated on: those that a run held out, or those of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from toolkit.checkpoint.state import read_state
from toolkit.config.data_schema import DataConfig
from toolkit.data.dataset import Dataset, load_dataset
from toolkit.data.row_samples import RowSample, read_samples
from toolkit.data.rows import Rows
from toolkit.data.sources import Source, sources_of, task_of
from toolkit.inference.open_model import OpenedModel
from toolkit.runtime.errors import DataError
from toolkit.runtime.paths import is_directory, is_file

Part = Literal["validation", "test"]
"""Which rows that a run held out: those to choose by, or those to report on."""

_OF_THE_RUNS_ROWS = (
    "split", "name", "revision", "validation", "validation_split", "test", "test_split", "group_by", "stratify_by",
    "folds", "fold", "limit", "oversample",
)  # fmt: skip
"""Keys of a recipe that say something about its own rows alone."""


@dataclass(frozen=True)
class EvaluatedRows:
    """Rows to evaluate on, and what is known of those that were trained on."""

    rows: tuple[RowSample, ...]
    train: tuple[RowSample, ...]
    """Training rows of the run; none where the rows are not a run's own."""
    config: DataConfig
    """The data section by which they were read."""
    examples: Rows
    """Their tokens for the model that they were read for; a long text has several."""
    starts: np.ndarray
    """[rows] int64: number of each row's first example."""
    data: str
    """Origin of the rows, as a phrase."""
    held_out: bool | None
    """True if the run held these rows out; False if it trained on rows of their file, None if that is not known."""


def rows_for(opened: OpenedModel, source: str, named: Source | None, part: Part) -> EvaluatedRows:
    """Read the rows that a model is evaluated on.

    Args:
        opened: the model, whose run, if it is one, says how rows are read.
        source: its name, for messages.
        named: the rows; None takes those that its run held out.
        part: which of these.

    Raises:
        DataError: no rows are named and ``source`` held none out, they have changed since, or rows are invalid.
    """
    config = opened.config.data
    if named is not None:
        own = {"path": named.path, "task": task_of(config, named.path) if named.task is None else named.task}
        config = config.model_copy(update={**dict.fromkeys(_OF_THE_RUNS_ROWS), **own})
    else:
        _require_part(source, opened, part)
    loaded = opened.loaded
    sources = None if named is None else [named]
    seed = opened.config.train.seed
    dataset = load_dataset(config, loaded.tokenizer, seed, loaded.ends, opened.rendering, sources)
    if named is not None:
        grouped = config.model_copy(update={"group_by": opened.config.data.group_by})  # where the rows have its column
        (rows,) = read_samples([named], grouped, dataset.train)
        data, held_out = _describe_rows(len(rows), named, opened, part)
        return EvaluatedRows(tuple(rows), (), config, dataset.train, _starts(dataset.train), data, held_out)
    require_unchanged_rows(dataset, opened, part)
    examples = dataset.test if part == "test" else dataset.validation
    of_train = sources_of(config, "train")
    if own_sources := sources_of(config, part):
        (rows,), (train,) = read_samples(own_sources, config, examples), read_samples(of_train, config, dataset.train)
    else:
        rows, train = read_samples(of_train, config, examples, dataset.train)
    data, held_out = _describe_rows(len(rows), None, opened, part)
    return EvaluatedRows(tuple(rows), tuple(train), config, examples, _starts(examples), data, held_out)


def joined(parts: Sequence[EvaluatedRows], by: str) -> EvaluatedRows:
    """Join rows that several runs held out, each of which is in one part; ``by`` says which model scores which."""
    rows = tuple(row for part in parts for row in part.rows)
    firsts = np.cumsum([0, *(len(part.examples) for part in parts)])
    starts = np.concatenate([part.starts + first for part, first in zip(parts, firsts, strict=False)])
    examples = sum((part.examples for part in parts[1:]), parts[0].examples)
    sources = ", ".join(dict.fromkeys(source.path for source in sources_of(parts[0].config, "train")))
    return EvaluatedRows(rows, (), parts[0].config, examples, starts, f"{len(rows)} rows of {sources}, {by}", True)


def starts_of(counts: Sequence[int]) -> np.ndarray:
    """Return where each of some parts of a sequence begins, from their lengths."""
    return np.cumsum([0, *counts], dtype=np.int64)[:-1]


def _starts(examples: Rows) -> np.ndarray:
    """Return the number of the first example of each row."""
    return np.flatnonzero(np.diff(examples.row_numbers, prepend=0))


def _require_part(source: str, opened: OpenedModel, part: Part) -> None:
    """Raise DataError if ``source`` is no run, or held out no rows of that part."""
    config = opened.config.data
    held_out = config.validation if part == "validation" else config.folds or config.test
    if opened.run is None or held_out is None:
        other = {"validation": config.folds or config.test, "test": config.validation}[part]
        hint = f"evaluate the others with --part {'test' if part == 'validation' else 'validation'}, or " if (
            other is not None and opened.run is not None
        ) else ""  # fmt: skip
        rows = "rows" if part == "validation" else "test rows (data.test, data.folds)"
        raise DataError(f"{source} held no {rows} out; {hint}name some with --data.path FILE")


def _describe_rows(rows: int, named: Source | None, opened: OpenedModel, part: Part) -> tuple[str, bool | None]:
    """Return ``EvaluatedRows.data`` and ``held_out`` for this number of rows; see ``rows_for``."""
    config, run = opened.config.data, opened.run
    if named is None:
        trained = _names(sources_of(config, "train"))
        if part == "test" and config.folds is not None:
            return f"{rows} rows of {trained} that {run} held out (fold {config.fold} of {config.folds})", True
        share = config.validation if part == "validation" else config.test
        if isinstance(share, float):
            return f"{rows} rows that {run} held out of {trained} (data.{part} {share})", True
        return f"{rows} rows of {_names(sources_of(config, part))}, which {run} held out (data.{part})", True
    path, split = named.path, named.split
    text = f"all {rows} rows of {path}" + (f", split {split}" if split else "")
    if run is None:
        return text, None
    if any(_is_same(path, source) and split in (None, source.split) for source in sources_of(config, "train")):
        return f"{text}: {run} trained on rows of it", False
    held_out_parts: tuple[Part, ...] = ("validation", "test")
    for name in held_out_parts:
        if any(_is_same(path, source) for source in sources_of(config, name)):
            return f"{text}, which {run} held out (data.{name})", True
    return f"{text}; whether {run} trained on some of them is not known", None


def _names(sources: Sequence[Source]) -> str:
    """Return the paths of sources, for messages."""
    return ", ".join(source.path for source in sources)


def _is_same(path: str, source: Source) -> bool:
    """Return whether a path is that of a source, so that two spellings of a local one compare equal."""
    is_local = is_file(path) or is_directory(path)
    return Path(path).resolve() == Path(source.path).resolve() if is_local else path == source.path


def require_unchanged_rows(dataset: Dataset, opened: OpenedModel, part: Part) -> None:
    """Raise DataError if the run's rows changed since: splitting them anew could hold out rows that it trained on."""
    assert opened.choice is not None
    then = read_state(opened.choice.checkpoint).fingerprints
    is_other_test = part == "test" and then.get("test", dataset.test_fingerprint) != dataset.test_fingerprint
    if is_other_test or then["data"] != dataset.fingerprint:
        raise DataError(
            f"the rows of {opened.run} have changed since it was trained; name rows to evaluate on with --data.path"
        )
