"""Starts ranks as copies of a process that has imported everything already: a server, which helpers.py talks to.

Two ranks under a launcher spend some 14 seconds of a processor on importing torch, transformers and DeepSpeed four
times over, more than most tests train for. Here that happens once; every rank is a fork. Otherwise a rank is what a
launcher starts: it has the variables of torchrun and DeepSpeed, and all end when one fails. Each line of the standard
input is a job, each line of the output the exit code of one. Not a test itself.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT))

GRACE = 20.0
"""Seconds that the others have to end by themselves after one has failed."""


def become(job: dict[str, Any], rank: int) -> int:
    """Run a job's script in this process, which is a fork; its exit code."""
    os.setpgid(0, 0)
    streams = (
        os.open(os.devnull, os.O_RDONLY),
        *(os.open(job[name], os.O_WRONLY | os.O_APPEND) for name in ("out", "err")),
    )
    for descriptor, opened in enumerate(streams):
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(job["environ"], RANK=str(rank), LOCAL_RANK=str(rank))
    os.chdir(job["cwd"])
    script = job["script"]
    sys.argv = [script, *job["flags"]]
    sys.path[0] = str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(job: dict[str, Any], rank: int) -> int:
    """Return the process id of a rank."""
    if child := os.fork():
        return child
    code = 1
    try:
        code = become(job, rank)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def run(job: dict[str, Any]) -> int:
    """Run all ranks of a job; the first exit code that is not 0, negative for a signal."""
    running = {fork(job, rank) for rank in range(job["ranks"])}
    failed, deadline = 0, float("inf")
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            if time.monotonic() > deadline:
                for other in running:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(other, signal.SIGKILL)
            time.sleep(0.02)
            continue
        running.discard(child)
        code = os.waitstatus_to_exitcode(status)
        if code and not failed:
            failed, deadline = code, time.monotonic() + GRACE
            for other in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGTERM)
    return failed


def main() -> None:
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:  # libraries print, too
        os.dup2(2, 1)
        import deepspeed  # noqa: F401
        import transformers.modeling_utils  # noqa: F401

        import toolkit.engine.deepspeed.engine
        import toolkit.training.run  # noqa: F401

        gc.freeze()
        for line in sys.stdin:
            print(run(json.loads(line)), file=answers, flush=True)
    os._exit(0)  # what is frozen would be taken for leaked


if __name__ == "__main__":
    main()
