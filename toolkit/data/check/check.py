"""Check the data that a recipe names: read them as training does, look, and change nothing."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from toolkit.config.schema import DataConfig
from toolkit.data.check.answers import can_tell_languages, languages, odd_answers
from toolkit.data.check.matches import find_matches
from toolkit.data.check.report import CheckReport, Finding, IdentifierPlace, Lengths, TestSetOverlap
from toolkit.data.check.samples import CheckedSample, checked
from toolkit.data.dataset import hidden_tools_text
from toolkit.data.examples import Encoder, Example
from toolkit.data.identifiers import Identifier, IdentifierFinder, printed_value, texts_of
from toolkit.data.part_rows import divide, draw
from toolkit.data.retrieval import passages_for
from toolkit.data.row_notes import RowNote, RowNoter
from toolkit.data.rows import Rows
from toolkit.data.sources import Part, Row, Source, iter_rows, sources_of
from toolkit.data.token_file import EncodedRows
from toolkit.data.token_store import TokenStore, store_in_memory
from toolkit.runtime.errors import DataError
from toolkit.runtime.progress_bar import track
from toolkit.tasks.choose import choose_task, columns_of
from toolkit.tasks.sample import RowFaultError


def check_data(
    config: DataConfig, encoder: Encoder, seed: int, model: str, others: Mapping[str, Sequence[CheckedSample]]
) -> CheckReport:
    """Read the rows that ``config`` names and report on them.

    Args:
        config: the data section.
        encoder: turns rows into tokens, as training does.
        seed: ``train.seed``, which fractions are drawn with.
        model: name of the model whose tokenizer that is, for the report.
        others: samples of the sets that the data are compared with, by their name.

    Raises:
        DataError: a file cannot be read.
    """
    sources = sources_of(config, "train")
    report = CheckReport(", ".join(source.name for source in sources), model, encoder.max_length)
    reader = _Reader(config, encoder, report)
    samples = _divide(config, seed, sources, [reader.read(source, "train") for source in sources], report)
    parts: tuple[Part, ...] = ("validation", "test")
    for part in parts:
        for source in sources_of(config, part):
            samples += reader.read(source, part)
    compared = [sample for of_set in others.values() for sample in of_set]
    report.duplicates, report.leaks = find_matches(samples, compared)
    leaked = {match.other for match in report.leaks} | {match.row for match in report.leaks}
    report.comparisons = [
        TestSetOverlap(name, len(of_set), sum(sample.origin in leaked for sample in of_set))
        for name, of_set in others.items()
    ]
    report.odd_answers = [Finding(sample.origin, reason) for sample, reason in odd_answers(samples)]
    if can_tell_languages():
        contexts = [text for sample in samples for text in sample.contexts]
        report.languages = {
            "questions": languages([sample.question for sample in samples]),
            "contexts": languages(contexts),
            "answers": languages([sample.answer for sample in samples]),
        }
    if hidden := [sample.origin for sample in samples if any(example.hides_tools for example in sample.examples)]:
        report.notes.append(hidden_tools_text(len(hidden), hidden[0]))
    _measure(samples, report)
    _render(samples, encoder, report)
    return report


class _Reader:
    """Reads rows as samples, and notes in the report what is to be said about each row by itself."""

    def __init__(self, config: DataConfig, encoder: Encoder, report: CheckReport) -> None:
        self._config, self._encoder, self._report = config, encoder, report
        self._finder, self._noter = IdentifierFinder(config.identifier_patterns), RowNoter(config)
        self._whole = _unlimited(encoder)

    def read(self, source: Source, part: str) -> list[CheckedSample]:
        """Return the samples of a source's rows that can be used; identifiers in them are masked."""
        samples, rows = [], list(iter_rows(source))
        own = {} if source.task is None else {"task": source.task}
        columns = columns_of(row.values for row in rows)
        task = choose_task(self._config.model_copy(update=own), columns, origin=source.name, key=source.task_key)
        with_passages = passages_for(self._config, task)
        for read in track(rows, f"reading {part} rows", "row", len(rows)):
            row = replace(read, origin=self._noter.origin(read.origin))
            try:
                if row.fault:
                    raise RowFaultError(row.fault)
                self._look(row)
                values, found = self._noter.masked(row.values)
                trained = task.read(
                    with_passages(values)
                )  # other tokens than those shown, if identifiers are trained on
                sample = task.read(with_passages(self._finder.mask_values(row.values))) if found else trained
                examples = self._encoder.encode_all(trained)
                shown = self._encoder.encode_all(sample)[0] if found else examples[0]
                is_cut = any(example.shortened for example in examples)
                tokens = sum(map(len, self._whole.encode_all(trained) if is_cut else examples))
            except RowFaultError as fault:
                self._report.bad_rows.append(Finding(row.origin, self._noter.fault(str(fault))))
                continue
            samples.append(checked(row, sample, part, examples, shown, tokens))
        return samples

    def _look(self, row: Row) -> None:
        """Note text that is not in NFC, and where identifiers are."""
        if any(not unicodedata.is_normalized("NFC", text) for text in texts_of(row.values)):
            self._report.not_nfc.append(row.origin)
        for column, found in self._identifiers(row.values):
            place = IdentifierPlace(row.origin, self._finder.mask(column), found.kind, found.start, found.end)
            self._report.identifiers.append(place)

    def _identifiers(self, values: Any, path: str = "") -> Iterator[tuple[str, Identifier]]:
        """Yield the identifiers in a row's values with the path of their column."""
        if isinstance(values, list | tuple):
            items, across = self._finder.part(values)
            yield from ((path, found) for found in across)
            values = dict(enumerate(items))
        if isinstance(values, Mapping):
            for key, value in values.items():
                yield from self._identifiers(value, f"{path}.{key}" if path else str(key))
            return
        for text in texts_of(values):
            if (printed := printed_value(text)) is not None:
                yield from self._identifiers(printed, path)
            else:
                yield from ((path, found) for found in self._finder.find(unicodedata.normalize("NFC", text)))


def _unlimited(encoder: Encoder) -> Encoder:
    """Return an encoder that cuts nothing."""
    return Encoder(encoder.tokenizer, 10**9, encoder.ends, encoder.rendering)


def _divide(
    config: DataConfig,
    seed: int,
    sources: Sequence[Source],
    read: Sequence[Sequence[CheckedSample]],
    report: CheckReport,
) -> list[CheckedSample]:
    """Return the samples of all sources with the part that training gives each; note a split that is impossible.

    Rows that no epoch takes are left out.
    """
    noter, samples = RowNoter(config), [sample for of_source in read for sample in of_source]
    stores, firsts = list[TokenStore](), list[int]()
    try:
        for source, of_source in zip(sources, read, strict=True):
            notes, examples = list[RowNote](), list[Example]()
            for sample in of_source:
                firsts.append(len(examples) + sum(map(len, stores)))
                note = noter.note(sample.values, {})
                notes += [replace(note, continues=number > 0) for number in range(len(sample.examples))]
                examples += [replace(part, origin=sample.origin) for part in sample.examples]
            stores.append(store_in_memory(EncodedRows.of(examples, (), notes)))
            stores[-1].edition = source.edition
        every = Rows.of_stores(stores)
        known, validation, test = divide(config, every, seed, columns_of(sample.values for sample in samples))
        taken = draw(config, sources, every, known, seed)
    except DataError as error:
        report.notes.append(f"the rows cannot be divided: {error}")
        return samples
    if config.folds is not None:
        report.notes.append(f"the test rows are those of fold {config.fold or 0} of {config.folds}")
    starts = np.cumsum([0, *map(len, stores)])
    part_of: dict[int, str] = {}
    for name, part in (("train", taken), ("validation", validation), ("test", test)):
        part_of |= dict.fromkeys((starts[part.of_store] + part.numbers).tolist(), name)
    if taken is not known:
        report.notes.append(
            f"an epoch takes {len(taken)} rows of {len(known)} to train on (data.limit, weights of sources, "
            "data.oversample); those that it never takes are left out here, and each other counts once"
        )
    parts = [
        {part_of[number] for number in range(first, first + len(sample.examples)) if number in part_of}
        for first, sample in zip(firsts, samples, strict=True)
    ]
    return [replace(sample, part=part.pop()) for sample, part in zip(samples, parts, strict=True) if part]


def _measure(samples: Sequence[CheckedSample], report: CheckReport) -> None:
    """Note rows and lengths of each part, and what was cut."""
    for part in ("train", "validation", "test"):
        own = [sample for sample in samples if sample.part == part]
        report.rows[part] = len(own)
        if own:
            tokens = np.array([sample.tokens for sample in own])
            median, high = (int(np.percentile(tokens, share)) for share in (50, 95))
            supervised = sum(example.supervised_tokens for sample in own for example in sample.examples)
            report.lengths[part] = Lengths(len(own), median, high, int(tokens.max()), supervised)
    for sample in samples:
        if any(example.shortened for example in sample.examples):
            lost = sample.tokens - sum(map(len, sample.examples))
            report.cut_tokens += lost
            report.cut.append(
                Finding(sample.origin, f"{sample.tokens} tokens, of which {lost} of its contexts are cut")
            )


def _render(samples: Sequence[CheckedSample], encoder: Encoder, report: CheckReport) -> None:
    """Put the first training row into the report as the model sees it, piece by piece."""
    sample = next((sample for sample in samples if sample.part == "train"), None)
    if sample is None or (shown := sample.shown) is None:
        return
    report.example_row = sample.origin
    supervised = {index for start, end in shown.spans for index in range(start, end)}
    pending: list[int] = []
    for index, token in enumerate(shown.token_ids):
        pending.append(token)
        text = str(encoder.tokenizer.decode(pending, clean_up_tokenization_spaces=False))
        next_differs = (index + 1 in supervised) != (index in supervised)
        if "\ufffd" not in text or next_differs or len(pending) > 8:  # a character may have several tokens
            report.example.append((text, index in supervised))
            pending = []
    if pending:
        report.example.append((str(encoder.tokenizer.decode(pending)), index in supervised))
