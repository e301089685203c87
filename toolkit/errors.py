"""The exception family, and the exit code each member stands for."""

from __future__ import annotations

from collections.abc import Sequence


class FrostlineError(Exception):
    """Base of every error this project raises on purpose; exit code 1.

    The message always says what was found, what was expected and what to do.
    """

    exit_code = 1


class DiskError(FrostlineError):
    """A file of the run cannot be written: the disk is full, over quota or gone."""


class UsageError(FrostlineError):
    """The user's input is at fault: a recipe, a flag, a mask, a model name or data; exit code 2."""

    exit_code = 2


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
