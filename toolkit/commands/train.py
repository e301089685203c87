"""Fine-tune the part of a language model that a layer mask selects.

One process:        python launch/train.py --config recipes/quickstart.yaml
DeepSpeed ZeRO:     deepspeed launch/train.py --ds ds_configs/zero2.json
Other launchers:    torchrun | accelerate launch | srun python ... launch/train.py ...

Exit codes: 0 done; 1 failed; 2 bad usage, config or data; 75 stopped by SIGTERM, SIGUSR1, SIGHUP or Ctrl-C with
nothing lost, start again to go on; 130 a second Ctrl-C.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.commands.cli import exit_process, run_command, verb_parser
from toolkit.runtime.errors import TrainingStoppedError, UsageError
from toolkit.runtime.privacy import group_files, private_files
from toolkit.runtime.signals import STOPPED, record_signals

if TYPE_CHECKING:
    from toolkit.config.schema import RunConfig


@dataclass(frozen=True)
class TrainResult:
    """The result of ``toolkit.train``."""

    run: Path
    """Run directory, which ``toolkit.evaluate``, ``generate`` and ``export`` take."""
    stopped: bool
    """True if a signal stopped the run after a committed checkpoint; the same call continues from it."""


def train(
    recipe: str | Path | Mapping[str, Any] | RunConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    ds: str | Path | None = None,
    resume_override: bool = False,
) -> TrainResult:
    """Train a run to its end, or continue an interrupted one; under a launcher every rank calls it.

    Meanwhile SIGTERM, SIGUSR1, SIGHUP and SIGINT stop it after it has committed a checkpoint; the former signal
    handlers are restored afterwards. Its files are this user's alone, whatever the umask (docs/privacy.md).
    It logs to the logger ``frostline`` and does not configure logging.

    Args:
        recipe: YAML file, nested values, or a ``RunConfig``. Defaults to the quickstart recipe.
        overrides: values by dotted key that override the recipe, as in ``{"train.epochs": 1}``.
        ds: DeepSpeed JSON, as in ``ds_configs/``. Without it torch alone trains.
        resume_override: continue a run although harmless keys (learning rate, epochs …) differ.

    Raises:
        UsageError: the recipe, data, model, mask or run directory is invalid, or this is not the main thread.
        FrostlineError: training cannot go on.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("toolkit.train listens to signals, which only the main thread can; call it from there")
    with record_signals(), private_files(), _restored_environment():
        from toolkit.commands.invocation import build_invocation
        from toolkit.training.run import run

        directory: list[Path] = []
        invocation = build_invocation(recipe, overrides, ds, resume_override)
        code = run(invocation, directory.append)
    if ds is not None:
        from toolkit.engine.deepspeed.process_groups import reset_process_groups

        reset_process_groups()
    if not directory:
        raise TrainingStoppedError("a signal stopped the run before it had a directory; call again to begin it")
    if code == 0:
        _report(directory[0], invocation.config)
    return TrainResult(directory[0], stopped=code == STOPPED)


@contextmanager
def _restored_environment() -> Iterator[None]:
    """Restore the launcher's variables, which joining the process group sets and child processes would inherit."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ[name] for name in names if name in os.environ}
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, then train, and return the exit code; see ``cli.verb_parser`` for ``program``."""
    with record_signals():  # before the slow imports, so that they can be stopped too
        from toolkit.config import flags
        from toolkit.runtime.shipped import QUICKSTART, shipped_file

        parser = verb_parser(__doc__, program)
        flags.add_resume_override(parser)
        flags.add_shared_by(parser)
        invocation = flags.parse(parser, shipped_file(QUICKSTART), words)
        from toolkit.training.run import run  # imports torch, which --help and a faulty recipe need not wait for

        directory: list[Path] = []
        code = run(invocation, directory.append)
    if code == 0 and directory:
        _report(directory[0], invocation.config)  # a signal ends it at once: the run is whole
    return code


def _report(run: Path, config: RunConfig) -> None:
    """Write the report of a run that has ended, on rank 0."""
    from toolkit.runtime.distributed import read_world

    if config.output.report and read_world().is_main:
        from toolkit.report.after_training import report_after_training

        with group_files(config.output.share == "group"):
            report_after_training(run, config)


if __name__ == "__main__":  # python -m toolkit.commands.train, for launchers where there is no checkout
    exit_process(run_command(main))
