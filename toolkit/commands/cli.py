"""Run a command: quiet the libraries, log on rank 0, and turn errors into exit codes."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from toolkit.runtime import failure_broadcast, malloc
from toolkit.runtime.errors import FrostlineError
from toolkit.runtime.progress_bar import LogHandler
from toolkit.runtime.redact import RedactingFormatter, redact

_GRACE_SECONDS, _ALONE_GRACE_SECONDS = 2.0, 10.0
"""How long other ranks hold back an error of all ranks, which rank 0 most likely prints: it then tells them, or, where
the ranks have not met yet, its launcher ends them."""

_LAST_CHARACTERS = 300
"""Of an error, as other ranks quote it."""


def run_command(command: Callable[[], int]) -> int:
    """Run a command and return its exit code: that of the command, 1 for a failure, 2 for bad usage, 130 for Ctrl-C.

    A usage error prints its message alone; anything unforeseen prints its traceback. What fails because another rank
    has gone prints one line, and takes that rank's code over.
    """
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) or 0)
    _quiet(rank)
    set_up_memory()
    try:
        return command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return _failed(error, rank)


def set_up_memory() -> None:
    """Configure how the C library and those below torch handle memory on a CPU; they read it when they first work.

    torch asks the kernel for 2 MiB pages for large tensors: a sixth of the page faults, and less memory resident
    (torch >= 2.2). oneDNN and MKL keep code and buffers for each shape they meet, 0.3 GiB for rows of many lengths.
    """
    malloc.keep_freed_memory()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")  # 1024 by default
    os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")


def describe(parser: argparse.ArgumentParser, program: str | None) -> argparse.ArgumentParser:
    """Adapt the help of a verb to the ``frostline`` command, and return its parser.

    Args:
        parser: of the verb; its description names the launch scripts.
        program: such as ``frostline train``; None leaves the parser as it is.
    """
    if program is not None:
        parser.prog, text = program, parser.description or ""
        text = re.sub(r"deepspeed launch/(\w+)\.py", r"deepspeed --module toolkit.commands.\1", text)
        text = re.sub(r"\.\.\. launch/(\w+)\.py", r"... -m toolkit.commands.\1", text)
        parser.description = re.sub(r"(?:python )?launch/(\w+)\.py", r"frostline \1", text)
    return parser


def _failed(error: Exception, rank: int) -> int:
    """Report an error here and to the other ranks, and return the exit code."""
    failures = failure_broadcast.broadcast_of(error)
    if failures is not None and (gone := failures.cause(error)) is not None:
        failure_broadcast.say(rank, gone)
        return gone.code
    last = redact(" ".join(f"{type(error).__name__}: {error}".split()))[:_LAST_CHARACTERS]
    code = error.exit_code if isinstance(error, FrostlineError) else 1
    if isinstance(error, FrostlineError) and error.on_every_rank and rank:
        if failures is None:
            time.sleep(_ALONE_GRACE_SECONDS)
        elif (heard := failures.news(_GRACE_SECONDS)) is not None and heard.last.endswith(last):
            return code  # all ranks found the same
    if isinstance(error, FrostlineError):
        _print_error(error, rank)
    else:
        print(f"[rank {rank}] unforeseen error", file=sys.stderr)
        print(redact("".join(traceback.format_exception(error))), file=sys.stderr, end="", flush=True)
    _note_for_torchrun(error, last)
    if failures is not None:
        failures.report(last, code)
    return code


def _note_for_torchrun(error: Exception, last: str) -> None:
    """Write the error to the file that torchrun reads the root cause from, for its own summary."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        trace = redact("".join(traceback.format_exception(error)))
        extra = {"py_callstack": trace, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": last, "extraInfo": extra}}), encoding="utf-8")


def leave(code: int, at_once: bool = False) -> NoReturn:
    """End the process with ``code``.

    A process that was one of several ends at once, without Python's teardown: gloo's threads belong to groups that
    DeepSpeed keeps in globals, and one that still runs then aborts the process (pytorch issue 190489). Everything of
    a run is on disk by now. Can go when torch joins those threads at exit.

    Args:
        code: its exit code.
        at_once: do so in any case; the teardown takes most of a second once torch and transformers are loaded.
    """
    if at_once or "RANK" in os.environ:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _print_error(error: FrostlineError, rank: int) -> None:
    where = f" [rank {rank}]" if rank else ""
    print(f"error{where}: {redact(str(error))}", file=sys.stderr, flush=True)


def _quiet(rank: int) -> None:
    with contextlib.suppress(io.UnsupportedOperation):  # stderr may be no file, as in a notebook
        faulthandler.enable()  # a crash in native code prints where Python was
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if rank or not sys.stderr.isatty():  # a log that goes into a file would hold fragments of their bars
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault(
        "HF_HUB_VERBOSITY", "error"
    )  # toolkit.runtime.hub says what is tried again, or taken from the cache
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    logging.basicConfig(level=logging.WARNING)
    for other in logging.getLogger().handlers:
        other.setFormatter(RedactingFormatter("%(levelname)s %(name)s: %(message)s"))
    log = logging.getLogger("frostline")
    log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    log.propagate = False
    handler = LogHandler()
    handler.setFormatter(RedactingFormatter("[frostline] %(message)s"))
    log.handlers = [handler]
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
