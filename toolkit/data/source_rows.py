"""Tell which examples come from one row of one file, whatever source and task they were read by."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import numpy as np

from toolkit.data.rows import Rows
from toolkit.data.token_store import TokenStore
from toolkit.runtime.paths import is_directory, is_file


def source_rows(*parts: Rows) -> list[np.ndarray] | None:
    """Number the rows of files; return for each part the number of the row that each of its examples comes from.

    A file is one however its path is written. None if no two stores of the parts have a file in common: then no row is
    read twice.
    """
    stores = {id(store): store for part in parts for store in part.stores}
    if len(stores) < 2:
        return None
    places = {key: [_place(store, head) for head in store.heads] for key, store in stores.items()}
    read = Counter(place for of_store in places.values() for place in set(of_store))
    if all(count == 1 for count in read.values()):
        return None
    numbers = {place: number for number, place in enumerate(read)}
    texts: dict[str, int] = {}
    keys = []
    for part in parts:
        of_part = np.empty((len(part), 2), np.int64)
        for number, store in enumerate(part.stores):
            mine = part.of_store == number
            of_heads = np.array([numbers[place] for place in places[id(store)]], np.int64)
            of_part[mine] = _keys(store, part.numbers[mine], of_heads, texts)
        keys.append(of_part)
    _, every = np.unique(np.concatenate(keys), axis=0, return_inverse=True)
    return np.split(every.reshape(-1), np.cumsum([len(part) for part in parts])[:-1])


def connected(*labels: Sequence[str]) -> list[str]:
    """Return a label of each row: rows with one value in some of ``labels`` have the same, also by way of others."""
    parent = list(range(len(labels[0])))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    for of_rows in labels:
        first: dict[str, int] = {}
        for row, label in enumerate(of_rows):
            one, other = sorted((root(row), root(first.setdefault(label, row))))
            parent[other] = one
    return [str(root(row)) for row in range(len(parent))]


def _place(store: TokenStore, head: str) -> str:
    """Return the beginning of an origin, ``answers.jsonl line ``, with the file's path in one spelling.

    The path ends at a blank, or at the colon before the name of an archive's member.
    """
    for end in reversed([at for at, letter in enumerate(head) if letter in " :"]):
        if is_file(path := head[:end]) or is_directory(path):
            return os.path.realpath(path) + head[end:]
    return f"{store.edition} {head}"


def _keys(store: TokenStore, rows: np.ndarray, of_heads: np.ndarray, texts: dict[str, int]) -> np.ndarray:
    """Return [rows, 2]: the file, and the number or, below 0, the key of each row in it; ``texts`` numbers the keys."""
    heads, numbers = store.origin_columns
    found = np.stack([of_heads[heads[rows]], numbers[rows]], axis=1)
    for at in np.flatnonzero(found[:, 1] < 0).tolist():
        tail = store.origin(int(rows[at])).removeprefix(store.heads[int(heads[rows[at]])])
        found[at, 1] = -1 - texts.setdefault(tail, len(texts))
    return found
