"""List what Frostline keeps on this machine beside the runs, or remove it.

    python launch/cache.py list
    python launch/cache.py purge                                         # all that can give back rows
    python launch/cache.py purge --kind activations --unused-days 14
    python launch/cache.py purge --kind model tokens --cache-dir /scratch/hidden-states

Kinds: activations (hidden states), tokens (encoded rows), answers (a base's, to everyday prompts), retrieval (passages
and indices of corpora and dictionaries), model (the bundled one, converted), temporary (what killed processes left).
What a live run uses stays. Only files by the names that Frostline gives are removed, and links are not followed.
docs/privacy.md says what can be recovered from what.
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from toolkit.commands.cli import verb_parser

KINDS = ("activations", "tokens", "answers", "retrieval", "model", "temporary")
_WITH_ROWS = ("activations", "tokens", "answers", "retrieval", "temporary")
_HASH = r"[0-9a-f]{64}"
_NAMES = {
    "tokens": re.compile(rf"{_HASH}\.(tokens|fingerprints|lock)|\.{_HASH}-\w+\.partial"),
    "answers": re.compile(rf"{_HASH}\.json|\.{_HASH}\.json\.[0-9a-f]{{32}}\.staging"),
    "retrieval": re.compile(
        rf"{_HASH}(\.passages|\.vectors)?\.(json|npy|lock)|\.{_HASH}\.(passages\.json|vectors\.npy)\.[0-9a-f]{{32}}\.staging"
    ),
    "model": re.compile(r"smollm2-135m-instruct-bf16"),
    "temporary": re.compile(r"\.offload-\w+|\.smollm2-135m-instruct-bf16-[0-9a-f]{32}"),
}
"""Names of what is removed, by kind: of files in the folders tokens and base_answers, of directories in the cache."""
_IN_NAMESPACE = re.compile(
    r"[0-9a-f]{32}\.safetensors|namespace\.json|split\.json|\.split\.json\.[0-9a-f]{32}\.staging"
    r"|\.[0-9a-f]{16}\.lease|\.[0-9a-f]{16}-\d+\.partial"
)
_INDEX = re.compile(rf"{_HASH}\.bm25|\.{_HASH}-\w+\.partial")
_IN_INDEX = re.compile(r"[\w.]+\.index\.(npy|json)")
"""Names of a directory of bm25s, and of the files in it."""
_DAY = 24 * 3600


@dataclass
class KeptEntry:
    """Something that is kept: a file, or a directory with the files in it."""

    kind: str
    path: Path
    files: list[Path] = field(default_factory=list)
    """The files to remove."""
    size: int = 0
    used: float = 0.0
    """When it was last read or written, in seconds since the epoch."""
    in_use: bool = False

    @property
    def days(self) -> float:
        """Days since it was last used."""
        return max(time.time() - self.used, 0) / _DAY

    def as_row(self) -> str:
        """Return a line of the table."""
        state = "in use" if self.in_use else f"{self.days:.0f} days ago"
        return f"{self.kind:12} {self.size / 2**20:10,.1f} MiB  {state:>14}  {self.path}"


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, list or purge, and return the exit code; see ``cli.verb_parser`` for ``program``."""
    from toolkit.runtime.cache_root import cache_root

    arguments = _parse(words, program)
    entries = [
        entry
        for entry in find_entries(cache_root(), arguments.cache_dir)
        if entry.kind in arguments.kind and entry.days >= arguments.unused_days
    ]
    if arguments.action == "purge":
        return _purge(entries)
    for entry in sorted(entries, key=lambda entry: (KINDS.index(entry.kind), entry.path)):
        print(entry.as_row())
    print(f"{len(entries)} kept, {sum(entry.size for entry in entries) / 2**20:,.1f} MiB")
    return 0


def find_entries(root: Path, cache_dir: Path | None) -> Iterator[KeptEntry]:
    """Yield what is kept in the cache directory ``root``, and the hidden states in another ``cache_dir``."""
    for directory in _matching(cache_dir or root / "activations", re.compile(_HASH), directories=True):
        yield _with_files(KeptEntry("activations", directory), _matching(directory, _IN_NAMESPACE))
    for directory in _matching(root / "retrieval", _INDEX, directories=True):
        yield _with_files(KeptEntry("retrieval", directory), _matching(directory, _IN_INDEX))
    for kind, folder in (("tokens", "tokens"), ("answers", "base_answers"), ("retrieval", "retrieval")):
        for path in _matching(root / folder, _NAMES[kind]):
            yield _with_files(KeptEntry(kind, path), [path])
    for kind in ("model", "temporary"):
        for directory in _matching(root, _NAMES[kind], directories=True):
            yield _with_files(KeptEntry(kind, directory), [path for path in directory.rglob("*") if path.is_file()])


def _purge(entries: Sequence[KeptEntry]) -> int:
    """Remove entries, and print what was; return 1 if something could not be."""
    count, size, failed = 0, 0, 0
    for entry in entries:
        if entry.in_use:
            print(f"stays: {entry.path}, which a live run uses")
            continue
        try:
            _remove(entry)
        except OSError as error:
            failed += 1
            print(f"stays: {entry.path} ({error.strerror or error})")
        else:
            count, size = count + 1, size + entry.size
    print(f"{count} removed, {size / 2**20:,.1f} MiB")
    return 1 if failed else 0


def _remove(entry: KeptEntry) -> None:
    if entry.kind in ("model", "temporary"):
        shutil.rmtree(entry.path)
        return
    for path in entry.files:
        path.unlink(missing_ok=True)
    if entry.path.is_dir():
        entry.path.rmdir()  # fails if there is a file of somebody else's


def _with_files(entry: KeptEntry, files: Sequence[Path]) -> KeptEntry:
    """Fill in an entry from its files."""
    from toolkit.runtime.file_lock import is_locked

    entry.files = list(files)
    for path in entry.files:
        with suppress(OSError):
            status = path.lstat()
            entry.size += status.st_size
            entry.used = max(entry.used, status.st_atime, status.st_mtime)
            if path.suffix in (".lease", ".lock"):
                entry.in_use |= is_locked(path)
    if not entry.files:
        with suppress(OSError):
            entry.used = entry.path.lstat().st_mtime
    if entry.kind == "temporary":
        entry.in_use = entry.days < 1  # a process may be writing there
    return entry


def _matching(folder: Path, name: re.Pattern[str], directories: bool = False) -> list[Path]:
    """Return the files, or the directories, of a folder whose whole name matches; links never do."""
    try:
        return [
            path
            for path in sorted(folder.iterdir())
            if name.fullmatch(path.name)
            and not path.is_symlink()
            and (path.is_dir() if directories else path.is_file())
        ]
    except FileNotFoundError:
        return []


def _parse(words: Sequence[str] | None, program: str | None) -> argparse.Namespace:
    """Parse the command line."""
    from toolkit.config import flags

    parser = verb_parser(__doc__, program)
    actions = parser.add_subparsers(dest="action", required=True, metavar="{list,purge}")
    for action, text in (("list", "print what is kept"), ("purge", "remove it")):
        verb = actions.add_parser(action, allow_abbrev=False, help=text)
        chosen = KINDS if action == "list" else _WITH_ROWS
        verb.add_argument(
            "--kind", nargs="+", choices=KINDS, default=chosen, help=f"kinds; default: {', '.join(chosen)}"
        )
        verb.add_argument(
            "--unused-days", type=flags.whole_number, default=0, metavar="N", help="only what was not used so long"
        )
        verb.add_argument("--cache-dir", type=Path, metavar="FOLDER", help="prefix.cache_dir, if it is not the default")
    return parser.parse_args(words)
