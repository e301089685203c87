"""Write the report of a run: one HTML file a language, with result, curves, answers, cost and methods.

    python launch/report.py runs/quickstart                          # scores it beside its base first
    python launch/report.py runs/quickstart --language ko --answers 50
    python launch/report.py runs/quickstart --part test              # to report on, once
    python launch/report.py runs/quickstart --no-evaluation          # what the run wrote alone
    python launch/report.py runs/folds                               # each row by the fold that did not see it

Prints the paths of the files, report.html and report.ko.html, which need no other file and no network.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from toolkit.commands.cli import verb_parser
from toolkit.runtime.errors import DataError, UsageError

if TYPE_CHECKING:
    from toolkit.evaluation.comparison import Comparison
    from toolkit.report.phrases import Language

ANSWERS = 20
"""Rows that are answered and shown, unless the command says otherwise."""
_MOST_SHOWN = 100
"""Most rows that are shown, however many are answered."""


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, then evaluate and write, and return the exit code; see ``cli.verb_parser``."""
    arguments = _parse(words, program)
    from toolkit.report.facts import read_runs
    from toolkit.report.page import report_paths, write_report
    from toolkit.runtime.distributed import require_one_process

    require_one_process("report.py")

    folder = arguments.output_dir or arguments.run
    runs = read_runs(arguments.run, arguments.step)
    report_paths(folder, arguments.language)
    if folder.exists() and not os.access(folder, os.W_OK):
        raise UsageError(f"{folder} cannot be written; name another folder with --output-dir")
    comparison = None if arguments.no_evaluation else _compare(arguments, has_folds=runs[0].path != arguments.run)
    shown = min(max(arguments.answers or 0, ANSWERS), _MOST_SHOWN)
    for path in write_report(arguments.run, comparison, arguments.language, folder, shown, arguments.step):
        print(path)
    return 0


def _compare(arguments: argparse.Namespace, has_folds: bool) -> Comparison:
    """Evaluate base and run on the rows that the run held out.

    Raises:
        UsageError: it held out none.
    """
    from toolkit.commands.evaluate import evaluate
    from toolkit.config.recipe import read_saved
    from toolkit.evaluation.scoring import SeveralTasksError
    from toolkit.evaluation.sources import BASE

    if not has_folds:
        data = read_saved(arguments.run / "config.yaml").data
        held_out = {"validation": data.validation, "test": data.test if data.fold is None else data.fold}
        if held_out[arguments.part] is None:
            other = "test" if arguments.part == "validation" else "validation"
            advice = f"score the others with --part {other}, or " if held_out[other] is not None else ""
            raise UsageError(
                f"{arguments.run} held no {arguments.part} rows out to be scored on; {advice}add --no-evaluation for a "
                "report without scores"
            )
    answers = arguments.answers if arguments.answers is not None else 0 if has_folds else ANSWERS
    evaluate_run = partial(
        evaluate, [BASE, arguments.run], batch_size=arguments.batch_size, max_new_tokens=arguments.max_new_tokens,
        step=arguments.step, base=arguments.base,
        trust_remote_code=arguments.trust_remote_code, dtype=arguments.dtype, part=arguments.part,
        drift=arguments.drift, drift_max_new_tokens=arguments.drift_max_new_tokens, forgetting=arguments.forgetting,
        forgetting_task=arguments.forgetting_task,
    )  # fmt: skip
    try:
        return evaluate_run(answers=answers)
    except SeveralTasksError:
        if arguments.answers is not None:
            raise
        return evaluate_run(answers=0)  # rows of several tasks have the loss alone in common
    except DataError as error:
        raise DataError(
            f"{error}\nA report scores the rows that its run held out; --no-evaluation makes one without scores"
        ) from None


def _languages(text: str) -> list[Language]:
    """Read ``en``, ``ko`` or both with a comma between them; for ``add_argument(type=…)``."""
    from toolkit.report.phrases import Language

    found = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [part for part in found if part not in get_args(Language)]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no language of reports; expected en, ko or en,ko")
    return found  # type: ignore[return-value]


def _parse(words: Sequence[str] | None, program: str | None) -> argparse.Namespace:
    """Parse the command line, and end the process if flags contradict each other."""
    from toolkit.commands.side_effect_flags import add_side_effect_flags, check_side_effect_flags
    from toolkit.config import flags

    parser = verb_parser(__doc__, program)
    parser.add_argument("run", type=Path, help="run directory, or that of data.folds")
    parser.add_argument(
        "--language", type=_languages, default="en,ko", metavar="{en,ko}",
        help="en, ko, or both with a comma between them; default: en,ko",
    )  # fmt: skip
    parser.add_argument(
        "--answers", type=flags.row_count, metavar="{N,all}",
        help="answer so many rows by generation, score the answers and show them beside those of the base; default: "
        f"{ANSWERS}, of folds 0",
    )  # fmt: skip
    parser.add_argument(
        "--part", choices=("validation", "test"), default="validation",
        help="rows that the run held out: to choose by (data.validation), or to report on (data.test); default: "
        "validation. Of folds it is what each held out",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=flags.positive_int, default=1, help="rows computed at once; default: 1")
    parser.add_argument(
        "--max-new-tokens", type=flags.positive_int, default=256, help="longest answer in tokens; default: 256"
    )
    parser.add_argument("--output-dir", type=Path, metavar="FOLDER", help="where to write; default: the run")
    parser.add_argument(
        "--no-evaluation", action="store_true", help="load no model: report what the run wrote, without scores"
    )
    add_side_effect_flags(parser)
    flags.add_open_model_flags(parser, "precision to compute in; default: the run's")
    arguments = parser.parse_args(words)
    check_side_effect_flags(parser, arguments)
    if arguments.no_evaluation:
        unused = {
            "--answers": arguments.answers is not None, "--part": arguments.part != "validation",
            "--batch-size": arguments.batch_size != 1, "--max-new-tokens": arguments.max_new_tokens != 256,
            "--base": arguments.base is not None, "--trust-remote-code": arguments.trust_remote_code,
            "--dtype": arguments.dtype is not None, "--drift": arguments.drift,
            "--forgetting": arguments.forgetting is not None,
        }  # fmt: skip
        if given := [name for name, is_given in unused.items() if is_given]:
            parser.error(f"{given[0]} goes with an evaluation; leave out one of it and --no-evaluation")
    if arguments.output_dir is not None and arguments.output_dir.is_file():
        parser.error(f"--output-dir {arguments.output_dir} is a file; expected a folder")
    return arguments
