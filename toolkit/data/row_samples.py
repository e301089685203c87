"""Read again, as texts, the rows that a data set's examples come from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolkit.config.data_schema import DataConfig
from toolkit.data.readers.row import ID_COLUMNS
from toolkit.data.retrieval import passages_for
from toolkit.data.row_notes import RowNoter
from toolkit.data.rows import Rows
from toolkit.data.sources import Row, Source, iter_rows
from toolkit.data.tokenising import source_columns
from toolkit.runtime.errors import DataError
from toolkit.tasks.choose import find_task
from toolkit.tasks.sample import RowFaultError, Sample
from toolkit.tasks.task import Task


def row_ids(origin: str, values: Any) -> list[str]:
    """Return the keys by which a list of ids may name a row: its key in a JSON object, its id columns."""
    found = re.findall(r" key (\S+)$", origin)
    columns = values.items() if isinstance(values, Mapping) else ()
    return [*found, *(str(value) for name, value in columns if str(name).lower() in ID_COLUMNS)]


@dataclass(frozen=True)
class RowSample:
    """A row of the data as texts."""

    origin: str
    """File and row, for messages."""
    sample: Sample
    task: Task
    """By which the row was read."""
    group: str | None = None
    """Digest of its value of ``data.group_by``; None without one."""
    values: Any = field(default=None, repr=False, compare=False)
    """Its columns, with identifiers masked where those of the examples are."""

    @property
    def id(self) -> str:
        """Return the key by which a list of ids names the row; file and row where it has none."""
        return next(iter(row_ids(self.origin, self.values)), self.origin)


def read_samples(sources: Sequence[Source], config: DataConfig, *parts: Rows) -> list[list[RowSample]]:
    """Read the rows of which ``parts`` hold the examples; return those of each part in its order, each row once.

    Args:
        sources: what was read, one for each token store of the parts, in their order.
        config: the data section by which it was read.
        parts: examples.

    Raises:
        DataError: a source cannot be read, or rows that were there are not any more.
    """
    wanted = [_places(part) for part in parts]
    every = set().union(*wanted)
    found: dict[tuple[int, str], RowSample] = {}
    config = config.model_copy(update={"oversample": None, "stratify_by": None})  # other files may lack these columns
    noter = RowNoter(config)
    for number, source in enumerate(sources):
        columns, rows = source_columns(iter_rows(source))
        own = config if source.task is None else config.model_copy(update={"task": source.task})
        task = find_task(own, columns, origin=source.name, key=source.task_key)
        with_passages = passages_for(config, task)
        for row in rows:
            place = number, noter.origin(row.origin)
            if place in every and row.fault is None:
                found[place] = _read(row, place[1], task, noter, with_passages)
    if missing := [origin for number, origin in every if (number, origin) not in found]:
        raise DataError(f"{min(missing)} and {len(missing) - 1} more rows are not there any more; restore their file")
    return [[found[place] for place in places] for places in wanted]


def _places(part: Rows) -> dict[tuple[int, str], None]:
    """Return number of the source and origin of each row of a part, once each, in order."""
    return dict.fromkeys((int(part.of_store[at]), part.origin(at)) for at in range(len(part)))


def _read(
    row: Row, origin: str, task: Task, noter: RowNoter, with_passages: Callable[[Any], Any]
) -> RowSample:  # fmt: skip
    values, identifiers = noter.masked(row.values)
    try:
        values = with_passages(values)
        sample = task.read(values)
    except RowFaultError as fault:
        raise DataError(f"{origin} {noter.fault(str(fault))}; it could be read before: restore its file") from None
    return RowSample(origin, sample, task, noter.note(row.values, identifiers).group, values)
