"""The training and validation examples of a run, every row accounted for."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from toolkit.config.schema import DataConfig
from toolkit.data.chat_rendering import Rendering
from toolkit.data.examples import Example
from toolkit.data.part_rows import check_groups, check_overlaps, divide, draw
from toolkit.data.rows import Rows
from toolkit.data.screening import Screening
from toolkit.data.sources import Part, Row, Source, iter_rows, sources_of
from toolkit.data.token_cache import find_store, remember_fingerprint
from toolkit.data.token_key import store_key
from toolkit.data.token_store import TokenStore
from toolkit.data.tokenising import Encoding
from toolkit.runtime.errors import DataError, UsageError
from toolkit.runtime.paths import replace_text
from toolkit.runtime.progress_bar import ProgressBar
from toolkit.tasks.choose import AUTO, choose_task, find_task, load_task
from toolkit.tasks.row_values import COUNTED_OTHERWISE
from toolkit.tasks.task import Task

log = logging.getLogger("frostline")

_MOST_LISTED = 10
"""Most bad rows that an error message lists."""


@dataclass(frozen=True)
class Dataset:
    """The rows that a run is trained on, validated on and, at its end, tested on; examples are made when asked for."""

    train: Rows
    validation: Rows
    skipped: tuple[Row, ...]
    """Rows left out under ``on_bad_row: skip``, with their faults and without their values."""
    test: Rows = field(default_factory=lambda: Rows.of(()))
    """Rows that nothing is chosen by; with ``data.folds`` those that the fold holds out."""
    screening: Screening = field(default_factory=Screening, compare=False)
    """What a first look at the rows found."""
    sources: tuple[Source, ...] = ()
    """Where the rows were read."""
    task: str = ""
    """Name of the task by which the training rows were read."""

    @classmethod
    def of(cls, train: Sequence[Example], validation: Sequence[Example] = ()) -> Dataset:
        """Return a data set of examples."""
        return cls(Rows.of(train), Rows.of(validation), ())

    @cached_property
    def rows(self) -> Rows:
        """All rows."""
        return self.train + self.validation + self.test

    def summary(self) -> str:
        """Describe the data set in one line for the log."""
        test = f", {len(self.test)} test rows" if len(self.test) else ""
        return (
            f"{len(self.train)} training rows ({self.train.lengths.sum():,} tokens, "
            f"{self.train.supervised.sum():,} supervised), {len(self.validation)} validation rows{test}; "
            f"{self.rows.shortened} rows lost context, {len(self.skipped)} rows skipped"
        )

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the token ids and supervised spans of training and validation rows.

        It is computed once for a token store and a split of it, and kept beside the store.
        """
        name = hashlib.sha256()
        for part in (self.train, self.validation):
            name.update(" ".join(store.sha256 for store in part.stores).encode())
            name.update(part.of_store.tobytes() + part.numbers.tobytes() + b"|")
        return remember_fingerprint(self.train.stores[0], name.hexdigest(), self._compute_fingerprint)

    @property
    def test_fingerprint(self) -> str:
        """Return a SHA-256 of the token ids and supervised spans of the test rows."""
        return hashlib.sha256(self.test.digests.tobytes()).hexdigest()

    def _compute_fingerprint(self) -> str:
        sha = hashlib.sha256()
        with ProgressBar("comparing rows", len(self.train) + len(self.validation), "row", brief=True) as bar:
            for part in (self.train, self.validation):
                for example in part:
                    sha.update(example.content)
                    bar.advance()
                sha.update(b"|")
        return sha.hexdigest()

    def save_skipped(self, path: Path) -> None:
        """Write the skipped rows of a run as JSON lines; remove an older file if there are none."""
        if self.skipped:
            lines = [json.dumps({"row": row.origin, "fault": row.fault}, ensure_ascii=False) for row in self.skipped]
            replace_text(path, "\n".join(lines) + "\n")
        else:
            path.unlink(missing_ok=True)

    def save_sources(self, path: Path) -> None:
        """Write which files the rows were read from as JSON, with their sizes in bytes."""
        listed = [
            {
                "source": source.name,
                "for": source.default_split,
                "files": [{"path": _as_text(file.resolve()), "bytes": file.stat().st_size} for file in source.files],
            }
            for source in self.sources
        ]
        replace_text(path, json.dumps(listed, ensure_ascii=False, indent=1))


def _as_text(path: Path) -> str:
    r"""Return a path as text; a byte of it that is not UTF-8 as ``\xff``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def load_dataset(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, ends: Sequence[int] = (),
    rendering: Rendering = Rendering(), sources: Sequence[Source] | None = None,
) -> Dataset:  # fmt: skip
    """Read, check, encode and split the rows that ``config`` names, or find them encoded by an earlier run.

    ``ends`` are the end-of-text tokens that the model's config files name. ``seed`` is that of the split, if
    ``config.validation`` is a fraction. ``sources`` take the place of those that ``config.path`` names.

    Raises:
        DataError: a file cannot be read, rows are bad and ``config.on_bad_row`` is ``error``, a split is impossible,
            rows of a separate validation set are training rows too, or test rows are in either; names the first.
        ConfigError: the task file or mapping is wrong.
        DiskError: the disk has no room for the encoded rows.
        StopRequested: a signal came meanwhile.
    """
    encoding = Encoding(config, tokenizer, tuple(ends), rendering)
    encoder = encoding.encoder()
    _check_tasks(config)
    sources = list(sources or sources_of(config, "train"))
    stores = [_store_of(source, encoding) for source in sources]
    columns = tuple(stores[0].source_columns)
    task = _report_tasks(sources, stores, encoding)
    skipped = _check_rows(stores, config)
    seen = Rows.of_stores(stores)
    train, validation, test = divide(config, seen, seed, columns)
    train = draw(config, sources, seen, train, seed)
    of_held_out = replace(encoding, config=config.model_copy(update={"oversample": None, "stratify_by": None}))
    held_out: dict[Part, Rows] = {"validation": validation, "test": test}
    for part in held_out:
        if of_part := sources_of(config, part):
            stores = [_store_of(source, of_held_out) for source in of_part]
            _report_tasks(of_part, stores, of_held_out, task)
            sources += of_part
            skipped += _check_rows(stores, config)
            held_out[part] = Rows.of_stores(stores)
            check_groups(config, seen, held_out[part], part, stores[0].source_columns)
            seen += held_out[part]
    validation, test = held_out["validation"], held_out["test"]
    check_overlaps(config, train, validation, test)
    screening = Screening.of(config, seen)
    for note in encoder.notes():
        log.info("%s", note)
    if not encoder.tokenizer.chat_template and task.spec.text is None:
        log.info(
            "the model has no chat template: turns are joined as plain text, without marks of who speaks; "
            "data.chat_template names one"
        )
    dataset = Dataset(train, validation, skipped, test, screening, tuple(sources), task.name)
    _report_texts(dataset.rows, encoder.rendering.parses_special)
    return dataset


def _check_tasks(config: DataConfig) -> None:
    """Raise DataError if a source names a task that cannot be used; lists all, before any row is tokenised."""
    faults = []
    parts: tuple[Part, ...] = ("train", "validation", "test")
    for source in (source for part in parts for source in sources_of(config, part)):
        if source.task is not None and source.task != AUTO:
            try:
                load_task(source.task, source.task_key)
            except UsageError as fault:
                faults.append(str(fault))
    if faults:
        raise DataError("\n".join(dict.fromkeys(faults)))


def _report_tasks(
    sources: Sequence[Source], stores: Sequence[TokenStore], encoding: Encoding, known: Task | None = None
) -> Task:
    """Return the task of the first source; log it unless it is ``known``, and the tasks of the others that differ."""
    first = known
    for source, store in zip(sources, stores, strict=True):
        own, columns = _encoding_of(source, encoding), tuple(store.source_columns)
        if source.task is not None or first is None:
            task = choose_task(own.config, columns, key=own.task_key)
            if source.task is not None:
                log.info("%s: the rows are read by the source's own task, %s", source.name, task.name)
            first = first or task
        elif encoding.config.task == AUTO and (task := find_task(own.config, columns)).name != first.name:
            log.info("data.task: auto takes %s for %s; columns: %s", task.name, source.path, ", ".join(columns))
    assert first is not None
    return first


def _encoding_of(source: Source, encoding: Encoding) -> Encoding:
    """Return the encoding of the rows of a source, by its own task if it has one."""
    encoding = replace(encoding, origin=source.name)
    if source.task is None:
        return encoding
    config = encoding.config.model_copy(update={"task": source.task})
    return replace(encoding, config=config, task_key=source.task_key)


def _store_of(source: Source, encoding: Encoding) -> TokenStore:
    """Return the encoded rows of a source, which is read if no earlier run has encoded them."""
    own = _encoding_of(source, encoding)
    store = find_store(store_key(source, own), lambda: iter_rows(source), own)
    store.edition = source.edition
    return store


def _check_rows(stores: Sequence[TokenStore], config: DataConfig) -> tuple[Row, ...]:
    """Return the rows of sources that cannot be used, with their faults.

    Raises:
        DataError: there are some and ``config.on_bad_row`` is ``error``, or no usable row is left.
    """
    bad, usable = [row for store in stores for row in store.bad], sum(map(len, stores))
    is_misread = any(fault.endswith(COUNTED_OTHERWISE) for _, fault in bad)  # and so would those be that are left
    if bad and (config.on_bad_row == "error" or not usable or is_misread):
        by_fault: dict[str, list[str]] = {}
        for origin, fault in bad:
            by_fault.setdefault(fault, []).append(origin)
        listed = [
            f"  - {origins[0]} {fault}" + (f" (and {len(origins) - 1} more rows)" if len(origins) > 1 else "")
            for fault, origins in list(by_fault.items())[:_MOST_LISTED]
        ]
        if len(by_fault) > _MOST_LISTED:
            listed.append(f"  … and {len(by_fault) - _MOST_LISTED} more faults")
        advice = "Correct them, or set data.on_bad_row: skip to leave them out"
        if is_misread or not usable:
            advice = "Correct the task" if is_misread else "No usable row is left; correct them"
        raise DataError("\n".join([f"{len(bad)} of {usable + len(bad)} rows cannot be used:", *listed, advice]))
    return tuple(Row(origin, fault=fault) for origin, fault in bad)


def _report_texts(rows: Rows, parses_special: bool) -> None:
    """Log how many rows hold a control token's text, text in separate letters, and tools that are not shown."""
    if len(escaped := rows.with_control_token):
        first = rows[int(escaped[0])]
        log.info("%s", control_tokens_text(len(escaped), first.control_token, first.origin, parses_special))
    if len(composed := rows.normalised):
        log.info(
            "%s text in separate letters (Unicode NFD; first: %s); it is composed (data.normalize: nfc)",
            f"{len(composed)} rows hold" if len(composed) > 1 else "1 row holds",
            rows.origin(int(composed[0])),
        )
    if len(hidden := rows.with_hidden_tools):
        log.warning("%s", hidden_tools_text(len(hidden), rows.origin(int(hidden[0]))))


def control_tokens_text(rows: int, token: str, first: str, parses_special: bool) -> str:
    """Describe that so many rows hold the text of a control token, of which ``first`` holds ``token``."""
    return (
        f"{f'{rows} rows hold' if rows > 1 else '1 row holds'} the text of a control token (first: {token!r} in {first}"
        "); it is encoded as "
        + ("that token (data.special_tokens: parse)" if parses_special else "text, not as that token")
    )


def hidden_tools_text(rows: int, first: str) -> str:
    """Describe that so many rows, of which ``first`` is one, declare tools that nothing shows to the model."""
    return (
        f"{rows} {'row declares' if rows == 1 else 'rows declare'} tools that the chat template does not show (first: "
        f"{first}); they have no effect. Name in data.chat_template one that shows tools, or leave the column out"
    )
