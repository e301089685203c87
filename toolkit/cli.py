"""What every launch script shares: quiet libraries, logging on rank 0, and errors turned into exit codes."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from toolkit.errors import FrostlineError
from toolkit.redact import RedactingFormatter, redact

_GRACE_SECONDS = 10.0
"""How long other ranks hold back an error of all ranks, which rank 0 most likely prints; then they are ended."""


def run_command(command: Callable[[], int]) -> int:
    """Run ``command`` and return its exit code: 0, 75, or 1 for a failure, or 2 for bad usage, config or data.

    A usage error prints its message alone; anything unforeseen prints its traceback.
    """
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) or 0)
    _quiet(rank)
    # torch asks the kernel for 2 MiB pages for large tensors: a sixth of the page faults, and less memory resident
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read at torch's first allocation; torch >= 2.2
    try:
        return command()
    except FrostlineError as error:
        if rank and error.on_every_rank:
            time.sleep(_GRACE_SECONDS)
        _print_error(error, rank)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception:
        print(f"[rank {rank}] unforeseen error", file=sys.stderr)
        print(redact(traceback.format_exc()), file=sys.stderr, end="")
        return 1


def leave(code: int) -> NoReturn:
    """End the process with ``code``.

    A process that was one of several ends at once, without Python's teardown: gloo's threads belong to groups that
    DeepSpeed keeps in globals, and one that still runs then aborts the process (pytorch issue 190489). Everything of
    a run is on disk by now. Can go when torch joins those threads at exit.
    """
    if "RANK" in os.environ:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _print_error(error: FrostlineError, rank: int) -> None:
    where = f" [rank {rank}]" if rank else ""
    print(f"error{where}: {redact(str(error))}", file=sys.stderr, flush=True)


def _quiet(rank: int) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    logging.basicConfig(level=logging.WARNING)
    for other in logging.getLogger().handlers:
        other.setFormatter(RedactingFormatter("%(levelname)s %(name)s: %(message)s"))
    log = logging.getLogger("frostline")
    log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    log.propagate = False
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("[frostline] %(message)s"))
    log.handlers = [handler]
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
