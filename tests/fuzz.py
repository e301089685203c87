"""Feed every kind of input that a user can hand over with nonsense, and hold the promise that it is refused clearly.

    python tests/fuzz.py                      # 12,000 inputs and more, prints their number; other ones each time
    python tests/fuzz.py --examples 100 --only rows shards --seed 7

The promise: exit code 0 or 2, no traceback, and nothing written outside the folder it was given. Of the ranks' channel
it is another: a stranger hears nothing, and the ranks meet and hear one another all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import secrets
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402

from toolkit.commands.cli import run_command  # noqa: E402
from toolkit.runtime.cache_root import cache_root  # noqa: E402

_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
_CHANNEL = "rank_channel"
_watching: list[Path] = []
_seen: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Notes what the watched code changes outside its folder; a hook cannot be removed, so it looks if it is wanted."""
    if not _watching:
        return
    if event in _FORBIDDEN:
        _seen.append(f"{event} {arguments}")
    elif event in _CHANGES or (event == "open" and _writes(arguments)):
        for name in arguments[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]:
            if isinstance(name, (str, bytes, os.PathLike)) and not _allowed(os.fsdecode(name)):
                _seen.append(f"{event} {os.fsdecode(name)!r}")


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


def _allowed(name: str) -> bool:
    path = Path(os.path.realpath(name))
    store = Path(os.path.realpath(cache_root() / "tokens"))  # of encoded rows
    own = any(folder in (path, *path.parents) for folder in (_watching[0], store))
    return path == Path(os.devnull) or path.suffix == ".pyc" or "__pycache__" in name or own


sys.addaudithook(_audit)


@contextlib.contextmanager
def _watched(folder: Path) -> Iterator[None]:
    _watching.append(folder.resolve())
    try:
        yield
    finally:
        _watching.clear()


def check(action: Callable[[], object], folder: Path) -> None:
    """Run ``action`` as a command and hold the promise; ``folder`` is where it may write."""

    def command() -> int:
        action()
        return 0

    said = io.StringIO()
    _seen.clear()
    cache = patch.dict(os.environ, FROSTLINE_CACHE=str(folder / "cache"))
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), cache, _watched(folder):
        try:
            code = run_command(command)
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
    text = said.getvalue()
    assert code in (0, 2), f"exit code {code}:\n{text}"
    assert "Traceback" not in text, text
    assert code == 0 or "error" in text, f"exit code 2 without a word:\n{text}"
    assert not _seen, f"it changed what is not its own: {_seen}"


def run_target(name: str, examples: int, start: int, derandomize: bool = False) -> int:
    """Try ``examples`` inputs of one kind; the number that was tried.

    Raises:
        AssertionError: the promise was broken, by the smallest such input that hypothesis found.
    """
    from fuzz_targets import TARGETS

    strategy, make = TARGETS[name]
    count = 0
    with tempfile.TemporaryDirectory(prefix="frostline-fuzz-") as folder:
        target = make(Path(folder))

        def once(value: Any) -> None:
            nonlocal count
            count += 1
            check(lambda: target(value), Path(folder))

        test = given(strategy)(once)
        phases = [Phase.explicit, Phase.generate, Phase.shrink]
        options: dict[str, Any] = {"derandomize": True} if derandomize else {}
        test = settings(
            max_examples=examples, database=None, deadline=None, phases=phases,
            suppress_health_check=list(HealthCheck), **options,
        )(test)  # fmt: skip
        (test if derandomize else seed(start)(test))()
    return count


def run_channel(examples: int, start: int) -> int:
    """Send byte streams without the key to the ranks' channel, as ``besiege`` says; the number that was sent."""
    from fuzz_channel import besiege

    with tempfile.TemporaryDirectory(prefix="frostline-fuzz-") as folder:
        return besiege(Path(folder), examples, start)


def main() -> int:
    """Parse the command line, then fuzz."""
    from fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1200, help="inputs of each kind; default: 1200")
    parser.add_argument("--streams", type=int, default=10_000, help="inputs of the ranks' channel; default: 10,000")
    kinds = [*TARGETS, _CHANNEL]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, help="kinds; default: all")
    parser.add_argument("--seed", type=int, help="of the inputs; default: another one each time")
    given_ = parser.parse_args()
    start = secrets.randbits(32) if given_.seed is None else given_.seed
    total, failed = 0, []
    for name in given_.only:
        began = time.perf_counter()
        try:
            channel = name == _CHANNEL
            count = run_channel(given_.streams, start) if channel else run_target(name, given_.examples, start)
            outcome = "kept"
        except Exception:
            failed.append(name)
            traceback.print_exc()
            count, outcome = 0, "BROKEN"
        total += count
        print(f"{name:20} {count:7,} inputs  {time.perf_counter() - began:6.1f} s  {outcome}", flush=True)
    print(f"{total:,} inputs, seed {start}: {'promise kept' if not failed else 'broken by ' + ', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
