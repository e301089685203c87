"""Frostline: partial fine-tuning of causal language models where cost follows the trained suffix.

The functions below are what the ``frostline`` command and ``launch/*.py`` call. Importing this package imports neither
torch nor transformers; the first use of a name does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolkit.commands.data_check import data_check
    from toolkit.commands.evaluate import evaluate
    from toolkit.commands.export import export
    from toolkit.commands.generate import generate
    from toolkit.commands.plan import PlanReport, plan
    from toolkit.commands.sweep import SweepResult, sweep
    from toolkit.commands.train import TrainResult, train
    from toolkit.config.schema import RunConfig
    from toolkit.evaluation.comparison import Comparison
    from toolkit.runtime.errors import FrostlineError

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "FrostlineError",
    "PlanReport",
    "RunConfig",
    "SweepResult",
    "TrainResult",
    "data_check",
    "evaluate",
    "export",
    "generate",
    "plan",
    "sweep",
    "train",
]

_MODULES = {
    "Comparison": "toolkit.evaluation.comparison",
    "FrostlineError": "toolkit.runtime.errors",
    "PlanReport": "toolkit.commands.plan",
    "RunConfig": "toolkit.config.schema",
    "SweepResult": "toolkit.commands.sweep",
    "TrainResult": "toolkit.commands.train",
    "data_check": "toolkit.commands.data_check",
    "evaluate": "toolkit.commands.evaluate",
    "export": "toolkit.commands.export",
    "generate": "toolkit.commands.generate",
    "plan": "toolkit.commands.plan",
    "sweep": "toolkit.commands.sweep",
    "train": "toolkit.commands.train",
}
"""Where each public name is defined."""


def __getattr__(name: str) -> object:
    """Import a public name on its first use (PEP 562).

    Raises:
        AttributeError: there is no such name.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted({*globals(), *__all__})
