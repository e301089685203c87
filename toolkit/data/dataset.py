"""The training and validation examples of a run, every row accounted for."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from toolkit.config.schema import DataConfig
from toolkit.data.chat_rendering import Rendering
from toolkit.data.examples import Encoder, Example
from toolkit.data.sources import Row, read_rows
from toolkit.runtime.errors import DataError
from toolkit.runtime.progress_bar import track
from toolkit.tasks.pubmedqa import TASKS, RowFaultError

log = logging.getLogger("frostline")

_MOST_LISTED = 10
"""Most bad rows that an error message lists."""


@dataclass(frozen=True)
class Dataset:
    """The rows that a run is trained and validated on."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    skipped: tuple[Row, ...]
    """Rows left out under ``on_bad_row: skip``, with their faults and without their values."""

    def summary(self) -> str:
        """Describe the data set in one line for the log."""
        tokens = sum(map(len, self.train))
        supervised = sum(example.supervised_tokens for example in self.train)
        shortened = sum(example.shortened for example in (*self.train, *self.validation))
        return (
            f"{len(self.train)} training rows ({tokens:,} tokens, {supervised:,} supervised), "
            f"{len(self.validation)} validation rows; {shortened} rows lost context, {len(self.skipped)} rows skipped"
        )

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the token ids and supervised spans of all rows, in order."""
        sha = hashlib.sha256()
        for part in (self.train, self.validation):
            for example in part:
                sha.update(f"{example.answer_start} {example.token_ids}".encode())
            sha.update(b"|")
        return sha.hexdigest()

    def save_skipped(self, path: Path) -> None:
        """Write the skipped rows as JSON lines; remove an older file if there are none."""
        path.unlink(missing_ok=True)
        if self.skipped:
            lines = [json.dumps({"row": row.origin, "fault": row.fault}, ensure_ascii=False) for row in self.skipped]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_dataset(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, rows: list[Row] | None = None,
    ends: Sequence[int] = (), rendering: Rendering = Rendering(),
) -> Dataset:  # fmt: skip
    """Read, check, encode and split the rows that ``config`` names.

    ``rows`` are those of ``config.path``; None reads them. ``ends`` are the end-of-text tokens that the model's config
    files name. ``seed`` is that of the split, if ``config.validation`` is a fraction.

    Raises:
        DataError: a file cannot be read, rows are bad and ``config.on_bad_row`` is ``error``, or rows of a separate
            validation set are training rows too; names the first of them.
    """
    encoder = Encoder(tokenizer, config.max_length, ends, rendering)
    rows = read_rows(config.path, config.split) if rows is None else rows
    examples, skipped = encode_rows(rows, encoder, config)
    validation: list[Example] = []
    if isinstance(config.validation, float):
        examples, validation = _hold_out(examples, config.validation, seed)
        if overlap := _overlap(examples, validation):
            log.warning("%s; the validation loss is in part that of rows that are trained on", overlap)
    elif config.validation is not None:
        held_out = read_rows(config.validation, config.validation_split, "data.validation_split", "validation")
        validation, skipped_validation = encode_rows(held_out, encoder, config)
        skipped += skipped_validation
        if overlap := _overlap(examples, validation):
            raise DataError(
                f"{overlap}; their loss says nothing about rows that the model has not seen. Take them out of one of "
                "the two, name another data.validation or data.validation_split, or hold out a fraction"
            )
    for note in encoder.notes():
        log.info("%s", note)
    if escaped := [example for example in (*examples, *validation) if example.control_token]:
        log.info(
            "%s the text of a control token (first: %r in %s); it is encoded as text, not as that token",
            f"{len(escaped)} rows hold" if len(escaped) > 1 else "1 row holds",
            escaped[0].control_token,
            escaped[0].origin,
        )
    return Dataset(tuple(examples), tuple(validation), tuple(skipped))


def encode_rows(rows: list[Row], encoder: Encoder, config: DataConfig) -> tuple[list[Example], list[Row]]:
    """Encode rows; return the examples, and the rows that cannot be used, with their faults.

    Raises:
        DataError: there are bad rows and ``config.on_bad_row`` is ``error``, or no usable row is left.
    """
    examples: list[Example] = []
    bad: list[Row] = []
    for row in track(rows, "tokenising", "row"):
        try:
            if row.fault:
                raise RowFaultError(row.fault)
            examples.append(replace(encoder.encode(TASKS[config.task](row.values)), origin=row.origin))
        except RowFaultError as fault:
            bad.append(Row(row.origin, fault=str(fault)))
    if bad and (config.on_bad_row == "error" or not examples):
        listed = [f"  - {row.origin} {row.fault}" for row in bad[:_MOST_LISTED]]
        if len(bad) > _MOST_LISTED:
            listed.append(f"  … and {len(bad) - _MOST_LISTED} more")
        advice = (
            "Correct them, or set data.on_bad_row: skip to leave them out"
            if examples
            else "No usable row is left; correct them"
        )
        raise DataError("\n".join([f"{len(bad)} of {len(rows)} rows cannot be used:", *listed, advice]))
    return examples, bad


def _hold_out(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split examples at random into training and validation, each in the original order."""
    count = max(1, round(len(examples) * fraction))
    if count >= len(examples):
        raise DataError(
            f"data.validation {fraction} of {len(examples)} rows leaves none to train on; expected a smaller fraction"
        )
    held_out = set(random.Random(seed).sample(range(len(examples)), count))
    train = [example for index, example in enumerate(examples) if index not in held_out]
    return train, [examples[index] for index in sorted(held_out)]


def _overlap(train: Sequence[Example], validation: Sequence[Example]) -> str | None:
    """Describe how many validation rows have the tokens of a training row; None if there are none."""
    origins = {(example.token_ids, example.answer_start): example.origin for example in train}
    shared = [example for example in validation if (example.token_ids, example.answer_start) in origins]
    if not shared:
        return None
    first = shared[0]
    return (
        f"{len(shared)} of {len(validation)} validation rows are training rows as well "
        f"({first.origin} is {origins[first.token_ids, first.answer_start]})"
    )
