"""The bytes of a data file or of a member of an archive, decompressed in a stream, with bounds.

Files come from strangers. What is read never exceeds bounds that this module sets, archives are never unpacked to the
disk, and the names of their members serve messages and the choice of a split alone.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from toolkit.runtime.errors import DataError
from toolkit.runtime.printable import one_line

COMPRESSED = (".gz", ".xz", ".zst", ".bz2")
"""Endings of compressed files; the format's own ending stands before them."""

LOCK_MARK = "~$"
"""How the name of the file begins by which Excel says that a workbook is open."""

_FREE_BYTES = 256 * 2**20
"""What any compressed file may decompress to."""
_MOST_RATIO = 200
"""What a larger one may decompress to, times its own size: rows of text come to 3 to 30."""
_LARGEST_IN_MEMORY = 2**30
"""Largest file within a compressed one that is held in memory, because its format is not read from front to back."""
_MOST_MEMBERS = 10_000
"""Most files of an archive."""
_DEEPEST = 3
"""How many archives and compressed files may lie within each other."""

_LONGEST_SHOWN = 200
"""Most characters of a member's name that messages show, from its end."""
_UTF8_NAME = 0x800
"""Flag of a member of a zip archive whose name is UTF-8; others have no encoding that the archive tells."""
_MAGIC = (
    (re.compile(rb"\x1f\x8b"), ".gz"),
    (re.compile(rb"\xfd7zXZ\0|\x5d\0\0[\0-\xff]{10}"), ".xz"),  # the latter is LZMA, an older form
    (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), ".zst"),  # the latter is a frame that is skipped
    (re.compile(rb"BZh"), ".bz2"),
)
"""First bytes of compressed content."""

_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError)
"""What decompression raises on damaged, truncated, encrypted or unknown content."""


@dataclass(frozen=True)
class Content:
    """Bytes that can be read more than once, from the front."""

    label: str
    """File, and member of the archive, for messages."""
    name: str
    """Path within the directory or archive, without endings of compression; it decides the format of text."""
    open: Callable[[], IO[bytes]]
    """Opens the bytes, decompressed."""
    file: Path
    """The file on the disk that the bytes come from."""
    is_plain: bool = True
    """Whether the bytes are those of ``file``, as it is."""
    depth: int = 0

    @property
    def suffix(self) -> str:
        """Return the ending in lower case, as ``.jsonl``."""
        return PurePosixPath(self.name).suffix.lower()

    @property
    def base_name(self) -> str:
        """Return the name without its folders."""
        return PurePosixPath(self.name).name

    @property
    def shown(self) -> str:
        """Return the name as messages list it, of bounded length."""
        return self.name[-_LONGEST_SHOWN:]

    def head(self, size: int) -> bytes:
        """Return the first ``size`` bytes."""
        with self.open() as stream:
            return stream.read(size)

    def seekable(self) -> IO[bytes]:
        """Open the bytes for reading in any order.

        Raises:
            DataError: they come out of a compressed file and are too many to be held in memory.
        """
        stream = self.open()
        if self.is_plain:
            return stream
        with stream:
            content = stream.read(_LARGEST_IN_MEMORY + 1)
        if len(content) > _LARGEST_IN_MEMORY:
            raise DataError(
                f"{self.label}: decompresses to more than {_LARGEST_IN_MEMORY // 2**30} GiB, and its format is not "
                "read from front to back; unpack it once and name what it holds"
            )
        return io.BytesIO(content)


def open_content(file: Path, label: str, name: str) -> Content:
    """Return the content of a file on the disk, decompressed if it is compressed, whatever its ending says."""
    return _decompressed(Content(label, name, lambda: file.open("rb"), file))


def _decompressed(content: Content) -> Content:
    """Return ``content`` without the compressions around it, by its first bytes."""
    while True:
        head = content.head(16)
        kind = next((kind for magic, kind in _MAGIC if magic.match(head)), None)
        name = content.name
        if name.lower().endswith(COMPRESSED):
            name = str(PurePosixPath(name).with_suffix(""))
        if kind is None:
            return Content(content.label, name, content.open, content.file, content.is_plain, content.depth)
        if content.depth == _DEEPEST:
            raise _too_deep(content.label)
        opened = partial(_open_bounded, content, kind)
        content = Content(content.label, name, opened, content.file, False, content.depth + 1)


def archive_members(content: Content) -> list[Content] | None:
    """Return the members of a zip archive, sorted by name, archives within it unpacked; None if it is none.

    A workbook is a zip archive too, and none here.

    Raises:
        DataError: the archive is damaged, encrypted, or has too many archives within each other.
    """
    if content.suffix not in ("", ".zip") or not content.head(4).startswith(b"PK"):
        return None
    if content.depth == _DEEPEST:
        raise _too_deep(content.label)
    try:
        with content.seekable() as stream, zipfile.ZipFile(stream) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except _DAMAGE as error:
        raise _damaged(content.label, error) from None
    if len(infos) > _MOST_MEMBERS:
        raise DataError(f"{content.label}: holds {len(infos):,} files; expected at most {_MOST_MEMBERS:,}; unpack it")
    if encrypted := [_member_name(info)[-_LONGEST_SHOWN:] for info in infos if info.flag_bits & 1]:
        raise DataError(f"{content.label}: {encrypted[0]} in it is encrypted; unpack the archive and name the files")
    members: list[Content] = []
    for info in sorted(infos, key=_member_name):
        name = _member_name(info)
        label = f"{content.label}:{name[-_LONGEST_SHOWN:]}"
        opened = partial(_open_member, content, info, label)
        member = Content(label, name, opened, content.file, False, content.depth + 1)
        if is_hidden(PurePosixPath(name)):
            continue
        member = _decompressed(member)
        members += archive_members(member) or [member]
    return members


def is_hidden(path: PurePosixPath) -> bool:
    """Return whether a file is none of the user's: a name or folder that begins with a dot or two underscores.

    So is one that begins with ``~$``, which Excel writes beside a workbook as long as that is open.
    """
    return any(part.startswith((".", "__", LOCK_MARK)) and part not in (".", "..") for part in path.parts)


class _Bounded(io.RawIOBase):
    """Decompressed bytes, counted, with damage told as a DataError."""

    def __init__(self, stream: Any, label: str, compressed: int, *beneath: Any) -> None:
        self._stream, self._label, self._beneath = stream, label, beneath
        self._compressed, self._bytes = compressed, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read decompressed bytes into ``buffer``; see ``io.RawIOBase``."""
        try:
            chunk = self._stream.read(len(buffer))
        except _DAMAGE as error:
            raise _damaged(self._label, error) from None
        buffer[: len(chunk)] = chunk
        self._bytes += len(chunk)
        if self._bytes > max(_FREE_BYTES, _MOST_RATIO * self._compressed):
            raise DataError(
                f"{self._label}: decompresses to more than {_MOST_RATIO} times its {self._compressed:,} bytes, as no "
                "rows of text do; if it is what you expect, unpack it once and name what it holds"
            )
        return len(chunk)

    def close(self) -> None:
        """Close the streams beneath as well."""
        if not self.closed:
            for stream in (self._stream, *self._beneath):
                stream.close()
        super().close()


class _KnownArchive(zipfile.ZipFile):
    """A zip archive that is opened for a member whose entry is known: its directory is not read again for each."""

    def _RealGetContents(self) -> None:  # zipfile's own name; another one would only cost time
        """Read nothing."""


def _open_bounded(content: Content, kind: str) -> IO[bytes]:
    """Open compressed content for reading what it holds."""
    beneath = content.open()
    try:
        stream: Any
        if kind == ".zst":
            import pyarrow

            stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(beneath, mode="r"), "zstd")
        else:
            openers: dict[str, Callable[[IO[bytes]], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
            stream = openers[kind](beneath)
    except _DAMAGE as error:
        beneath.close()
        raise _damaged(content.label, error) from None
    return io.BufferedReader(_Bounded(stream, content.label, content.file.stat().st_size, beneath), 2**20)


def _open_member(content: Content, info: zipfile.ZipInfo, label: str) -> IO[bytes]:
    """Open a member of a zip archive for reading what it holds."""
    beneath = content.seekable()
    try:
        archive = _KnownArchive(beneath)
        stream = archive.open(info)
    except _DAMAGE as error:
        beneath.close()
        raise _damaged(label, error) from None
    return io.BufferedReader(_Bounded(stream, label, max(info.compress_size, 1), archive, beneath), 2**20)


def _member_name(info: zipfile.ZipInfo) -> str:
    """Return an archive's name for a member as one printable line; two that differ there differ here.

    Windows writes names in the encoding of its language, which no flag tells and ``zipfile`` takes for cp437: they are
    decoded as UTF-8 or in Korean, where their bytes are that.
    """
    name = info.filename
    if not info.flag_bits & _UTF8_NAME:
        written = name.encode("cp437", "replace")
        for encoding in ("utf-8", "cp949"):
            with suppress(UnicodeDecodeError):
                name = written.decode(encoding)
                break
    return one_line(name.replace(os.sep, "/"))


def _damaged(label: str, error: BaseException) -> DataError:
    """Return the error for content that cannot be decompressed."""
    return DataError(f"{label}: is damaged or cut off ({error}); copy it again, or unpack it and name what it holds")


def _too_deep(label: str) -> DataError:
    """Return the error for archives within archives."""
    return DataError(
        f"{label}: more than {_DEEPEST} archives or compressed files lie within each other; unpack it once and name "
        "what it holds"
    )
