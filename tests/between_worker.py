"""Runs on every rank under a launcher: train with one thing going wrong between two steps. Not a test itself.

Arguments: SCENARIO, then the flags of launch/train.py. SCENARIO is stop-at-2 (rank 0 gets SIGTERM with step 2), or
answers-fail (rank 1 cannot answer).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from toolkit.commands import cli  # noqa: E402
from toolkit.config import flags  # noqa: E402
from toolkit.training import validation  # noqa: E402
from toolkit.training.monitor import Monitor  # noqa: E402
from toolkit.training.run import run  # noqa: E402


def stop_at_2() -> None:
    """Signal this process once it has logged step 2."""
    log_step = Monitor.step

    def logged(self: Monitor, row: Any) -> None:
        log_step(self, row)
        if row.step == 2 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)

    Monitor.step = logged  # type: ignore[method-assign]


def answers_fail() -> None:
    """Let no answer be written on rank 1."""
    complete = validation.complete_together

    def failing(*given: Any, **options: Any) -> list[str]:
        if os.environ["RANK"] == "1":
            raise RuntimeError("no room for a\nkey-value cache")
        return complete(*given, **options)

    validation.complete_together = failing


def main() -> None:
    """Train under the scenario, and leave with the run's exit code."""
    scenario, *rest = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    {"stop-at-2": stop_at_2, "answers-fail": answers_fail}[scenario]()
    parser = flags.create_parser("")
    cli.exit_process(cli.run_command(lambda: run(flags.parse(parser, ROOT / "recipes" / "quickstart.yaml", rest))))


if __name__ == "__main__":
    main()
