"""Have people compare the answers of two models, without telling them which is which.

    python launch/rate.py make out/base.jsonl out/run.jsonl --output sheets            # a workbook for each rater
    python launch/rate.py make a.jsonl b.jsonl --output sheets --language ko --rows 100 --raters 3
    python launch/rate.py read rater_1.xlsx rater_2.xlsx --key sheets/key.json         # what they say, as it comes back

The files of answers are those of evaluate --answers N --predictions FOLDER, or of generate --output. Send raters their
workbook alone: key.json says which answer is whose, and is needed to read the sheets.
"""

from __future__ import annotations

import argparse
import logging
import re
import uuid
from collections.abc import Sequence
from pathlib import Path

from toolkit.commands.cli import verb_parser
from toolkit.runtime.json_text import to_json
from toolkit.runtime.printable import printable, printable_json

log = logging.getLogger("frostline")


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, make or read sheets, and return the exit code; see ``cli.verb_parser``."""
    arguments = _parse(words, program)
    return _make(arguments) if arguments.action == "make" else _read(arguments)


def _make(arguments: argparse.Namespace) -> int:
    """Write the workbooks and their key into the folder."""
    from toolkit.evaluation.rating.sheet import SheetOptions, make_sheets
    from toolkit.runtime.errors import UsageError
    from toolkit.runtime.paths import explain_refused_write, publish, replace_text

    folder: Path = arguments.output
    options = SheetOptions(
        arguments.rows, arguments.criteria, arguments.scale, arguments.raters, arguments.language,
        arguments.show_reference, arguments.seed,
    )  # fmt: skip
    names = ["key.json", *(f"rater_{rater}.xlsx" for rater in range(1, options.raters + 1))]
    if (there := [name for name in names if (folder / name).exists()]) and not arguments.overwrite:
        raise UsageError(
            f"{folder} holds {', '.join(there)}; --overwrite replaces them, and what raters wrote with a key that is "
            "replaced cannot be read any more; another --output leaves them"
        )
    made = make_sheets(arguments.a, arguments.b, options)
    if made.same:
        log.info("%d rows are left out: both answers are the same", made.same)
    if made.cut:
        log.warning("%d texts were cut, visibly: a cell of Excel holds 32,767 characters", made.cut)
    if made.rows < options.rows and not arguments.takes_all:
        log.info("%d rows have two answers to compare, fewer than the %d asked for", made.rows, options.rows)
    with explain_refused_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
        key = folder / "key.json"
        replace_text(key, made.key.as_json(), 0o600)
        for name, content in made.workbooks.items():
            publish(content, folder / name, folder / f".{name}.{uuid.uuid4().hex}.staging")
            print(folder / name)
    log.info("%d rows for each of %d raters; %s tells which answer is whose: send it to none of them",
             made.rows, options.raters, key)  # fmt: skip
    return 0


def _read(arguments: argparse.Namespace) -> int:
    """Print what the sheets show, as a table and as JSON."""
    from toolkit.evaluation.rating.filled import read_sheets
    from toolkit.evaluation.rating.key import read_key
    from toolkit.evaluation.rating.result import summarise
    from toolkit.evaluation.rating.table import table
    from toolkit.runtime.errors import UsageError
    from toolkit.runtime.paths import explain_refused_write, output_file, replace_text

    output: Path | None = arguments.output
    if output is not None:
        output = output_file(output, arguments.overwrite, reads=(arguments.key, *arguments.sheets))
        if output.suffix == ".xlsx" and output.exists():
            raise UsageError(f"{output} is a workbook, as of a rater; name a file for JSON")
    key = read_key(arguments.key)
    sheets = read_sheets(arguments.sheets, key)
    if len(sheets) < len(key.sheets):
        log.info("%d of %d sheets are read", len(sheets), len(key.sheets))
    result = summarise(sheets, key, arguments.seed)
    for line in table(result):
        print(printable(line))
    text = to_json(result.as_dict(), ensure_ascii=False)
    if output is not None:
        with explain_refused_write(output.parent):
            replace_text(output, f"{text}\n")
    print(printable_json(text))
    return 0


def _parse(words: Sequence[str] | None, program: str | None) -> argparse.Namespace:
    """Parse the command line, and end the process if flags contradict each other."""
    from toolkit.config import flags

    parser = verb_parser(__doc__, program)
    actions = parser.add_subparsers(dest="action", required=True, metavar="{make,read}")
    make = actions.add_parser("make", allow_abbrev=False, help="write a workbook for each rater, and their key")
    make.add_argument("a", type=Path, metavar="A.jsonl", help="answers of a model")
    make.add_argument(
        "b", type=Path, metavar="B.jsonl", help="answers of the one it is compared with, to the same rows"
    )
    make.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="folder for rater_N.xlsx and key.json"
    )
    make.add_argument(
        "--rows", type=flags.row_count, default=50, metavar="{N,all}",
        help="most rows, drawn of those whose answers differ; below 50 no difference is claimed; default: 50",
    )  # fmt: skip
    make.add_argument(
        "--criteria", type=_criteria, default="correct,complete,harmless,fluent", metavar="NAME,…",
        help="what each answer is rated for; the sheet explains the default ones; default: %(default)s",
    )  # fmt: skip
    make.add_argument(
        "--scale", type=_scale, default="1-5", metavar="LOW-HIGH", help="lowest and highest rating; default: 1-5"
    )
    make.add_argument("--raters", type=flags.positive_int, default=2, help="workbooks to write; default: 2")
    make.add_argument("--language", choices=("en", "ko"), default="en", help="of the sheet; default: en")
    make.add_argument("--show-reference", action="store_true", help="show the reference beside the answers")
    make.add_argument("--seed", type=flags.whole_number, default=42, help="of rows, their order and sides; default: 42")
    make.add_argument("--overwrite", action="store_true", help="replace sheets and key in the folder")
    read = actions.add_parser("read", allow_abbrev=False, help="print what filled workbooks show")
    read.add_argument("sheets", type=Path, nargs="+", metavar="SHEET.xlsx", help="workbooks that came back")
    read.add_argument("--key", type=Path, required=True, metavar="FILE", help="the key.json that was made with them")
    read.add_argument("--output", type=Path, metavar="FILE", help="file for the JSON, which is printed too")
    read.add_argument("--seed", type=flags.whole_number, default=42, help="of resampling; default: 42")
    read.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    parser.epilog = f"{make.format_help()}\n{read.format_help()}"
    arguments = parser.parse_args(words)
    if arguments.action == "make":
        arguments.takes_all = arguments.rows == flags.row_count("all")
        if not arguments.rows:
            make.error("--rows 0 leaves nothing to rate; expected a number from 1, or all")
        if arguments.output.is_file():
            make.error(f"--output {arguments.output} is a file; expected a folder")
    else:
        if arguments.output is not None and arguments.output.is_dir():
            read.error(f"--output {arguments.output} is a directory; expected a file")
        if arguments.overwrite and not arguments.output:
            read.error("--overwrite goes with --output")
    return arguments


def _criteria(text: str) -> tuple[str, ...]:
    """Parse names divided by commas."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if not name or not name.isprintable() or len(name) > 40 or name == "preference":
            raise argparse.ArgumentTypeError(
                f"{name!r} is no name of a criterion; expected 1 to 40 characters, and another one than preference"
            )
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names a criterion twice")
    return names


def _scale(text: str) -> tuple[int, int]:
    """Parse the lowest and the highest rating."""
    found = re.fullmatch(r"(\d{1,2})-(\d{1,3})", text)
    low, high = (int(found[1]), int(found[2])) if found else (0, 0)
    if not low < high <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no scale; expected two whole numbers up to 100, as 1-5")
    return low, high
