"""What may be evaluated: the base of a run, a step of it, exports, deltas and any other model, by one name each."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path

import torch

from toolkit.activation_cache.policy import mask_obstacle
from toolkit.checkpoint.choice import Step
from toolkit.checkpoint.delta import is_delta
from toolkit.checkpoint.run_directory import fold_runs
from toolkit.config.flags import checkpoint_step
from toolkit.config.schema import ModelConfig, RunConfig
from toolkit.data.chat_rendering import Rendering
from toolkit.inference.model_source import cast_weights
from toolkit.inference.open_model import OpenedModel, is_run, load_base, open_model, require_trust
from toolkit.inference.peft_adapter import is_adapter_directory
from toolkit.models.load import Dtype
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
        """Return whether it stands for the model that another source began from."""
        return self.text == BASE and not Path(BASE).exists()

    @property
    def is_run(self) -> bool:
        """Return whether it has steps to choose from."""
        return is_run(Path(self.path)) or bool(fold_runs(Path(self.path)))

    @property
    def has_base(self) -> bool:
        """Return whether it is kept without the model that it began from."""
        path = Path(self.path)
        return self.is_run or self.is_base or is_delta(path) or is_adapter_directory(path)


@dataclass(frozen=True)
class OpenOptions:
    """How models are opened; see ``open_model``."""

    step: Step | None = None
    """Checkpoint of the runs that name none of their own."""
    base: str | Path | None = None
    trust_remote_code: bool = False
    dtype: Dtype | None = None


def open_source(name: ModelName, options: OpenOptions) -> OpenedModel:
    """Open a source that is not ``base``; raises as ``open_model``."""
    step = name.step if name.step is not None else options.step
    return open_model(name.path, step, options.base, options.trust_remote_code, options.dtype)


@dataclass(frozen=True)
class BaseModel:
    """The model that a run or delta began from, and how that reads and renders rows."""

    config: ModelConfig
    run: RunConfig
    rendering: Rendering
    boundary: int | None
    """Frost line of the run; None if it has no frozen prefix."""

    @classmethod
    def of(cls, opened: OpenedModel) -> BaseModel | None:
        """Return the base of a run or delta; None for a whole model."""
        if opened.delta is None:
            return None
        return cls(opened.delta.base.config, opened.config, opened.rendering, boundary_of(opened))

    def open(self, options: OpenOptions) -> OpenedModel:
        """Load the model in the precision in which a run of the same options is computed; raises as ``open_model``."""
        changes = {} if options.base is None else {"name_or_path": str(options.base)}
        config = self.config.model_copy(update=changes)
        require_trust(config, options.trust_remote_code)
        loaded = load_base(config)
        if options.dtype is not None:
            cast_weights(loaded.model, getattr(torch, options.dtype))
        if self.rendering.template is not None:
            loaded.tokenizer.chat_template = self.rendering.template
        return OpenedModel(loaded, self.run, None, None, None, self.rendering)


def boundary_of(opened: OpenedModel) -> int | None:
    """Return the frost line of a run or delta; None if it has no frozen prefix."""
    if opened.delta is None or mask_obstacle(opened.delta.mask) is not None:
        return None
    return opened.delta.mask.boundary
