"""Divide the encoded rows of a run into training, validation and test rows, and check that no part holds another's."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from toolkit.config.schema import DataConfig
from toolkit.data.mixture import check_labels, draw_rows
from toolkit.data.parts import column_of, draw_parts
from toolkit.data.rows import Rows, shared_rows
from toolkit.data.source_rows import connected, source_rows
from toolkit.data.sources import Source
from toolkit.runtime.errors import DataError

log = logging.getLogger("frostline")


def divide(config: DataConfig, rows: Rows, seed: int, columns: Sequence[str]) -> tuple[Rows, Rows, Rows]:
    """Return which of the rows of ``data.path`` are training, validation and test rows; see ``draw_parts``.

    ``columns`` are those of the files, for messages.

    Raises:
        DataError: the split is impossible, or a row lacks the column that it is divided by.
    """
    groups = strata = identical = None
    notes = list(rows.notes()) if config.group_by or config.stratify_by else []
    if config.group_by is not None:
        groups = column_of([note.group for note in notes], rows.origin, config.group_by, "data.group_by", columns)
    if config.stratify_by is not None:
        values = [note.stratum for note in notes]
        strata = column_of(values, rows.origin, config.stratify_by, "data.stratify_by", columns)
    if groups is None:
        groups, identical = _kept_together(config, rows)
    parts = draw_parts(config, seed, len(rows), groups, strata, identical)
    return rows.take(parts.train), rows.take(parts.validation), rows.take(parts.test)


def _kept_together(config: DataConfig, rows: Rows) -> tuple[list[str] | None, list[str] | None]:
    """Return ``groups`` and ``identical`` of ``draw_parts`` for rows that no column groups.

    The parts of a text and its copies stay together, and what two sources read from one row of a file.
    """
    alike, identical = list[list[str]](), None
    if config.folds is not None or isinstance(config.test, float):
        identical = [ids.hex() for ids in rows.sequences.tolist()]
    of_row = rows.row_numbers
    if len(rows) and 1 < of_row[-1] < len(rows):
        alike.append(_texts(rows, of_row))
        identical = None
    if (of_files := source_rows(rows)) is not None:
        alike.append(list(map(str, of_files[0].tolist())))
    if not alike:
        return None, identical
    groups = alike[0] if len(alike) == 1 else connected(*alike)
    return groups, None if identical is None else connected(groups, identical)


def _texts(rows: Rows, of_row: np.ndarray) -> list[str]:
    """Return for each example the number of the first row whose parts are the same as those of its own."""
    first: dict[bytes, str] = {}
    starts = np.flatnonzero(np.diff(of_row, prepend=0))
    parts = np.split(rows.digests, starts[1:])
    numbers = [first.setdefault(part.tobytes(), str(number)) for number, part in enumerate(parts, start=1)]
    return [number for number, part in zip(numbers, parts, strict=True) for _ in range(len(part))]


def draw(config: DataConfig, sources: Sequence[Source], every: Rows, rows: Rows, seed: int) -> Rows:
    """Return which of the training rows an epoch takes, see ``draw_rows``; ``every`` are all rows of ``data.path``.

    Raises:
        DataError: ``data.oversample`` is no column of labels.
    """
    weights = [source.weight for source in sources] or [1.0]
    is_limited = config.limit is not None and config.limit < len(rows)
    if weights == [1] and config.oversample is None and not is_limited:
        return rows
    labels = None
    if config.oversample is not None:
        check_labels([note.label for note in every.notes()], config.oversample)
        labels = [note.label for note in rows.notes()]
        if len(set(labels)) < 2:
            log.warning("data.oversample: all training rows have the label %s, so none is taken more often", labels[0])
    of_source = rows.of_store.tolist()
    drawn = np.asarray(draw_rows(of_source, weights, labels, config.limit, seed), np.int64)
    taken = rows.take(drawn)
    for number, source in enumerate(sources):
        log.info(
            "%s: an epoch takes %d rows of %d (weight %g)", source.name,
            np.count_nonzero(taken.of_store == number), of_source.count(number), source.weight,
        )  # fmt: skip
    return taken


def check_groups(config: DataConfig, rows: Rows, held_out: Rows, part: str, columns: Sequence[str]) -> None:
    """Check that no row of a separate validation or test set belongs to a group of other rows.

    ``rows`` are those of ``data.path`` and, for a test set, those of a separate validation set. ``columns`` are those
    of the files of ``held_out``, for messages.

    Raises:
        DataError: some do, or lack the column; names the first.
    """
    if config.group_by is None:
        return
    of_rows = [note.group for note in held_out.notes()]
    groups = column_of(of_rows, held_out.origin, config.group_by, "data.group_by", columns)
    known: dict[str | None, int] = {}
    for at, note in enumerate(rows.notes()):
        known.setdefault(note.group, at)
    if both := [at for at, group in enumerate(groups) if group in known]:
        first = both[0]
        raise DataError(
            f"{len(both)} of {len(held_out)} {part} rows have a {config.group_by} (data.group_by) that other rows have "
            f"as well; the first is {held_out.origin(first)}, which has that of {rows.origin(known[groups[first]])}. "
            "Take them out of one of the two, or hold out a fraction"
        )


def check_overlaps(config: DataConfig, train: Rows, validation: Rows, test: Rows) -> None:
    """Log training rows among validation rows that were drawn.

    Different long texts may have a part in common, which is logged too where test rows were drawn.

    Raises:
        DataError: a separate validation set has some, or test rows are training or validation rows; or rows of a
            separate set come from the same rows of a file as others.
    """
    if overlap := _overlap(train, validation, "training", "validation"):
        if isinstance(config.validation, float):
            log.warning("%s; the validation loss is in part that of rows that are trained on", overlap)
        else:
            raise DataError(
                f"{overlap}; their loss says nothing about rows that the model has not seen. Take them out of one of "
                "the two, name another data.validation or data.validation_split, or hold out a fraction"
            )
    for other, name in ((train, "training"), (validation, "validation")):
        if overlap := _overlap(other, test, name, "test"):
            if (config.folds is None and not isinstance(config.test, float)) or not test.are_cut:
                raise DataError(f"{overlap}; a test says nothing then. Take them out of one of the two")
            log.warning(
                "%s, as parts of different texts; the test loss is in part that of rows that are known", overlap
            )
    if not isinstance(config.validation, float):
        _check_files(train, validation, "training", "validation")
    if config.folds is None and not isinstance(config.test, float):
        _check_files(train, test, "training", "test")
        _check_files(validation, test, "validation", "test")


def _check_files(known: Rows, held_out: Rows, known_name: str, name: str) -> None:
    """Raise DataError if rows of a separate set come from rows of a file that are known, by another task."""
    if (found := source_rows(known, held_out)) is None:
        return
    if len(both := np.flatnonzero(np.isin(found[1], found[0]))):
        raise DataError(
            f"{len(both)} of {len(held_out)} {name} rows come from a row of a file that is a {known_name} row as well, "
            f"read by another task (the first is {held_out.origin(int(both[0]))}); what is learned of it says much of "
            "the other. Name other rows, or hold out a fraction, which keeps such rows together"
        )


def _overlap(known: Rows, held_out: Rows, known_name: str, name: str) -> str | None:
    """Describe how many held-out rows have the tokens of a row of ``known``; None if there are none."""
    shared = shared_rows(known, held_out)
    if not len(shared):
        return None
    first = int(shared[0])
    same = np.flatnonzero((known.keys == held_out.keys[first]).all(axis=1))[-1]
    return (
        f"{len(shared)} of {len(held_out)} {name} rows are {known_name} rows as well "
        f"({held_out.origin(first)} is {known.origin(int(same))})"
    )
