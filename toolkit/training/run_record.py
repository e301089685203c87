"""What a run consists of, written into its directory for people and for later runs."""

from __future__ import annotations

import json
from pathlib import Path

from toolkit.planning.table import as_dict
from toolkit.runtime.paths import replace_text
from toolkit.training.setup import Setup


def save_set_up(setup: Setup, run: Path) -> None:
    """Write what the run consists of into its directory."""
    setup.schedule.phases[-1].trained.save(run / "mask.json")
    if len(setup.schedule.phases) > 1:
        replace_text(run / "schedule.json", json.dumps(setup.schedule.as_list(), indent=1))
    save_plan(setup, run)
    setup.dataset.save_skipped(run / "skipped_rows.jsonl")


def save_plan(setup: Setup, run: Path) -> None:
    """Write the plan of the run, if there is one."""
    if setup.cost is not None:
        replace_text(run / "plan.json", json.dumps(as_dict(setup.cost), indent=1))
