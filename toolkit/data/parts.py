"""Divide the rows of a data set into those to train on, to choose by (validation) and to report on (test)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.config.schema import DataConfig
from toolkit.data.splits import Rows, fold, hold_out
from toolkit.runtime.errors import DataError


@dataclass(frozen=True)
class Parts:
    """Row numbers by what they are for; each row of the data is in exactly one of them."""

    train: Rows
    validation: Rows
    test: Rows


def draw_parts(
    config: DataConfig, seed: int, count: int, groups: Sequence[str] | None, strata: Sequence[str] | None,
    identical: Sequence[str] | None = None,
) -> Parts:  # fmt: skip
    """Divide ``count`` rows as ``config`` says; fractions are of all rows, and test rows are drawn before others.

    ``data.folds`` without ``data.fold`` gives fold 0, as a stand-in for all.

    Args:
        config: the data section.
        seed: ``train.seed``.
        count: number of usable rows of ``data.path``.
        groups: what each row belongs to, as its value of ``data.group_by``.
        strata: the value of ``data.stratify_by`` of each row.
        identical: a key of each row, the same for rows of one group; rows of one key are either all in the test part
            or none is. None, or keys that are all different, changes nothing.

    Raises:
        DataError: the split is impossible.
    """
    kept, validation = np.arange(count), np.empty(0, dtype=np.int64)
    test = validation
    by = "parts and copies of a row" if config.group_by is None else "data.group_by"
    together = groups if identical is None or len(set(identical)) == count else identical
    if config.folds is not None:
        kept, test = fold(count, config.folds, config.fold or 0, seed, together, strata, by)
    elif isinstance(config.test, float):
        kept, test = hold_out(count, config.test, seed, together, strata, "data.test", by)
    if isinstance(config.validation, float):
        share = config.validation if len(kept) == count else config.validation * count / len(kept)
        if share >= 1:
            raise DataError(
                f"data.validation {config.validation:g} of {count} rows leaves none of {len(kept)} to train on"
            )
        of_groups, of_strata = (
            None if column is None else [column[row] for row in kept.tolist()] for column in (groups, strata)
        )
        inner, held_out = hold_out(len(kept), share, seed, of_groups, of_strata, grouped_by=by)
        kept, validation = kept[inner], kept[held_out]
    return Parts(kept, validation, test)


def column_of(
    values: Sequence[str | None], origin: Callable[[int], str], path: str, key: str, columns: Sequence[str]
) -> list[str]:
    """Return the value of a column of each row.

    Args:
        values: value of each row; None where it has none.
        origin: returns file and row of a row, by its number.
        path: name of the column, or a path through nested objects (``meta.patient``).
        key: recipe key that names it, for messages.
        columns: the columns that the rows have.

    Raises:
        DataError: a row has no value there; names the first.
    """
    if missing := [at for at, value in enumerate(values) if value is None]:
        raise DataError(
            f"{key} is {path!r}, and {len(missing)} of {len(values)} rows have no value there; the first is "
            f"{origin(missing[0])}, which has: {', '.join(columns) or 'no columns'}. Expected a column, or a path such "
            "as meta.patient, with a value in every row"
        )
    return [str(value) for value in values]
