"""Open what a user points at after training: a run, a delta, or a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from toolkit.checkpoint import checkpoints_of, latest_checkpoint
from toolkit.config.load import build, read_recipe
from toolkit.config.schema import ModelConfig, RunConfig
from toolkit.delta import is_delta, load_delta
from toolkit.errors import CheckpointError
from toolkit.models.load import LoadedModel, load


@dataclass(frozen=True)
class Opened:
    """A model ready to answer, and the recipe of its run where it comes from one."""

    loaded: LoadedModel
    config: RunConfig
    """The run's recipe; the defaults where the source is not a run."""
    run: Path | None
    """The run directory, where the source is one."""


def open_source(
    source: str, step: int | None = None, base: str | None = None, trust_remote_code: bool = False
) -> Opened:
    """Load the model behind ``source``.

    Args:
        source: a run directory, a delta, a model directory, a Hub id, or a bundled name.
        step: of a run, the checkpoint to take; none takes the latest.
        base: where the base model of a run or delta is, if it moved.
        trust_remote_code: run code that ships with the base model, if the run or delta was trained with it.

    Raises:
        CheckpointError: the run has no such checkpoint, or the base model changed.
        ModelError: a model cannot be loaded.
    """
    path = Path(source)
    if (path / "config.yaml").is_file():
        config = build(read_recipe(path / "config.yaml"), f"recipe {path}/config.yaml")
        return Opened(load_delta(find_checkpoint(path, step) / "delta", base, trust_remote_code), config, path)
    if is_delta(path):
        return Opened(load_delta(path, base, trust_remote_code), RunConfig(), None)
    model = ModelConfig(name_or_path=source)
    return Opened(load(model), RunConfig(model=model), None)


def find_checkpoint(run: Path, step: int | None) -> Path:
    """The checkpoint of a run at ``step``, or the latest.

    Raises:
        CheckpointError: there is none; lists those there are.
    """
    if step is None:
        if checkpoint := latest_checkpoint(run):
            return checkpoint
        raise CheckpointError(f"{run} has no committed checkpoint yet; expected a run that finished an epoch")
    checkpoint = run / "checkpoints" / f"step-{step:08d}"
    if not checkpoint.is_dir():
        present = ", ".join(path.name for path in checkpoints_of(run)) or "none"
        raise CheckpointError(f"{run} has no checkpoint of step {step}; present: {present}")
    return checkpoint
