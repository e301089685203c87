"""Run a command: configure logging, keep libraries quiet, and turn errors into exit codes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import faulthandler
import getpass
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
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from toolkit.commands.standard_streams import checked_output, open_missing_streams
from toolkit.runtime import failure_broadcast, malloc
from toolkit.runtime.errors import FrostlineError, UsageError
from toolkit.runtime.printable import one_line, printable
from toolkit.runtime.privacy import private_files, private_temporary_directory
from toolkit.runtime.progress_bar import LogHandler
from toolkit.runtime.redact import RedactingFormatter, redact
from toolkit.runtime.rust_panic import is_panic, panic_error

_CONNECTED_GRACE_SECONDS, _UNCONNECTED_GRACE_SECONDS = 2.0, 10.0
"""Time for which ranks above 0 hold back an error that all ranks raise, so that rank 0 alone prints it. Rank 0 then
sends it to them or, before the ranks are connected, the launcher ends them."""

_MAX_ERROR_CHARACTERS = 300
"""Longest error text that is sent to other ranks."""

_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables that configure torch's GPU allocator: by its name since torch 2.9, and before."""


def run_command(command: Callable[[], int]) -> int:
    """Run a command and return its exit code: that of the command, 1 for a failure, 2 for bad usage, 130 for Ctrl-C.

    A ``FrostlineError`` prints its message alone, any other exception its traceback. A failure caused by another rank
    prints one line and returns that rank's exit code. What the command writes is its user's alone, see
    ``toolkit.runtime.privacy``.
    """
    open_missing_streams()
    rank = _rank()
    _configure_logging(rank)
    set_up_memory()
    try:
        _name_user()
        with private_files(), checked_output():
            return command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return _report_error(_explain(error), rank)
    except BaseException as error:
        if is_panic(error):
            return _report_error(panic_error(error), rank)
        raise


def _rank() -> int:
    """Return the rank that the launcher names; 0 for what is no number, which ``read_world`` reports."""
    named = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return int(named) if named.isascii() and named.isdigit() else 0


def _explain(error: Exception) -> Exception:
    """Return a UsageError for a name that no file system takes, which any check of a path may meet first."""
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP) and error.filename is not None:
        name = os.fsdecode(error.filename)
        shown = name if len(name) <= 80 else f"{name[:80]}… ({len(name)} characters)"
        return UsageError(f"{one_line(shown)}: {error.strerror}; expected a shorter path, without a circle of links")
    return error


def _name_user() -> None:
    """Name home and user for libraries that ask for them, where a user has neither, as in a container (docker -u)."""
    if "HOME" not in os.environ and os.path.expanduser("~") == "~":  # noqa: PTH111 - which raises
        os.environ["HOME"] = str(private_temporary_directory())
        logging.getLogger("frostline").warning("no home directory is known; caches are in %s", os.environ["HOME"])
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid-{os.geteuid()}"


def set_up_memory() -> None:
    """Configure memory of glibc, torch, oneDNN, MKL and cuDNN; call it before their first use, when they read it.

    With transparent huge pages (torch >= 2.2) large tensors take 2 MiB pages: a sixth of the page faults, and less
    resident memory. oneDNN and MKL cache code and buffers for each shape, 0.3 GiB for rows of many lengths. torch keeps
    oneDNN's primitives a second time, in a cache of its own (ideep's), at 0.25 MiB each.

    On an H100 or B200 torch 2.11 asks cuDNN for attention first. That builds a plan for each shape, forward and
    backward, in tenths of a second, and keeps it: every new length of a row would cost that. Flash attention has none.
    """
    malloc.keep_freed_memory()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # the shapes of a step with adapters; default: 1024
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")  # torch's own cache of the same; default: 1024
    os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")
    os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    _expand_gpu_segments()


def _expand_gpu_segments() -> None:
    """Let torch's GPU allocator grow its segments, unless the user configured it.

    Rows differ in length from step to step, and a segment of fixed size that is a little too small for the next one
    stays behind in pieces. torch 2.9 renamed the variable, and warns of the old name.
    """
    if any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        return
    version = tuple(int(part) for part in re.findall(r"\d+", metadata.version("torch"))[:2])
    os.environ[_ALLOCATOR_VARIABLES[version < (2, 9)]] = "expandable_segments:True"


def verb_parser(description: str | None, program: str | None) -> argparse.ArgumentParser:
    """Return a parser without arguments for a verb.

    Args:
        description: docstring of the verb's module, which names launch scripts.
        program: command that the help names instead, such as ``frostline train``; None keeps the scripts.
    """
    from toolkit.config import flags

    text = description or ""
    parser = flags.create_parser(text)
    if program is not None:
        text = re.sub(r"deepspeed launch/(\w+)\.py", r"deepspeed --module toolkit.commands.\1", text)
        text = re.sub(r"\.\.\. launch/(\w+)\.py", r"... -m toolkit.commands.\1", text)
        parser.description = re.sub(
            r"(?:python )?launch/(\w+)\.py", lambda match: f"frostline {match[1].replace('_', '-')}", text
        )
        parser.prog = program
    return parser


def _report_error(error: Exception, rank: int) -> int:
    """Print an error, send it to the other ranks, and return the exit code."""
    failures = failure_broadcast.get_broadcast(error)
    if failures is not None and (failure := failures.find_cause(error)) is not None:
        failure_broadcast.print_failure(rank, failure)
        return failure.code
    last_error = printable(redact(" ".join(f"{type(error).__name__}: {error}".split())))[:_MAX_ERROR_CHARACTERS]
    code = error.exit_code if isinstance(error, FrostlineError) else 1
    if isinstance(error, FrostlineError) and error.on_every_rank and rank:
        if failures is None:
            time.sleep(_UNCONNECTED_GRACE_SECONDS)
        else:
            failure = failures.wait_for_failure(_CONNECTED_GRACE_SECONDS)
            if failure is not None and failure.last_error.endswith(last_error):
                return code  # the same error, which the other rank has printed
    if isinstance(error, FrostlineError):
        where = f" [rank {rank}]" if rank else ""
        print(f"error{where}: {printable(redact(str(error)))}", file=sys.stderr, flush=True)
    else:
        print(f"[rank {rank}] unforeseen error", file=sys.stderr)
        trace = printable(redact("".join(traceback.format_exception(error))))
        print(trace, file=sys.stderr, end="", flush=True)
    _write_torchrun_error_file(error, last_error)
    if failures is not None:
        failures.report_failure(last_error, code)
    return code


def _write_torchrun_error_file(error: Exception, last_error: str) -> None:
    """Write the error to the file from which torchrun prints the root cause; does nothing under other launchers."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        trace = redact("".join(traceback.format_exception(error)))
        extra = {"py_callstack": trace, "timestamp": str(int(time.time()))}
        content = json.dumps({"message": {"message": last_error, "extraInfo": extra}})
        with contextlib.suppress(OSError):
            Path(file).write_text(content, encoding="utf-8")


def exit_process(code: int, at_once: bool = False) -> NoReturn:
    """End the process with an exit code.

    A rank of several skips Python's teardown: DeepSpeed keeps process groups in globals, and a gloo thread of theirs
    that still runs during teardown aborts the process (pytorch issue 190489). All files of a run are written by now.
    Can go when torch joins those threads at exit. With ``at_once`` every process skips it: it takes most of a second
    once torch and transformers are loaded.
    """
    if at_once or "RANK" in os.environ:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _configure_logging(rank: int) -> None:
    """Let rank 0 log to stderr without secrets, and other libraries report errors only.

    Their variables must be set before the libraries are imported.
    """
    with contextlib.suppress(io.UnsupportedOperation):  # stderr may have no file descriptor, as in a notebook
        faulthandler.enable()  # a crash in native code prints the Python stack
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if rank or not sys.stderr.isatty():  # in a file, progress bars leave fragments
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # toolkit.runtime.hub logs retries and the use of the cache
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels for 4-bit products, unused here
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
