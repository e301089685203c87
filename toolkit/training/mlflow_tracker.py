"""Write a run to MLflow: its numbers and its recipe, by the client alone, which adds nothing of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.runtime.errors import UsageError
from toolkit.training.trackers import Outcome, Point, describe

_STATES: Mapping[Outcome, str] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_METRICS_AT_ONCE, _PARAMS_AT_ONCE = 1000, 100
"""Most that MLflow's servers take in one request."""
_LONGEST_PARAM = 500
"""Most characters of a parameter that every version of the servers takes."""


class MlflowTracker:
    """A run at MLflow, in the experiment of MLFLOW_EXPERIMENT_NAME or ``frostline``; see ``trackers.Tracker``.

    Without MLFLOW_TRACKING_URI it is written to ``mlflow.db`` in the run directory.

    Raises:
        UsageError: the run to go on with is not there.
    """

    def __init__(self, run: Path, name: str, recipe: Mapping[str, Any], run_id: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow's own, to its makers; read when imported
        import mlflow
        from mlflow.exceptions import MlflowException

        uri = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else f"sqlite:///{run / 'mlflow.db'}"
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        if run_id is None:
            self.run_id = str(self._client.create_run(self._experiment(), run_name=name).info.run_id)
        else:
            self.run_id = run_id
            try:
                self._client.update_run(run_id, status="RUNNING")
            except MlflowException as error:
                raise UsageError(
                    f"{run} was written to MLflow's run {run_id}, which {uri} does not go on with ({describe(error)}); "
                    "set MLFLOW_TRACKING_URI to where it is, or remove trackers.json to begin a new one"
                ) from None
        self.place = f"run {self.run_id} at {uri}"
        self._show_recipe(recipe)

    def send(self, points: Sequence[Point]) -> None:
        """Send points."""
        from mlflow.entities import Metric

        metrics = [Metric(key, value, p.time_ms, p.step) for p in points for key, value in p.values.items()]
        for start in range(0, len(metrics), _METRICS_AT_ONCE):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + _METRICS_AT_ONCE])

    def finish(self, outcome: Outcome) -> None:
        """Set the status to FINISHED, FAILED, or KILLED for a run that was stopped."""
        self._client.set_terminated(self.run_id, _STATES[outcome])

    def _experiment(self) -> str:
        """Return the id of the experiment, which is made if it is not there."""
        from mlflow.exceptions import MlflowException

        if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return given
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "frostline"
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another run has made it meanwhile
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _show_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Log the recipe as parameters; what has changed since the run began, as tags, since parameters cannot."""
        from mlflow.entities import Param, RunTag

        before = self._client.get_run(self.run_id).data.params
        values = dict(_flatten(recipe))
        new = [Param(key, value) for key, value in values.items() if key not in before]
        changed = [RunTag(key, value) for key, value in values.items() if before.get(key, value) != value]
        for start in range(0, len(new), _PARAMS_AT_ONCE):
            self._client.log_batch(self.run_id, params=new[start : start + _PARAMS_AT_ONCE])
        if changed:
            self._client.log_batch(self.run_id, tags=changed)


def _flatten(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each key of a recipe as ``section.key``, and its value as text."""
    for section, keys in recipe.items():
        for key, value in keys.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{section}.{key}", text if len(text) <= _LONGEST_PARAM else f"{text[: _LONGEST_PARAM - 1]}…"
