"""Write a run to Weights & Biases: its numbers and its recipe, and nothing that wandb collects by itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.runtime.errors import UsageError
from toolkit.training.trackers import Outcome, Point

_EXIT_CODES: Mapping[Outcome, int] = {"finished": 0, "failed": 1, "stopped": 75}
_FINISH_SECONDS = 30
"""How long wandb may upload at the end; what is left stays in its files, for ``wandb sync``."""


class WandbTracker:
    """A run at wandb, in the project of WANDB_PROJECT or ``frostline``; see ``trackers.Tracker``.

    Raises:
        UsageError: there is no key, and WANDB_MODE is not offline.
    """

    def __init__(self, run: Path, name: str, recipe: Mapping[str, Any], run_id: str | None) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb's own, to its makers; read as it starts
        import wandb

        hooks = sys.exit, sys.excepthook
        chosen = wandb.setup().settings  # by its environment variables and settings files
        is_online = chosen.mode not in ("offline", "dryrun", "disabled")
        if is_online and not wandb.login(prompt=False, verify=False):
            raise UsageError(
                "output.report_to names wandb, which has no key; run `wandb login`, set WANDB_API_KEY, or set "
                "WANDB_MODE=offline to write files alone"
            )
        try:
            self._run = wandb.init(
                id=run_id,
                resume="allow" if run_id is not None else None,
                project=None if chosen.project else "frostline",
                name=None if chosen.run_name else name,
                dir=None if "WANDB_DIR" in os.environ else str(run),
                config=dict(recipe),
                reinit="create_new",  # leaves runs of whoever calls toolkit.train alone
                settings=wandb.Settings(
                    console="off", disable_git=True, disable_code=True, host="-", program="-", x_disable_meta=True,
                    x_disable_machine_info=True, x_disable_stats=True, x_save_requirements=False,
                    stop_fn=lambda: None, quiet=True, finish_timeout=_FINISH_SECONDS, finish_timeout_raises=True,
                ),
            )  # fmt: skip
        finally:
            sys.exit, sys.excepthook = hooks  # wandb's would set the state of the run, as finish does
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")  # its own step only rises; a validation may come late
        self.run_id = str(self._run.id)
        self.place = str(self._run.url) if is_online else f"files in {self._run.settings.sync_dir}"

    def send(self, points: Sequence[Point]) -> None:
        """Send points; wandb uploads them from a process of its own."""
        for point in points:
            self._run.log({"step": point.step, **point.values})

    def finish(self, outcome: Outcome) -> None:
        """Set the state to finished, failed, or preempted for a run that was stopped, and wait for the upload."""
        if outcome == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=_EXIT_CODES[outcome])
