"""Rows of Parquet and Arrow files, and of directories that ``Dataset.save_to_disk`` wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from toolkit.data.readers.class_names import decoders_of, features_of
from toolkit.data.readers.content import Content
from toolkit.data.readers.row import ReadOptions, Row, make_row, plain_value, without_filled
from toolkit.runtime.errors import DataError

_BATCH_ROWS = 256
"""Rows that become Python values at once."""

DISK_SPLITS, DISK_STATE = "dataset_dict.json", "state.json"
"""Files that ``save_to_disk`` writes: the splits of a set of them, the files of a single one."""


def read_parquet(content: Content, _: ReadOptions) -> Iterator[Row]:
    """Yield the rows of a Parquet file; DataError if it cannot be read or a text column is not UTF-8."""
    import pyarrow.parquet

    with content.seekable() as stream:
        yield from _rows(
            content.label, "Parquet", lambda: pyarrow.parquet.ParquetFile(stream).iter_batches(_BATCH_ROWS)
        )


def read_arrow(content: Content, _: ReadOptions) -> Iterator[Row]:
    """Yield the rows of an Arrow file, of the file format (also Feather's) or the stream format; DataError as above."""
    with content.seekable() as stream:
        yield from _rows(content.label, "Arrow", lambda: _arrow_batches(stream))


def read_saved(directory: Path, label: str) -> Iterator[Row]:
    """Yield the rows of a directory that ``Dataset.save_to_disk`` wrote; DataError if it cannot be read."""
    yield from set_rows(label, _saved_table(directory, label))


def set_rows(label: str, table: Any) -> Iterator[Row]:
    """Yield the rows of a ``datasets.Dataset``, with the names of its classes; DataError if a value cannot be read."""
    batches = partial(table.with_format("arrow").iter, _BATCH_ROWS)
    yield from _rows(label, "Arrow", batches, table.features.to_dict())


def _saved_table(directory: Path, label: str) -> Any:
    """Return the data set that ``save_to_disk`` wrote into a directory, as plain values."""
    from datasets import load_from_disk

    try:
        return load_from_disk(str(directory))
    except Exception as error:  # datasets and pyarrow raise what they meet first
        raise DataError(
            f"{label}: not a readable directory of Dataset.save_to_disk ({type(error).__name__}: {str(error)[:200]}); "
            "save it again, or name its .arrow files"
        ) from None


def _arrow_batches(stream: Any) -> Iterator[Any]:
    """Yield the record batches of an open Arrow file, in parts of a few rows."""
    import pyarrow

    source = pyarrow.PythonFile(stream, mode="r")
    if stream.read(6) == b"ARROW1":
        stream.seek(0)
        reader = pyarrow.ipc.open_file(source)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        stream.seek(0)
        batches = iter(pyarrow.ipc.open_stream(source))
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            yield batch.slice(start, _BATCH_ROWS)


def _rows(
    label: str, form: str, open_batches: Callable[[], Iterable[Any]], features: Mapping[str, Any] | None = None
) -> Iterator[Row]:
    """Yield the rows of record batches.

    Without ``features``, as ``datasets`` notes them, those of the batches' own schema count.
    """
    import pyarrow

    number, decoders = 0, None if features is None else decoders_of(features)
    try:
        for batch in open_batches():
            names = batch.schema.names
            if repeated := [name for name in names if names.count(name) > 1]:
                raise DataError(f"{label}: names the column {repeated[0]} more than once; keep one of each name")
            if decoders is None:
                decoders = decoders_of(features_of(batch.schema))
            for values in _python_values(batch, label):
                number += 1
                values = plain_value(values)
                values |= {name: decode(values[name]) for name, decode in decoders.items() if name in values}
                yield make_row(f"{label} row {number}", without_filled(values))
    except UnicodeDecodeError as error:
        raise DataError(f"{label}: a text column is not UTF-8 ({error}); save the file as UTF-8") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{label}: not a readable {form} file ({error}); save it again") from None


def _python_values(batch: Any, label: str) -> list[dict[str, Any]]:
    """Return the rows of a record batch; DataError names the column of a value that Python cannot hold."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        raise
    except (OverflowError, ValueError):  # such as a date after the year 9999, or two fields of one name in an object
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                column.to_pylist()
            except (OverflowError, ValueError) as error:
                raise DataError(
                    f"{label}: the column {name} has a value of type {column.type} that cannot be read ({error}); "
                    "remove the column, or save it as text"
                ) from None
        raise
