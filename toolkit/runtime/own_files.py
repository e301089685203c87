"""Open and delete what is our own alone: exact names, regular files, and no symbolic link is ever followed.

A run directory may come from somebody else, and a user may keep files of their own beside ours. So whatever deletes or
writes in place goes through here. Files that are replaced (``toolkit.runtime.paths.replace_text``) need no check: a
rename replaces a link itself, never what it points to.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

IsOwn = Callable[[str], bool]
"""Returns whether a path below a directory, as ``optimizer/rank-00000-of-00001.json``, is one that we write."""


class NotOwnError(OSError):
    """Says that what is to be written or deleted is a link, no file, or not ours alone; nothing was changed."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(errno.EPERM, f"it {what}, and only files of our own are written or deleted", str(path))


def open_own(path: Path, flags: int, mode: int = 0o666) -> int:
    """Open a regular file to write in place, as ``os.open`` does; return the descriptor.

    Raises:
        NotOwnError: it is a link, no regular file, or has a second name, through which another file would change.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)  # a FIFO makes none wait
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotOwnError(path, "is a symbolic link") from None
        if error.errno in (errno.EISDIR, errno.ENXIO):
            raise NotOwnError(path, "is no regular file") from None
        raise
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
        return descriptor
    os.close(descriptor)
    raise NotOwnError(path, "has a second name (hard link)" if stat.S_ISREG(status.st_mode) else "is no regular file")


def is_real_directory(path: Path) -> bool:
    """Return whether a path is a directory, and no link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def is_real_file(path: Path) -> bool:
    """Return whether a path is a regular file, and no link to one."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def is_same_directory(one: Path, other: Path) -> bool:
    """Return whether two paths lead to one directory; False if either leads nowhere."""
    try:
        return one.is_dir() and one.samefile(other)
    except (OSError, ValueError):
        return False


def remove_own_file(path: Path) -> None:
    """Delete a regular file.

    Raises:
        FileNotFoundError: there is none.
        NotOwnError: it is a link, a directory or something else.
    """
    with _opened(path.parent) as parent:
        if not stat.S_ISREG(os.stat(path.name, dir_fd=parent, follow_symlinks=False).st_mode):
            raise NotOwnError(path, "is no regular file")
        os.unlink(path.name, dir_fd=parent)


def require_own_tree(path: Path, is_own: IsOwn) -> None:
    """Check that a directory holds what is ours alone.

    Raises:
        NotOwnError: it is a link or a file, or something in it is not ours; names the first.
        OSError: it cannot be read.
    """
    with _opened(path.parent) as parent:
        _require_own(parent, path, is_own)


def remove_own_tree(path: Path, is_own: IsOwn) -> None:
    """Delete a directory if all that it holds is ours; what appears in it meanwhile stays, with the directory.

    Raises:
        NotOwnError: as ``require_own_tree``; nothing was deleted.
        OSError: it cannot be deleted.
    """
    with _opened(path.parent) as parent:
        _require_own(parent, path, is_own)
        for root, folders, files, descriptor in os.fwalk(path.name, topdown=False, dir_fd=parent):
            for name in files:
                if is_own(_relative(root, name)):
                    os.unlink(name, dir_fd=descriptor)
            for name in folders:
                os.rmdir(name, dir_fd=descriptor)
        os.rmdir(path.name, dir_fd=parent)


def _require_own(parent: int, path: Path, is_own: IsOwn) -> None:
    """Check a directory in the open directory ``parent``; see ``require_own_tree``."""
    if not stat.S_ISDIR(os.stat(path.name, dir_fd=parent, follow_symlinks=False).st_mode):
        raise NotOwnError(path, "is no directory")
    for root, folders, files, descriptor in os.fwalk(path.name, dir_fd=parent):  # follows no links
        for names, kind in ((folders, stat.S_ISDIR), (files, stat.S_ISREG)):
            for name in names:
                relative = _relative(root, name)
                if not (is_own(relative) and kind(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode)):
                    raise NotOwnError(path, f"holds {relative}")


def _relative(root: str, name: str) -> str:
    """Return the path of a name that ``os.fwalk`` found, below the directory where it began."""
    return "/".join([*root.split("/")[1:], name])


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """Open a directory, which may be a link that the user meant, so that its names are all looked up in that one."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
