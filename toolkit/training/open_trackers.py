"""Begin a run at the trackers of ``output.report_to``, or go on with it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from toolkit.checkpoint.metrics_log import METRICS_FILE, read_rows
from toolkit.checkpoint.run_directory import RunDirectory
from toolkit.config.schema import RunConfig
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import UsageError
from toolkit.runtime.paths import explain_refused_write, replace_text
from toolkit.runtime.redact import redact
from toolkit.training.mlflow_tracker import MlflowTracker
from toolkit.training.trackers import Tracker, Trackers, describe, group
from toolkit.training.wandb_tracker import WandbTracker

TRACKERS_FILE = "trackers.json"
"""In a run directory: the id of its run at each tracker, which a resumed run goes on with."""

_PACKAGES = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
"""Modules to import, by tracker."""
_BEGIN: Mapping[str, Callable[[Path, str, Mapping[str, Any], str | None], Tracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
}
"""By tracker: what begins a run there, or goes on with that of an id."""


def require_tracker_packages(report_to: Iterable[str]) -> None:
    """Check that the packages of the trackers in ``output.report_to`` are there, without importing them.

    Raises:
        UsageError: one is not installed.
    """
    for name in report_to:
        lacking = [module for module in _PACKAGES.get(name, ()) if not _is_installed(module)]
        if lacking:
            raise UsageError(
                f"output.report_to names {name}, but {', '.join(lacking)} cannot be imported here; "
                f'run `pip install -c constraints.txt -e ".[{name}]"`, or leave {name} out'
            )


def _is_installed(module: str) -> bool:
    """Return whether a package is found; a mere directory of its name, as wandb makes one for its files, is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def open_trackers(config: RunConfig, directory: RunDirectory, world: World) -> Trackers:
    """Begin a run at each tracker of ``output.report_to``, or go on with the one there; every rank calls it.

    A run that resumes from a checkpoint goes on; any other begins anew. Rank 0 alone writes.

    Raises:
        UsageError: a tracker is not installed, cannot be reached, or refuses.
        DiskError: the ids cannot be written.
    """
    trackers = Trackers()

    def begin() -> None:
        require_tracker_packages(config.output.report_to)
        try:
            _begin_all(trackers, config, directory)
        except BaseException:
            trackers.close("failed")
            raise

    world.on_main(begin)
    return trackers


def _begin_all(trackers: Trackers, config: RunConfig, directory: RunDirectory) -> None:
    """Begin a run at each tracker, and keep its id in the run directory."""
    run, state = directory.path.resolve(), directory.state
    ids, sent = ({}, frozenset()) if state is None else (_read_ids(run), _logged_after(state.step, run))
    name = run.name if config.data.fold is None else f"{run.parent.name}/{run.name}"
    for kind in (kind for kind in config.output.report_to if kind != "tensorboard"):
        if links := [path for path in (run / "wandb", run / "mlflow.db") if path.is_symlink()]:
            raise UsageError(f"{links[0]} is a symbolic link, which is not followed to write; remove it")
        try:
            tracker = _BEGIN[kind](run, name, redacted(config), ids.get(kind))
        except UsageError:
            raise
        except Exception as error:  # whatever the tracker's library raises
            raise UsageError(
                f"output.report_to: {kind} cannot be begun ({describe(error)}); correct that, or leave {kind} out"
            ) from None
        trackers.add(kind, tracker, sent if kind in ids else frozenset())
        ids[kind] = tracker.run_id
        with explain_refused_write(run):
            replace_text(run / TRACKERS_FILE, json.dumps(ids, indent=1))


def redacted(config: RunConfig) -> dict[str, Any]:
    """Return a recipe as JSON takes it, with every secret in it replaced."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {redact(str(key)): clean(part) for key, part in value.items()}
        if isinstance(value, list):
            return [clean(part) for part in value]
        return redact(value) if isinstance(value, str) else value

    return dict(clean(config.model_dump(mode="json")))


def _read_ids(run: Path) -> dict[str, str]:
    """Return the ids in ``trackers.json``; none if there is no such file."""
    path = run / TRACKERS_FILE
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(ids, dict) or not all(isinstance(one, str) for one in ids.values()):
            raise ValueError("expected an id for each tracker")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read ({error}); remove it, and the run is begun anew at its trackers"
        ) from None
    return ids


def _logged_after(step: int, run: Path) -> frozenset[tuple[str, int]]:
    """Return group and step of what an interrupted run logged after its last checkpoint, which is done again."""
    rows = read_rows(run / METRICS_FILE)
    return frozenset((group(row), row["step"]) for row in rows if row["step"] > step and "event" not in row)
