"""Read a token store: the encoded rows of one data source, mapped into memory and shared by all that map it.

A row is an ``Example`` only while it is asked for; what is asked of all rows (lengths, keys) is an array.
"""

from __future__ import annotations

import mmap
import struct
import threading
import zlib
from contextlib import suppress
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
from typing_extensions import Buffer

from toolkit.data.examples import Example
from toolkit.data.token_file import (
    BLOCK,
    HIDES_TOOLS,
    NORMALISED,
    REASONS,
    SHORTENED,
    DamagedStoreError,
    EncodedRows,
    StoreWriter,
    parse,
)
from toolkit.runtime.errors import DataError

_EAGER_BYTES = 256 << 20
"""Most bytes of ids that are compared with their checksums when the file is opened, about 0.2 s; the blocks of a larger
file are compared when their first row is read."""


class TokenStore:
    """Encoded rows, read-only; any number of processes and threads may use one.

    Raises:
        DamagedStoreError: ``buffer`` is no whole token store.
    """

    def __init__(self, buffer: Buffer, path: Path | None = None) -> None:
        self.path = path
        """The file; None for one without a name."""
        self.edition = ""
        """Configuration and revision of a Hub data set that the rows are of, which their origins do not name."""
        self._content = parse(buffer)
        columns = self._content.columns
        self.ids: np.ndarray = columns["ids"]
        """[tokens] int32, all rows one after the other."""
        self.keys: np.ndarray = columns["keys"]
        """[rows, 32] uint8: ``sample_key`` of each row."""
        self.digests: np.ndarray = columns["digests"]
        """[rows, 16] uint8: beginning of the SHA-256 of each row's ``content``."""
        self.largest: np.ndarray = columns["largest"]
        """[rows] largest token id of each row."""
        self.flags: np.ndarray = columns["flags"]
        """[rows] Bits such as ``SHORTENED``; see ``toolkit.data.token_file``."""
        self.controls: np.ndarray = columns["controls"]
        """[rows] number of the first control token in a row's text; 0 if there is none."""
        self._ends, self._span_ends, self._spans = columns["ends"], columns["span_ends"], columns["spans"]
        self._is_checked = np.zeros(len(self._content.blocks), bool)
        self._lock = threading.Lock()
        if self.ids.nbytes <= _EAGER_BYTES and not self._check_blocks(0, len(self._is_checked)):
            raise DamagedStoreError("its ids do not give their checksum")

    def __len__(self) -> int:
        return self._content.rows

    @property
    def bad(self) -> tuple[tuple[str, str], ...]:
        """Origin and fault of the rows of the source that cannot be used."""
        return self._content.bad

    @property
    def source_columns(self) -> list[str]:
        """Columns of the source's first rows."""
        return self._content.source_columns

    @property
    def heads(self) -> list[str]:
        """Texts before a row's number in its origin, ``answers.jsonl line ``."""
        return self._content.heads

    @property
    def origin_columns(self) -> tuple[np.ndarray, np.ndarray]:
        """[rows] number in ``heads``, and [rows] the number after it; below 0 where other text is there."""
        return self._content.columns["heads"], self._content.columns["numbers"]

    @property
    def sha256(self) -> str:
        """SHA-256 that is the same for stores of the same content."""
        return self._content.sha256

    @cached_property
    def lengths(self) -> np.ndarray:
        """[rows] int64 tokens of each row."""
        return np.diff(self._ends, prepend=0)

    @cached_property
    def supervised(self) -> np.ndarray:
        """[rows] int64 supervised tokens of each row."""
        totals = np.concatenate([[0], np.cumsum(self._spans[:, 1] - self._spans[:, 0], dtype=np.int64)])
        return np.diff(totals[self._span_ends], prepend=0)

    def example(self, row: int) -> Example:
        """Make the example of a row.

        Raises:
            DataError: the file was damaged since it was opened; it is removed.
        """
        start, end = (int(self._ends[row - 1]) if row else 0), int(self._ends[row])
        if not self._check_blocks(start * 4 // BLOCK, -(-end * 4 // BLOCK)):
            if self.path is not None:
                with suppress(OSError):
                    self.path.unlink()
            raise DataError(
                f"the token store {self.path} is damaged, and is removed now; start the same command again, which "
                "tokenises the rows anew"
            )
        spans = self._spans[int(self._span_ends[row - 1]) if row else 0 : int(self._span_ends[row])]
        return Example(
            tuple(self.ids[start:end].tolist()),
            tuple((first, last) for first, last in spans.tolist()),
            shortened=bool(self.flags[row] & SHORTENED),
            origin=self.origin(row),
            reasons=bool(self.flags[row] & REASONS),
            control_token=self._content.controls[self.controls[row]],
            normalised=bool(self.flags[row] & NORMALISED),
            hides_tools=bool(self.flags[row] & HIDES_TOOLS),
        )

    def origin(self, row: int) -> str:
        """Return file and row, for messages."""
        heads, numbers = self.origin_columns
        head, number = self.heads[int(heads[row])], int(numbers[row])
        if number >= 0:
            return f"{head}{number}"
        tails, start = self._content.columns["tails"], -1 - number
        (size,) = struct.unpack("<I", bytes(tails[start : start + 4]))
        return head + bytes(tails[start + 4 : start + 4 + size]).decode("utf-8", "surrogatepass")

    def note(self, row: int) -> bytes:
        """Return the ``RowNote`` of a row as JSON; empty if there is nothing to note."""
        ends = self._content.columns["note_ends"]
        return bytes(self._content.columns["notes"][int(ends[row - 1]) if row else 0 : int(ends[row])])

    def _check_blocks(self, first: int, end: int) -> bool:
        """Compare blocks of ids with their checksums, each once; return False if one differs."""
        if self._is_checked[first:end].all():
            return True
        view = self.ids.data.cast("B")
        with self._lock:
            for block in range(first, end):
                if not self._is_checked[block]:
                    if zlib.crc32(view[block * BLOCK : (block + 1) * BLOCK]) != self._content.blocks[block]:
                        return False
                    self._is_checked[block] = True
        return True


def map_store(file: IO[bytes], path: Path | None = None) -> TokenStore:
    """Map an open file as a token store; the file may be closed and removed afterwards.

    Raises:
        DamagedStoreError: it is no whole token store.
        OSError: it cannot be mapped.
    """
    try:
        return TokenStore(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path)
    except ValueError as error:  # an empty file
        raise DamagedStoreError(str(error)) from None


def store_in_memory(rows: EncodedRows) -> TokenStore:
    """Return a store of a few rows, without a file."""
    file = BytesIO()
    with StoreWriter(file) as writer:
        writer.append(rows)
        writer.finish()
    return TokenStore(file.getvalue())
