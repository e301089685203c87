"""Who may read what a command writes: its user alone, unless a recipe shares it with the group of its directory.

Rows can be recovered from hidden states, checkpoints and sample answers (docs/privacy.md), so a command sets the umask
077 at its start, whatever that of the shell. A directory that is shared has the mode 2770: setgid, so that what is made
in it belongs to its group. That mode is the mark by which later commands share what they write there.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from toolkit.runtime.errors import UsageError

log = logging.getLogger("frostline")

_PRIVATE_UMASK, _GROUP_UMASK = 0o077, 0o007
_PRIVATE_MODE, _GROUP_MODE = 0o700, 0o2770


@dataclass
class _UserUmask:
    """Hold the umask of the user's shell; process-wide, as the umask itself."""

    of_user: int | None = None
    """None outside ``private_files``."""


_state = _UserUmask()


@contextmanager
def private_files() -> Iterator[None]:
    """Make the files and directories of the body readable for their user alone; nested use does nothing."""
    if _state.of_user is not None:
        yield
        return
    _state.of_user = os.umask(_PRIVATE_UMASK)
    try:
        yield
    finally:
        os.umask(_state.of_user)
        _state.of_user = None


@contextmanager
def group_files(is_shared: bool) -> Iterator[None]:
    """Within ``private_files``, let the group read and write what the body writes, if ``is_shared``."""
    former = os.umask(_GROUP_UMASK) if is_shared else None
    try:
        yield
    finally:
        if former is not None:
            os.umask(former)


@contextmanager
def users_umask() -> Iterator[None]:
    """Give back the umask of the user's shell in the body: for what is nobody's rows, or is to be handed out."""
    if _state.of_user is None:
        yield
        return
    former = os.umask(_state.of_user)
    try:
        yield
    finally:
        os.umask(former)


def set_access(directory: Path, is_shared: bool) -> None:
    """Open a directory to its user alone (0700), or to its group too (2770); one of another user stays as it is.

    Raises:
        OSError: there is no such directory, or its file system refuses.
    """
    status, mode = directory.lstat(), _GROUP_MODE if is_shared else _PRIVATE_MODE
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if is_ours and stat.S_IMODE(status.st_mode) & ~(0 if is_shared else stat.S_ISGID) != mode:  # setgid is inherited
        directory.chmod(mode)


def close_directory(directory: Path) -> None:
    """Close a run directory of an earlier version to others, and say so; one that is shared with its group stays so."""
    if is_shared_with_group(directory):
        return
    before = stat.S_IMODE(directory.stat().st_mode)
    with suppress(OSError):  # a file system without modes
        set_access(directory, is_shared=False)
    if (now := stat.S_IMODE(directory.stat().st_mode)) != before:
        log.info("%s was open to others (mode %o) and is its user's alone now (%o); output.share: group shares it",
                 directory, before, now)  # fmt: skip


def make_directory(directory: Path, is_shared: bool = False) -> None:
    """Make a directory that is private or shared, as ``set_access`` says; one that exists keeps its mode.

    Parents that are missing are private.
    """
    directory.parent.mkdir(mode=_PRIVATE_MODE, parents=True, exist_ok=True)
    try:
        directory.mkdir(mode=_PRIVATE_MODE)
    except FileExistsError:
        if not directory.is_dir():
            raise
        return
    set_access(directory, is_shared)


def private_temporary_directory() -> Path:
    """Return a directory of this user alone in $TMPDIR, which is the same one each time.

    Raises:
        UsageError: another user has made one of this name, or it cannot be made.
    """
    directory = Path(tempfile.gettempdir()) / f"frostline-{os.geteuid()}"
    with suppress(OSError):
        directory.mkdir(mode=_PRIVATE_MODE, exist_ok=True)
        status = directory.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not stat.S_IMODE(status.st_mode) & 0o077:
            return directory
    raise UsageError(
        f"no home directory is known, and {directory} is not one of this user alone; set HOME, or FROSTLINE_CACHE to a "
        "directory that you may write to"
    )


def is_shared_with_group(directory: Path) -> bool:
    """Return whether a directory was made for its group by ``set_access``."""
    try:
        return stat.S_IMODE(directory.stat().st_mode) == _GROUP_MODE
    except OSError:
        return False


def share_file(descriptor: int, directory: Path) -> None:
    """Open a file of this user to the group, if its directory is shared with it; the umask does not matter."""
    if is_shared_with_group(directory) and os.fstat(descriptor).st_uid == os.geteuid():
        os.fchmod(descriptor, 0o660)
