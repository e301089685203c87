"""Train one recipe with several masks, learning rates, epochs or seeds, and compare what each gives for what.

    python launch/sweep.py --sweep.mask.train "last:4 head" "lora last:8" --sweep.train.learning_rate 1e-5 1e-4
    python launch/sweep.py --config recipes/quickstart.yaml --sweep sweep.yaml --launcher "torchrun --nproc_per_node 2"
    python launch/sweep.py --sweep sweep.yaml --slurm --gpus-per-node 1 --time 04:00:00
    python launch/sweep.py --sweep sweep.yaml --table                  # what is finished so far; trains nothing

Takes every flag of launch/train.py; --sweep.KEY names values of any recipe key. Each trial is a run directory in
output.dir (default: runs/RECIPE-sweep), which gets sweep.md, sweep.svg and sweep.json too. Trials share one activation
cache, filled once. Exit codes: 0 done; 1 a trial failed; 2 bad usage, config or data; 75 stopped, start again to go on.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.commands.cli import verb_parser
from toolkit.runtime.errors import ConfigError, UsageError
from toolkit.runtime.printable import printable
from toolkit.runtime.privacy import private_files
from toolkit.runtime.signals import STOPPED, record_signals

if TYPE_CHECKING:
    from toolkit.config.flags import Invocation
    from toolkit.config.schema import RunConfig
    from toolkit.sweeping.definition import SweepDefinition
    from toolkit.sweeping.trials import Sweep


log = logging.getLogger("frostline")


@dataclass(frozen=True)
class SweepResult:
    """The result of ``toolkit.sweep``."""

    directory: Path
    """Holds the runs, ``sweep.md``, ``sweep.svg`` and ``sweep.json``."""
    stopped: bool
    """True if a signal stopped the sweep; the same call goes on from there."""
    trials: tuple[dict[str, Any], ...]
    """What ``sweep.json`` says of each trial: settings, directory, quality, costs, and ``fault`` where one failed."""


def sweep(
    recipe: str | Path | Mapping[str, Any] | RunConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    trials: Sequence[Mapping[str, Any]] = (),
    search: Mapping[str, Any] | None = None,
    ds: str | Path | None = None,
    launcher: Sequence[str] = (),
    test: bool = False,
) -> SweepResult:
    """Train a recipe once for each trial, each in a process of its own, and compare them; goes on where it was.

    Args:
        recipe: YAML file, nested values, or a ``RunConfig``. Defaults to the quickstart recipe.
        overrides: values by dotted key that override the recipe, as in ``{"train.epochs": 1}``.
        grid: values by dotted key, as in ``{"train.learning_rate": [1e-5, 1e-4]}``; every combination is a trial.
        trials: settings of single trials by dotted key, each combined with every combination of ``grid``.
        search: in place of both, as in ``{"trials": 20, "over": {"train.learning_rate": {"low": 1e-5, "high": 1e-3,
            "log": True}}}``: each trial is chosen by the results of the earlier ones. Needs optuna.
        ds: DeepSpeed JSON, as in ``ds_configs/``. Without it torch alone trains.
        launcher: words before the training script, as in ``["torchrun", "--nproc_per_node", "2"]``.
        test: score the trials on the rows of ``data.test`` too, by which nothing is chosen.

    Raises:
        UsageError: recipe, trials or directory are invalid, or this is not the main thread.
        FrostlineError: the sweep cannot go on; a trial that fails does not end it.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("toolkit.sweep listens to signals, which only the main thread can; call it from there")
    with record_signals(), private_files():
        from toolkit.commands.invocation import build_invocation
        from toolkit.sweeping.definition import definition_of
        from toolkit.sweeping.trials import open_sweep

        definition, source = definition_of(grid or {}, trials, "sweep", search), "sweep"
        invocation = build_invocation(recipe, overrides, ds)
        _require_test_rows(invocation, test)
        with open_sweep(invocation, definition, source) as opened:
            is_whole = _train_and_compare(opened, invocation, launcher, test)
    return SweepResult(opened.directory, not is_whole, tuple(trial.as_dict() for trial in opened.trials))


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, then sweep, and return the exit code; see ``cli.verb_parser`` for ``program``."""
    with record_signals():
        from toolkit.runtime.distributed import require_one_process

        require_one_process("sweep.py")
        invocation, definition, source = _parse(words, program)
        arguments = invocation.arguments
        from toolkit.sweeping.report import write_report
        from toolkit.sweeping.results import score_trials
        from toolkit.sweeping.trials import open_sweep

        log.info("recipe %s", invocation.recipe)
        is_dry = bool(arguments.dry_run)
        with open_sweep(invocation, definition, source, writes=not is_dry) as opened:
            if arguments.slurm:
                _submit(opened, invocation)
                return 0
            if arguments.table:
                if not opened.trials:
                    raise UsageError(f"no trial of the search in {opened.directory} has begun; leave out --table")
                is_whole = score_trials(opened, arguments.test)
                write_report(opened)
            else:
                is_whole = _train_and_compare(opened, invocation, arguments.launcher, arguments.test)
    if not is_whole:
        print("sweep stopped by a signal; start the same command again to go on", file=sys.stderr)
        return STOPPED
    print(printable((opened.directory / "sweep.md").read_text(encoding="utf-8")))
    print(printable(f"picture {opened.directory}/sweep.svg, values {opened.directory}/sweep.json"))
    return int(any(trial.fault for trial in opened.trials))


def _train_and_compare(opened: Sweep, invocation: Invocation, launcher: Sequence[str], with_test: bool) -> bool:
    """Run what is left of a sweep, score it and write its report; return False if a signal came first."""
    from toolkit.sweeping.report import write_report
    from toolkit.sweeping.results import score_trials
    from toolkit.sweeping.running import in_processes, run_search, run_trials

    runs = opened.search.count if opened.search else len(opened.trials)
    start = in_processes(launcher, invocation.deepspeed, runs)

    def score() -> bool:
        return score_trials(opened, with_test)

    is_whole = run_trials(opened, start)
    if is_whole:
        is_whole = run_search(opened, invocation.config, start, score) if opened.search else score()
    if is_whole:
        if not opened.trials:
            faults = dict.fromkeys(fault for one in opened.refused for fault in one["faults"])
            raise ConfigError([f"search: nothing that it chose goes together: {fault}" for fault in faults])
        write_report(opened)
    return is_whole


def _submit(opened: Sweep, invocation: Invocation) -> None:
    """Submit what is left: the trial of the lowest frost line as one job, the others as an array that waits for it.

    They continue from the hidden states that it has cached.
    """
    from toolkit.commands.submit import submit_runs
    from toolkit.slurm.request import read_request

    arguments = invocation.arguments
    request, dry_run = read_request(arguments), arguments.dry_run
    left = [
        replace(invocation, config=trial.config, recipe=trial.directory / "config.yaml")
        for trial in opened.in_running_order
        if not trial.is_done
    ]
    if not left:
        print("every trial is finished; leave out --slurm for the table")
        return
    job = submit_runs(left[:1], request, dry_run)
    if left[1:]:
        after = f"--dependency=afterany:{job or 'JOB'}"
        submit_runs(left[1:], replace(request, options=(*request.options, after)), dry_run)
    if not dry_run:
        print("table   the same command with --table in place of --slurm and the flags of the job")


def _parse(words: Sequence[str] | None, program: str | None) -> tuple[Invocation, SweepDefinition, str]:
    """Parse the command line; return the recipe, the trials, and what to call their source."""
    from toolkit.config import flags
    from toolkit.runtime.shipped import QUICKSTART, shipped_file
    from toolkit.slurm.request import add_flags
    from toolkit.sweeping.definition import definition_of, read_definition, take_flags

    grid, rest = take_flags(sys.argv[1:] if words is None else words)
    parser = verb_parser(__doc__, program)
    parser.add_argument(
        "--sweep", type=Path, metavar="FILE", help="YAML file with grid:, trials: or both, or with search:"
    )
    parser.add_argument(
        "--launcher", type=_words, default=[], metavar="WORDS",
        help="words before the script, as 'torchrun --nproc_per_node 2'",
    )  # fmt: skip
    parser.add_argument(
        "--test", action="store_true", help="score the trials on the rows of data.test too, by which nothing is chosen"
    )
    parser.add_argument("--table", action="store_true", help="train nothing: score what is finished, print the table")
    parser.add_argument(
        "--slurm", action="store_true", help="submit the trials as SLURM jobs; takes the flags of a job"
    )
    add_flags(parser)
    invocation = flags.parse(parser, shipped_file(QUICKSTART), rest)
    _check(parser, invocation.arguments, invocation)
    file: Path | None = invocation.arguments.sweep
    source = f"sweep {file}" if file else "sweep"
    definition = read_definition(file) if file else definition_of({}, [], source)
    if in_trials := [key for trial in definition.trials for key in trial if key in grid]:
        raise ConfigError([f"--sweep.{in_trials[0]}: stands in trials of {file} too; leave it out of one"], source)
    definition = definition_of({**definition.grid, **grid}, definition.trials, source, definition.search)
    if definition.search is not None and invocation.arguments.slurm:
        raise ConfigError(["search: each trial waits for the results of the last; leave out --slurm"], source)
    return invocation, definition, source


def _words(text: str) -> list[str]:
    """Parse words as a shell does; for ``add_argument(type=…)``."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of words: {error}; close or escape the quote") from None
    if not words:
        raise argparse.ArgumentTypeError(f"{text!r} has no word; expected some, as 'torchrun --nproc_per_node 2'")
    return words


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace, invocation: Invocation) -> None:
    """End the process if flags contradict each other."""
    from toolkit.slurm.request import add_flags

    if arguments.slurm and (arguments.table or arguments.launcher):
        parser.error("--slurm submits jobs; leave out --table, and --launcher: each rank is a task of the job")
    if arguments.slurm and arguments.test:
        parser.error(
            "--test scores finished trials; leave it out here, and give it with --table once the jobs are done"
        )
    if arguments.table and arguments.launcher:
        parser.error("--table trains nothing, so nothing is launched; leave out --launcher, or --table")
    job = argparse.ArgumentParser()
    add_flags(job)
    given = [action.option_strings[0] for action in job._actions if action.dest != "help"
             and getattr(arguments, action.dest) != action.default]  # fmt: skip
    if given and not arguments.slurm:
        parser.error(f"{given[0]} describes a job; it goes with --slurm")
    if arguments.slurm and any(option.startswith("--dependency") for option in arguments.sbatch):
        parser.error("--sbatch=--dependency is written by sweep.py itself: the other trials wait for the first")
    _require_test_rows(invocation, arguments.test)


def _require_test_rows(invocation: Invocation, with_test: bool) -> None:
    """Raise UsageError if test rows are to be scored and the recipe has none."""
    if with_test and invocation.config.data.test is None:
        raise UsageError("--test scores the rows of data.test, which is none; hold some out with --data.test")
