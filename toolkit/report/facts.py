"""Read what a run directory says of its run, for the report; no weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.checkpoint.choice import ChosenCheckpoint, Step, find_checkpoint, retry_while_rotating
from toolkit.checkpoint.delta import Base, read_mask_and_base
from toolkit.checkpoint.metrics_log import METRICS_FILE, number, read_rows
from toolkit.checkpoint.run_directory import RECORD_FILE, fold_runs
from toolkit.checkpoint.state import CheckpointState, read_state
from toolkit.config.recipe import read_saved
from toolkit.config.schema import RunConfig
from toolkit.mask.audit import AuditRow
from toolkit.mask.layer_mask import LayerMask
from toolkit.runtime.errors import CheckpointError


@dataclass(frozen=True)
class Curves:
    """Holds what ``metrics.jsonl`` has of a run, in the order of its steps; NaN where a value was not finite."""

    steps: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    """Training loss of each step."""
    learning_rates: tuple[float, ...] = ()
    validation_steps: tuple[int, ...] = ()
    validation_losses: tuple[float, ...] = ()
    peak_memory_gib: float | None = None
    """Highest of any rank and step."""


@dataclass(frozen=True)
class RunFacts:
    """Holds what is known of one run."""

    path: Path
    config: RunConfig
    choice: ChosenCheckpoint
    """The checkpoint that is reported on."""
    state: CheckpointState
    """Its state."""
    last: CheckpointState
    """State of the latest checkpoint, which has what the whole run cost."""
    mask: LayerMask
    base: Base
    parts: tuple[AuditRow, ...]
    """Parts of the model from input to head; empty for a run of a version that did not record them, and for a
    checkpoint before the last phase of a schedule, of which they would be."""
    rows: Mapping[str, int]
    """Numbers of rows: train, and what else was recorded of validation, test, skipped and shortened."""
    task: str
    """Task by which the training rows were read; what the recipe says where it was not recorded."""
    hardware: Mapping[str, Any]
    """Empty if it was not recorded."""
    phases: Sequence[Mapping[str, Any]]
    """Phases of a mask schedule; empty without one."""
    planned_bytes: int | None
    """Peak of tensors that was planned for each rank; None if the run could not be planned."""
    files: Sequence[Mapping[str, Any]]
    """Files of the rows, with path, bytes and what they are for."""
    curves: Curves

    @property
    def trained(self) -> int:
        """Number of parameters that trained, as a model card counts them."""
        return sum(part.trained for part in self.parts) if self.parts else self.mask.parameters

    @property
    def total(self) -> int | None:
        """Number of all parameters; None if it was not recorded."""
        return sum(part.parameters for part in self.parts) or None


def read_runs(run: Path, step: Step | None = None) -> list[RunFacts]:
    """Read the facts of a run, or of each fold in a directory of folds.

    Args:
        run: a run directory, or one of ``data.folds``.
        step: checkpoint that is reported on, by its number or as ``latest`` or ``best``; None takes the latest.

    Raises:
        CheckpointError: it is neither; it has no checkpoint yet, or not that one; or a file of it is damaged.
    """
    return [read_facts(path, step) for path in (fold_runs(run) or [run])]


def read_facts(run: Path, step: Step | None = None) -> RunFacts:
    """Read the facts of one run, which may be training; see ``read_runs`` for arguments and errors."""
    return retry_while_rotating(run, lambda: _read_facts(run, step))


def _read_facts(run: Path, step: Step | None) -> RunFacts:
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run} is not a run directory (no config.yaml); expected one such as runs/quickstart")
    config, choice = read_saved(run / "config.yaml"), find_checkpoint(run, step)
    state, last = read_state(choice.checkpoint), read_state(find_checkpoint(run).checkpoint)
    try:
        mask, base = read_mask_and_base(choice.checkpoint)
        is_whole = mask == read_mask_and_base(find_checkpoint(run).checkpoint)[0]  # no phase came after it
        record = _read_json(run / RECORD_FILE, {})
        plan = _read_json(run / "plan.json", {})
        phases = _read_json(run / "schedule.json", [])
        return RunFacts(
            path=run,
            config=config,
            choice=choice,
            state=state,
            last=last,
            mask=mask,
            base=base,
            parts=_parts(record, plan, is_one_phase=not phases) if is_whole else (),
            rows={"train": state.rows, **record.get("rows", {}), "skipped": _count_lines(run / "skipped_rows.jsonl")},
            task=record.get("task") or str(config.data.task),
            hardware=record.get("hardware", {}),
            phases=[phase for phase in phases if phase["first_step"] <= state.step],
            planned_bytes=plan["memory"]["peak"] if plan else None,
            files=[
                {"for": source["for"], **file}
                for source in _read_json(run / "data_files.json", [])
                for file in source["files"]
            ],
            curves=read_curves(run / METRICS_FILE),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{run} cannot be reported on: a file of it is damaged or missing ({type(error).__name__}: {error}); "
            "expected what train.py wrote"
        ) from None


def _read_json(path: Path, missing: Any) -> Any:
    """Read a JSON file that a run may lack; raises ValueError if it holds another kind of value than ``missing``."""
    if not path.is_file():
        return missing
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    if not isinstance(content, type(missing)):
        raise ValueError(f"{path.name} holds a {type(content).__name__}")
    return content


def _parts(record: Mapping[str, Any], plan: Mapping[str, Any], is_one_phase: bool) -> tuple[AuditRow, ...]:
    """Return the parts of the model; those of the plan for a run that recorded none, if its mask never changed."""
    if "parts" in record:
        return tuple(AuditRow(**part) for part in record["parts"])
    return tuple(AuditRow(**part) for part in plan["mask"]["parts"]) if plan and is_one_phase else ()


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def read_curves(path: Path) -> Curves:
    """Read ``metrics.jsonl``; what is no row of a run in it is left out."""
    rows = read_rows(path)
    training = {row["step"]: row for row in rows if "learning_rate" in row}
    validations = {row["step"]: number(row["eval_loss"]) for row in rows if "eval_loss" in row}
    return Curves(
        tuple(sorted(training)),
        tuple(number(training[step].get("loss")) for step in sorted(training)),
        tuple(number(training[step]["learning_rate"]) for step in sorted(training)),
        tuple(sorted(validations)),
        tuple(validations[step] for step in sorted(validations)),
        max((row["peak_memory_gib"] for row in training.values() if row.get("peak_memory_gib")), default=None),
    )
