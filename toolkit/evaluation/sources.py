"""What may be evaluated: the base of a run, a step of it, exports, deltas and any other model, by one name each."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path

import torch

from toolkit.activation_cache.policy import mask_obstacle
from toolkit.checkpoint.choice import Step
from toolkit.checkpoint.delta import Base, Delta, is_delta
from toolkit.checkpoint.manifest import MANIFEST_FILE
from toolkit.checkpoint.run_directory import fold_runs
from toolkit.config.flags import checkpoint_step
from toolkit.config.recipe import read_saved
from toolkit.config.schema import ModelConfig, RunConfig
from toolkit.data.chat_rendering import Rendering
from toolkit.inference.base_check import require_same_base, require_trust
from toolkit.inference.model_source import cast_weights
from toolkit.inference.open_model import (
    OpenedModel,
    data_settings,
    is_run,
    load_base,
    open_model,
    read_run,
    read_trained,
)
from toolkit.inference.peft_adapter import is_adapter_directory
from toolkit.models.load import Dtype, LoadedModel
from toolkit.runtime.errors import UsageError

BASE = "base"
"""Name of the model that a run began from."""


@dataclass(frozen=True)
class ModelName:
    """The name of a model to evaluate, as it is written on the command line."""

    text: str
    path: str
    """Without ``@STEP``."""
    step: Step | None = None

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """Read ``SOURCE`` or ``SOURCE@STEP``; a directory whose own name has an @ is taken as it is.

        A checkpoint within a run is a step of that run, whose rows are known.

        Raises:
            UsageError: what follows the @ is no step.
        """
        if (of_run := re.fullmatch(r"(.+)/checkpoints/step-(\d+)/?", text)) and is_run(Path(of_run[1])):
            return cls(text, of_run[1], int(of_run[2]))
        path, at, step = text.rpartition("@")
        if not at or Path(text).exists() or not Path(path).exists():
            return cls(text, text)
        try:
            return cls(text, path, checkpoint_step(step))  # type: ignore[arg-type]
        except ArgumentTypeError:
            raise UsageError(f"{text}: {step!r} is no step of {path}; expected a number, latest or best") from None

    @property
    def is_base(self) -> bool:
        """Return whether it stands for the model that another source began from: a directory ``base`` is ``./base``."""
        return self.text == BASE

    @property
    def is_run(self) -> bool:
        """Return whether it has steps to choose from."""
        return is_run(Path(self.path)) or bool(fold_runs(Path(self.path)))

    @property
    def knows_base(self) -> bool:
        """Return whether ``BaseModel.read`` finds the model that it began from."""
        path = Path(self.path)
        return is_run(path) or (path / MANIFEST_FILE).is_file() or is_delta(path)

    @property
    def has_base(self) -> bool:
        """Return whether it is kept without the model that it began from."""
        path = Path(self.path)
        return self.is_run or self.is_base or is_delta(path) or is_adapter_directory(path)


@dataclass(frozen=True)
class OpenOptions:
    """Says how models are opened; see ``open_model``."""

    step: Step | None = None
    """Checkpoint of the runs that name none of their own."""
    base: str | Path | None = None
    trust_remote_code: bool = False
    dtype: Dtype | None = None
    plain_template: str | None = None
    """Chat template of models that have none of their own."""


def open_source(name: ModelName, options: OpenOptions) -> OpenedModel:
    """Open a source that is not ``base``; raises as ``open_model``."""
    opened = open_model(name.path, _step(name, options), options.base, options.trust_remote_code, options.dtype)
    _give_template(opened.loaded, options)
    return opened


def _step(name: ModelName, options: OpenOptions) -> Step | None:
    return name.step if name.step is not None else options.step


def _give_template(loaded: LoadedModel, options: OpenOptions) -> None:
    if not loaded.tokenizer.chat_template and options.plain_template is not None:
        loaded.tokenizer.chat_template = options.plain_template


@dataclass(frozen=True)
class BaseModel:
    """The model that a run or delta began from, and how that reads and renders rows."""

    config: ModelConfig
    run: RunConfig
    rendering: Rendering
    boundary: int | None
    """Frost line of the run; None if it has no frozen prefix."""
    base: Base
    """What it was when the training began."""

    @classmethod
    def of(cls, opened: OpenedModel) -> BaseModel | None:
        """Return the base of a run or delta; None for a whole model."""
        if opened.delta is None:
            return None
        return cls(opened.delta.base.config, opened.config, opened.rendering, boundary_of(opened), opened.delta.base)

    @classmethod
    def read(cls, name: ModelName, options: OpenOptions) -> BaseModel | None:
        """Return the base of a run, checkpoint or delta, of which no model is loaded; None for another source.

        Raises:
            CheckpointError: as ``read_run`` and ``read_trained``.
        """
        path = Path(name.path)
        if is_run(path):
            _, delta = read_run(path, _step(name, options))
            run = read_saved(path / "config.yaml")
        elif name.knows_base:
            delta, run = read_trained(path), RunConfig()
        else:
            return None
        return cls(delta.base.config, run, data_settings(name.path)[1], _boundary(delta), delta.base)

    def open(self, options: OpenOptions) -> OpenedModel:
        """Load the model in the precision in which a run of the same options is computed; raises as ``open_model``."""
        changes = {} if options.base is None else {"name_or_path": str(options.base)}
        config = self.config.model_copy(update=changes)
        require_trust(config, options.trust_remote_code)
        loaded = load_base(config)
        require_same_base(loaded, self.base, config)
        if options.dtype is not None:
            cast_weights(loaded.model, getattr(torch, options.dtype))
        if self.rendering.template is not None:
            loaded.tokenizer.chat_template = self.rendering.template
        _give_template(loaded, options)
        return OpenedModel(loaded, self.run, None, None, None, self.rendering)


def boundary_of(opened: OpenedModel) -> int | None:
    """Return the frost line of a run or delta; None if it has no frozen prefix."""
    return None if opened.delta is None else _boundary(opened.delta)


def _boundary(delta: Delta) -> int | None:
    return None if mask_obstacle(delta.mask) is not None else delta.mask.boundary
