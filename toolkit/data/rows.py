"""The rows of a run as a sequence of examples that are made when asked for, and as arrays over all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import overload

import numpy as np

from toolkit.data.examples import Example
from toolkit.data.row_notes import RowNote
from toolkit.data.token_file import CONTINUES, HIDES_TOOLS, IDENTIFIERS, NORMALISED, REASONS, SHORTENED, EncodedRows
from toolkit.data.token_store import TokenStore, store_in_memory


class Rows(Sequence[Example]):
    """Rows of one or more token stores, in any order; a slice or a sum of rows is rows.

    ``numbers`` is [rows] int64, each row's number in its store; ``of_store`` [rows] uint16, the number of that store,
    None if there is one store.
    """

    def __init__(self, stores: Sequence[TokenStore], numbers: np.ndarray, of_store: np.ndarray | None = None) -> None:
        self.stores = tuple(stores)
        self.numbers = np.asarray(numbers, np.int64)
        self.of_store = np.zeros(len(numbers), np.uint16) if of_store is None else of_store

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Rows:
        """Return examples as rows; those that are rows already as they are."""
        if isinstance(examples, Rows):
            return examples
        return cls([store_in_memory(EncodedRows.of(examples))], np.arange(len(examples)))

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> Rows: ...
    def __getitem__(self, at: int | slice) -> Example | Rows:
        if isinstance(at, slice):
            return self.take(at)
        return self.stores[int(self.of_store[at])].example(int(self.numbers[at]))

    def __iter__(self) -> Iterator[Example]:
        return (self[at] for at in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return NotImplemented if not isinstance(other, Sequence) else False
        return bool(np.array_equal(self.digests, Rows.of(other).digests))

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def of_stores(cls, stores: Sequence[TokenStore]) -> Rows:
        """Return all rows of some stores, one store after the other."""
        counts = [len(store) for store in stores]
        numbers = np.concatenate([np.arange(count) for count in counts])
        return cls(stores, numbers, np.repeat(np.arange(len(stores), dtype=np.uint16), counts))

    def __add__(self, other: Rows) -> Rows:
        of_other = other.of_store + np.uint16(len(self.stores))
        numbers = np.concatenate([self.numbers, other.numbers])
        return Rows((*self.stores, *other.stores), numbers, np.concatenate([self.of_store, of_other]))

    def take(self, positions: np.ndarray | slice) -> Rows:
        """Return the rows at these positions, in their order."""
        return Rows(self.stores, self.numbers[positions], self.of_store[positions])

    def origin(self, at: int) -> str:
        """Return file and row of one row, for messages."""
        return self.stores[int(self.of_store[at])].origin(int(self.numbers[at]))

    @property
    def lengths(self) -> np.ndarray:
        """[rows] int64 tokens of each row."""
        return self._gather(lambda store: store.lengths)

    @property
    def supervised(self) -> np.ndarray:
        """[rows] int64 supervised tokens of each row."""
        return self._gather(lambda store: store.supervised)

    @property
    def keys(self) -> np.ndarray:
        """[rows, 32] uint8: ``sample_key`` of each row."""
        return self._gather(lambda store: store.keys)

    @property
    def digests(self) -> np.ndarray:
        """[rows, 16] uint8: beginning of the SHA-256 of each row's ``content``."""
        return self._gather(lambda store: store.digests)

    @property
    def contents(self) -> np.ndarray:
        """[rows] ``digests`` as one value each, which are equal where ids and spans of two rows are."""
        return np.ascontiguousarray(self.digests).view("V16").ravel()

    @property
    def sequences(self) -> np.ndarray:
        """[rows] ``keys`` as one value each, which are equal where the ids of two rows are, whatever is learned."""
        return np.ascontiguousarray(self.keys).view("V32").ravel()

    @property
    def largest_id(self) -> int:
        """Largest token id of all rows."""
        return int(self._gather(lambda store: store.largest).max())

    @property
    def shortened(self) -> int:
        """Number of rows that lost context."""
        return int(self._has(SHORTENED).sum())

    @property
    def reasons(self) -> bool:
        """True if an answer begins with a thought."""
        return bool(self._has(REASONS).any())

    @property
    def with_control_token(self) -> np.ndarray:
        """Positions of the rows whose text holds a control token."""
        return np.flatnonzero(self._gather(lambda store: store.controls))

    @property
    def normalised(self) -> np.ndarray:
        """Positions of the rows with a text that was brought into Unicode's composed form."""
        return np.flatnonzero(self._has(NORMALISED))

    @property
    def with_identifiers(self) -> np.ndarray:
        """Positions of the rows in which personal identifiers were found."""
        return np.flatnonzero(self._has(IDENTIFIERS))

    @property
    def with_hidden_tools(self) -> np.ndarray:
        """Positions of the rows that declare tools which their tokens do not show."""
        return np.flatnonzero(self._has(HIDES_TOOLS))

    @property
    def are_cut(self) -> bool:
        """True if some rows of the data are cut into several examples."""
        return bool(self._has(CONTINUES).any())

    @property
    def row_numbers(self) -> np.ndarray:
        """[rows] number of the row of the data that each example is a part of; ascending, from 1."""
        return np.cumsum(~self._has(CONTINUES))

    def note(self, at: int) -> RowNote:
        """Return what is kept of one row beside its tokens."""
        return RowNote.from_json(self.stores[int(self.of_store[at])].note(int(self.numbers[at])))

    def notes(self) -> Iterator[RowNote]:
        """Yield the note of each row."""
        return (self.note(at) for at in range(len(self)))

    def shortest(self) -> Example:
        """Return the first of the shortest rows."""
        return self[int(np.argmin(self.lengths))]

    def longest_first(self) -> np.ndarray:
        """Return all positions, those of longer rows first, those of equal length in order."""
        return np.argsort(-self.lengths, kind="stable")

    def distinct(self) -> Rows:
        """Return the rows without those whose token ids an earlier row has."""
        return self.take(np.sort(np.unique(self.sequences, return_index=True)[1]))

    def _has(self, flag: int) -> np.ndarray:
        """[rows] bool: whether each row has a flag."""
        has: np.ndarray = (self._gather(lambda store: store.flags) & flag) != 0
        return has

    def _gather(self, column: Callable[[TokenStore], np.ndarray]) -> np.ndarray:
        """Return a column of all rows, from their stores."""
        if len(self.stores) == 1:
            return column(self.stores[0])[self.numbers]
        columns = [column(store) for store in self.stores]
        gathered = np.empty((len(self), *columns[0].shape[1:]), columns[0].dtype)
        for number, of_one_store in enumerate(columns):
            mine = self.of_store == number
            gathered[mine] = of_one_store[self.numbers[mine]]
        return gathered


def shared_rows(train: Rows, validation: Rows) -> np.ndarray:
    """Return the positions of validation rows that have the ids of a training row, whatever is learned of either."""
    if not len(train) or not len(validation):
        return np.empty(0, np.int64)
    distinct, numbers = np.unique(np.concatenate([train.sequences, validation.sequences]), return_inverse=True)
    is_trained = np.zeros(len(distinct), bool)
    is_trained[numbers[: len(train)]] = True
    return np.flatnonzero(is_trained[numbers[len(train) :]])
