"""The file of a token store: columns of numbers in one file, appended row by row and read as a memory map.

    ids of all rows · the other columns · footer (JSON: where each column is, checksums) · length of the footer · MAGIC

The footer comes last, so a file whose end was not written is recognised. Ids are checked in blocks of 1 MiB, each on
its first use; all other columns and the footer when the file is opened.
"""

from __future__ import annotations

import json
import struct
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from typing_extensions import Buffer

from toolkit.data.examples import Example
from toolkit.data.row_notes import RowNote
from toolkit.data.sample_key import sample_key

MAGIC = b"FROSTTK2"
"""Last bytes of the file; the digit is the version of the format."""
BLOCK = 1 << 20
"""Bytes of ids under one checksum."""
DIGEST_BYTES = 16
"""Bytes kept of the SHA-256 of a row's content."""
SHORTENED, REASONS, NORMALISED, IDENTIFIERS, CONTINUES, HIDES_TOOLS = 1, 2, 4, 8, 16, 32
"""Bits of a row's flags."""

COLUMNS: dict[str, tuple[str, int]] = {
    "ids": ("<i4", 1), "ends": ("<i8", 1), "span_ends": ("<i8", 1), "spans": ("<i4", 2), "keys": ("u1", 32),
    "digests": ("u1", DIGEST_BYTES), "largest": ("<i4", 1), "flags": ("u1", 1), "controls": ("<i4", 1),
    "heads": ("<i4", 1), "numbers": ("<i8", 1), "tails": ("u1", 1), "note_ends": ("<i8", 1), "notes": ("u1", 1),
}  # fmt: skip
"""Type and width of each column. ``ends``, ``span_ends`` and ``note_ends`` say where a row's ids, spans and notes
end; ``heads`` is the number of the text before a row's number in its origin (``answers.jsonl line ``); a negative
number n is no number but a text that begins at byte -n-1 of ``tails``."""

_TRAILER = struct.Struct("<QI8s")
"""Length of the footer, its CRC-32, MAGIC."""


class DamagedStoreError(Exception):
    """A token store is torn, damaged or of another format; it has to be built again."""


@dataclass
class EncodedRows:
    """A number of rows as columns, and the rows among them that cannot be used; made by a worker process too."""

    columns: dict[str, np.ndarray]
    """ids, spans, keys, digests, largest, flags, as in ``COLUMNS``; ``lengths`` and ``span_counts`` of each row."""
    origins: list[str]
    controls: dict[int, str]
    """First control token in the text of a row, by the row's number among these."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Origin and fault of rows that cannot be used."""
    notes: list[bytes] = field(default_factory=list)
    """``RowNote`` of each row as JSON, empty where there is nothing to note; an empty list if no row has one."""

    @property
    def read(self) -> int:
        """Number of examples and unusable rows."""
        return len(self.origins) + len(self.bad)

    @classmethod
    def of(
        cls, examples: Sequence[Example], bad: Sequence[tuple[str, str]] = (), notes: Sequence[RowNote] = ()
    ) -> EncodedRows:
        """Lay examples out as columns."""
        lengths = np.array([len(example) for example in examples], "<i4")
        spans = [span for example in examples for span in example.spans]
        ids = np.fromiter((token for row in examples for token in row.token_ids), "<i4", int(lengths.sum()))
        keys = b"".join(bytes.fromhex(sample_key(example.token_ids)) for example in examples)
        columns = {
            "ids": ids,
            "lengths": lengths,
            "span_counts": np.array([len(example.spans) for example in examples], "<i4"),
            "spans": np.array(spans, "<i4").reshape(-1, 2),
            "keys": np.frombuffer(keys, "u1").reshape(-1, 32),
            "digests": np.frombuffer(b"".join(map(_digest, examples)), "u1").reshape(-1, DIGEST_BYTES),
            "largest": np.array([max(example.token_ids, default=0) for example in examples], "<i4"),
            "flags": np.array([_flags(example) for example in examples], "u1"),
        }
        if notes:
            noted = [IDENTIFIERS * bool(note.identifiers) | CONTINUES * note.continues for note in notes]
            columns["flags"] |= np.array(noted, "u1")
        kept = [note.to_json() for note in notes]
        controls = {at: example.control_token for at, example in enumerate(examples) if example.control_token}
        return cls(columns, [example.origin for example in examples], controls, list(bad), kept)


class StoreWriter:
    """Append rows to a file, then finish it. A context manager that drops its temporary files.

    Nothing that grows with the number of rows is held in memory. ``folder`` takes the temporary files.
    """

    def __init__(self, file: IO[bytes], folder: Path | None = None) -> None:
        self._file = file
        names = [*(name for name in COLUMNS if name != "ids"), "bad"]
        self._parts = {name: tempfile.TemporaryFile(dir=folder) for name in names}  # noqa: SIM115 - see __exit__
        self._ends = {"ids": 0, "spans": 0, "notes": 0, "tails": 0}
        self._blocks: list[int] = []  # CRC-32 of each full block
        self._block, self._block_bytes = 0, 0
        self._heads: dict[str, int] = {}
        self._controls: dict[str, int] = {"": 0}
        self.rows = self.bad_rows = 0
        self.columns: list[str] = []
        """Columns of the source's first rows."""

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in self._parts.values():
            part.close()

    def append(self, rows: EncodedRows) -> None:
        """Append rows; OSError if the disk is full."""
        columns = dict(rows.columns)
        self._append_ids(columns.pop("ids"))
        columns["notes"] = np.frombuffer(b"".join(rows.notes), "u1")
        columns["note_counts"] = np.array(list(map(len, rows.notes)) or [0] * len(rows.origins), "<i8")
        for lengths, ends, of in (
            ("lengths", "ends", "ids"), ("span_counts", "span_ends", "spans"), ("note_counts", "note_ends", "notes"),
        ):  # fmt: skip
            reached = self._ends[of] + np.cumsum(columns.pop(lengths), dtype="<i8")
            columns[ends] = reached
            self._ends[of] = int(reached[-1]) if len(reached) else self._ends[of]
        controls = np.zeros(len(rows.origins), "<i4")
        for at, control in rows.controls.items():
            controls[at] = self._controls.setdefault(control, len(self._controls))
        columns["controls"] = controls
        columns["heads"], columns["numbers"] = self._split_origins(rows.origins)
        for name, column in columns.items():
            self._parts[name].write(np.ascontiguousarray(column, COLUMNS[name][0]).data)
        for bad in rows.bad:
            self._parts["bad"].write(json.dumps(bad).encode() + b"\n")
        self.rows += len(rows.origins)
        self.bad_rows += len(rows.bad)

    def finish(self) -> None:
        """Write the columns that were kept aside, and the footer."""
        if self._block_bytes:
            self._blocks.append(self._block)
        places: dict[str, Any] = {"ids": [0, 4 * self._ends["ids"], self._blocks]}
        position = places["ids"][1]
        for name, part in self._parts.items():
            position += self._file.write(b"\0" * (-position % 8))
            part.seek(0)
            start, crc = position, 0
            while piece := part.read(BLOCK):
                crc = zlib.crc32(piece, crc)
                position += self._file.write(piece)
            places[name] = [start, position - start, [crc]]
        footer = json.dumps(
            {"rows": self.rows, "bad": self.bad_rows, "places": places, "heads": list(self._heads),
             "controls": list(self._controls), "columns": self.columns}
        ).encode()  # fmt: skip
        self._file.write(footer + _TRAILER.pack(len(footer), zlib.crc32(footer), MAGIC))
        self._file.flush()

    def _append_ids(self, ids: np.ndarray) -> None:
        """Write ids, and sum up each block of them."""
        content = np.ascontiguousarray(ids, "<i4").data.cast("B")
        self._file.write(content)
        while content:
            piece = content[: BLOCK - self._block_bytes]
            self._block = zlib.crc32(piece, self._block)
            self._block_bytes += len(piece)
            if self._block_bytes == BLOCK:
                self._blocks.append(self._block)
                self._block = self._block_bytes = 0
            content = content[len(piece) :]

    def _split_origins(self, origins: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Split each origin behind its last blank into a text that many rows share, and a number or other text."""
        heads, numbers = np.empty(len(origins), "<i4"), np.empty(len(origins), "<i8")
        for at, origin in enumerate(origins):
            cut = origin.rfind(" ") + 1
            head, tail = origin[:cut], origin[cut:]
            heads[at] = self._heads.setdefault(head, len(self._heads))
            if tail.isascii() and tail.isdigit() and len(tail) < 19 and (tail == "0" or tail[0] != "0"):
                numbers[at] = int(tail)
            else:
                content = tail.encode("utf-8", "surrogatepass")
                numbers[at] = -1 - self._ends["tails"]
                self._ends["tails"] += self._parts["tails"].write(struct.pack("<I", len(content)) + content)
        return heads, numbers


@dataclass(frozen=True)
class StoreContent:
    """The parsed file of a token store."""

    columns: dict[str, np.ndarray]
    blocks: tuple[int, ...]
    """CRC-32 of each block of ids."""
    rows: int
    heads: list[str]
    controls: list[str]
    bad: tuple[tuple[str, str], ...]
    source_columns: list[str]
    """Columns of the source's first rows."""
    sha256: str
    """SHA-256 of the footer, which holds the checksum of every part: the same for the same content."""


def parse(buffer: Buffer) -> StoreContent:
    """Find the columns in a file; all but the ids are compared with their checksums.

    Raises:
        DamagedStoreError: torn, damaged, or written in another format.
    """
    view = memoryview(buffer).cast("B")
    footer_end = len(view) - _TRAILER.size
    if footer_end < 0:
        raise DamagedStoreError("it is too short")
    length, crc, magic = _TRAILER.unpack(view[footer_end:])
    if magic != MAGIC or length > footer_end:
        raise DamagedStoreError("its end is missing")
    footer_bytes = bytes(view[footer_end - length : footer_end])
    if zlib.crc32(footer_bytes) != crc:
        raise DamagedStoreError("its footer does not give its checksum")
    footer = json.loads(footer_bytes)
    columns, content = {}, b""
    for name, (start, size, crcs) in footer["places"].items():
        piece = view[start : start + size]
        if len(piece) != size or (name != "ids" and zlib.crc32(piece) != crcs[0]):
            raise DamagedStoreError(f"its {name} do not give their checksum")
        if name == "bad":
            content = bytes(piece)
            continue
        dtype, width = COLUMNS[name]
        column = np.frombuffer(piece, dtype)
        columns[name] = column.reshape(-1, width) if width > 1 else column
    bad = tuple((origin, fault) for origin, fault in map(json.loads, content.decode().splitlines()))
    blocks = tuple(footer["places"]["ids"][2])
    return StoreContent(
        columns, blocks, footer["rows"], footer["heads"], footer["controls"], bad, footer["columns"],
        sha256(footer_bytes).hexdigest(),
    )  # fmt: skip


def _flags(example: Example) -> int:
    of_text = SHORTENED * example.shortened | NORMALISED * example.normalised
    return of_text | REASONS * example.reasons | HIDES_TOOLS * example.hides_tools


def _digest(example: Example) -> bytes:
    """Return the first bytes of the SHA-256 of a row's content."""
    return sha256(example.content).digest()[:DIGEST_BYTES]
