"""The exception family, and the exit code each member stands for."""

from __future__ import annotations

import copyreg
from collections.abc import Sequence
from typing import Any

from toolkit.runtime.shipped import command_line


class FrostlineError(Exception):
    """Base of all errors that Frostline raises on purpose; exit code 1.

    The message says what was found, what was expected and what to do.
    """

    exit_code = 1
    on_every_rank = False
    """True if every rank raises the same error, so that only one of them prints it."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle message and attributes, for other ranks: some members take other arguments than their message."""
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


class TrainingStoppedError(FrostlineError):
    """Training cannot go on; committed checkpoints are kept. Every rank raises it at the same step."""

    on_every_rank = True


class OutOfMemoryError(FrostlineError):
    """An allocation failed; see ``toolkit.runtime.out_of_memory``.

    ``detail`` is the allocator's message, ``advice`` the setting to change first; None refers to the memory plan.
    """

    def __init__(self, phase: str, shape: str | None, detail: str, advice: str | None = None) -> None:
        self.phase, self.shape, self.detail = phase, shape, detail
        batch = f", on a micro batch of {shape}" if shape else ""
        remedy = f"Change first: {advice}" if advice else f"{command_line('plan')} shows what takes the memory"
        super().__init__(f"out of memory during {phase}{batch} ({detail}); committed checkpoints are kept. {remedy}")


class DiskError(FrostlineError):
    """A file of the run cannot be written: the disk is full, over quota or unmounted."""


class UsageError(FrostlineError):
    """The user's input is invalid: a recipe, flag, mask, model name or data; exit code 2."""

    exit_code = 2
    on_every_rank = True


class InTheWayError(UsageError):
    """Something that is not ours, or no file, is where a rank writes a file; other ranks may not meet it."""

    on_every_rank = False


class ConfigError(UsageError):
    """One or more faults in the recipe, the flags or the DeepSpeed file, all reported at once."""

    def __init__(self, faults: Sequence[str], source: str = "configuration") -> None:
        self.faults = list(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__("\n".join([f"{count} in the {source}:", *(f"  - {fault}" for fault in self.faults)]))


class ModelError(UsageError):
    """A model or tokenizer cannot be found, loaded or understood."""


class MaskError(UsageError):
    """A layer mask selects nothing, selects the wrong thing, or conflicts with tied weights."""


class DataError(UsageError):
    """A data file or row cannot be used."""


class CheckpointError(UsageError):
    """A run directory, checkpoint or export is missing, incomplete or does not fit the run."""


class SlurmError(UsageError):
    """SLURM is not on this machine, cannot be reached, or refuses the job."""


class PlanError(UsageError):
    """The cost of a run cannot be planned without its weights or data."""
