"""Rows of Parquet and Arrow files, and of directories that ``Dataset.save_to_disk`` wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    for number, values in enumerate(_saved_table(directory, label).iter(_BATCH_ROWS)):
        names = list(values)
        for at, cells in enumerate(zip(*values.values(), strict=True), start=number * _BATCH_ROWS + 1):
            row = {name: plain_value(cell) for name, cell in zip(names, cells, strict=True)}
            yield make_row(f"{label} row {at}", without_filled(row))


def _saved_table(directory: Path, label: str) -> Any:
    """Return the data set that ``save_to_disk`` wrote into a directory, as plain values."""
    from datasets import load_from_disk

    try:
        return load_from_disk(str(directory)).with_format(None)
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


def _rows(label: str, form: str, open_batches: Any) -> Iterator[Row]:
    """Yield the rows of record batches."""
    import pyarrow

    number = 0
    try:
        for batch in open_batches():
            names = batch.schema.names
            if repeated := [name for name in names if names.count(name) > 1]:
                raise DataError(f"{label}: names the column {repeated[0]} more than once; keep one of each name")
            for values in batch.to_pylist():
                number += 1
                yield make_row(f"{label} row {number}", without_filled(plain_value(values)))
    except UnicodeDecodeError as error:
        raise DataError(f"{label}: a text column is not UTF-8 ({error}); save the file as UTF-8") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{label}: not a readable {form} file ({error}); save it again") from None
