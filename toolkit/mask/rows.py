"""Rows of tables that train beside the frozen table: which rows, and the tensors that hold them. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from toolkit.config.mask_schema import RowsConfig
from toolkit.mask.selectors import resolve_selectors
from toolkit.models.anatomy import Anatomy
from toolkit.runtime.errors import MaskError


@dataclass(frozen=True)
class TableRows:
    """Rows of one table that train, as a tensor of their own beside it."""

    table: str
    """Name of the table's weight, [rows, hidden_size]."""
    spans: tuple[tuple[int, int], ...]
    """The rows, ascending and without repeats: each span's first row and the one after its last."""

    @staticmethod
    def from_dict(values: dict[str, Any]) -> TableRows:
        """Restore rows from their ``dataclasses.asdict``."""
        return TableRows(values["table"], tuple((first, stop) for first, stop in values["spans"]))

    @property
    def ids(self) -> tuple[int, ...]:
        """Numbers of the rows, ascending."""
        return tuple(chain.from_iterable(range(first, stop) for first, stop in self.spans))

    @property
    def count(self) -> int:
        """Number of rows."""
        return sum(stop - first for first, stop in self.spans)

    @property
    def name(self) -> str:
        """Name of the tensor that trains, [count, hidden_size]; no two of one table begin with the same row."""
        return f"{self.table.rpartition('.')[0]}.rows_{self.spans[0][0]}"


def is_rows_tensor(name: str) -> bool:
    """Return True for the name of a ``TableRows``."""
    return re.search(r"\.rows_[0-9]+$", name) is not None


def table_of_rows(name: str) -> str:
    """Return the table's weight that a tensor of rows stands beside; the name of any other tensor as it is."""
    return re.sub(r"\.rows_[0-9]+$", ".weight", name)


def select_tables(config: RowsConfig, frozen: frozenset[str], anatomy: Anatomy) -> frozenset[str]:
    """Return the weights of the tables that a ``rows`` entry selects, under the names by which it selects them.

    Args:
        config: the entry.
        frozen: tensors that ``mask.freeze`` keeps frozen, all of their rows included.
        anatomy: parts and tensors of the model.

    Raises:
        MaskError: a selector is invalid (see ``resolve_selectors``), selects no table, or all are frozen.
    """
    tables = {f"{anatomy.token_table}.weight", f"{anatomy.head}.weight"} & anatomy.by_name.keys()
    selected: set[str] = set()
    for selector in config.select:
        found = resolve_selectors([selector], anatomy) & tables
        if not found:
            raise MaskError(
                f"mask.train: rows.select has {selector!r}, which selects no table with one row for each token; "
                f"expected embeddings or head, whose tables here are {' and '.join(sorted(tables))}"
            )
        selected |= found
    if selected <= frozen:
        raise MaskError(f"mask.freeze takes away all tables that rows selects ({', '.join(sorted(selected))})")
    return frozenset(selected - frozen)


def resolve_rows(config: RowsConfig, table: str, anatomy: Anatomy) -> TableRows:
    """Return the rows of ``table`` that a ``rows`` entry names.

    Raises:
        MaskError: the table has no such row, or no tokens were added.
    """
    length = anatomy.by_name[table].shape[0]
    if config.ids is not None:
        return TableRows(table, _spans(_within(config.ids, "rows.ids", table, length)))
    if config.from_ == "added":
        if not anatomy.added:
            raise MaskError(
                'mask.train: rows.from is added, but no tokens are; expected model.add_tokens: ["<new>"], or the '
                "number of a row"
            )
        return TableRows(table, _spans(_within(anatomy.added, "rows.from", table, length)))
    assert config.from_ is not None  # the schema requires one of the two
    _within([config.from_], "rows.from", table, length)
    last = length - 1 if config.to is None else config.to
    _within([last], "rows.to", table, length)
    return TableRows(table, ((config.from_, last + 1),))


def _within(ids: Sequence[int], key: str, table: str, length: int) -> Sequence[int]:
    """Return ``ids``; raise MaskError if one lies beyond the table."""
    if max(ids) >= length:
        raise MaskError(
            f"mask.train: {key} is {max(ids)}, but {table} has {length:,} rows, 0 to {length - 1}; expected one of "
            "them. New tokens get rows by model.add_tokens"
        )
    return ids


def _spans(ids: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return spans of ``TableRows`` that hold ``ids``."""
    spans: list[tuple[int, int]] = []
    for row in sorted(set(ids)):
        if spans and spans[-1][1] == row:
            spans[-1] = (spans[-1][0], row + 1)
        else:
            spans.append((row, row + 1))
    return tuple(spans)


def refuse_shared_rows(rows: Sequence[TableRows], whole: Iterable[str]) -> None:
    """Raise MaskError if two of ``rows`` share a row, or a table of them is among the ``whole`` tensors."""
    all_whole = frozenset(whole)
    seen: dict[tuple[str, int], TableRows] = {}
    for own in rows:
        if own.table in all_whole:
            raise MaskError(
                f"mask.train trains {own.table} whole and some of its rows; expected one of the two: take the table "
                "out of the selectors, or leave out the entry of rows"
            )
        for row in own.ids:
            if seen.setdefault((own.table, row), own) is not own:
                raise MaskError(
                    f"two rows entries of mask.train train row {row} of {own.table}; expected one entry a row: let "
                    "their from, to and ids not overlap"
                )


def union_of_rows(rows: Iterable[TableRows], whole: Iterable[str]) -> tuple[TableRows, ...]:
    """Return the rows of all phases; ``whole`` are the tensors that any phase trains whole.

    Raises:
        MaskError: two phases train other rows of a table that overlap, or one trains rows and another the table.
    """
    distinct = tuple(dict.fromkeys(rows))
    try:
        refuse_shared_rows(distinct, whole)
    except MaskError as error:
        raise MaskError(f"{error}. In mask.schedule a row belongs to the same entry in all phases") from None
    return distinct
