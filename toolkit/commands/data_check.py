"""Look at the data of a recipe before anything is trained on it; changes nothing.

    python launch/data_check.py --config recipes/x.yaml
    python launch/data_check.py --data.path rows.jsonl --html check.html --json check.json
    python launch/data_check.py --data.path rows.jsonl --against ori_pqal.json --test-ids test_ground_truth.json

Prints rows, lengths and what is cut, duplicates and near-duplicates, leaks between training, validation, test and named
test sets (translations too), odd answers, languages, personal identifiers (their places, never themselves), and one row
as the model sees it. Takes every flag of launch/train.py; needs the model's tokenizer, and none of its weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.commands.cli import verb_parser
from toolkit.runtime.errors import DataError
from toolkit.runtime.json_text import to_json
from toolkit.runtime.printable import printable

if TYPE_CHECKING:
    from toolkit.config.schema import RunConfig
    from toolkit.data.check.report import CheckReport


def data_check(
    recipe: str | Path | Mapping[str, Any] | RunConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    against: Sequence[str | Path] = (),
    test_ids: str | Path | None = None,
) -> CheckReport:
    """Look at the data of a recipe; nothing is trained or changed.

    Args:
        recipe: YAML file, nested values, or a ``RunConfig``. Defaults to the quickstart recipe.
        overrides: values by dotted key that override the recipe, as in ``{"data.path": "rows.jsonl"}``.
        against: files or Hub ids of test sets that must not be in the data.
        test_ids: JSON file with the keys of the rows of ``against`` that are the test set, as PubMedQA publishes them.

    Raises:
        UsageError: the recipe is invalid, a file cannot be read, or the tokenizer cannot be loaded.
    """
    from toolkit.commands.invocation import build_invocation

    return _check(build_invocation(recipe, overrides, None).config, [str(path) for path in against], test_ids)


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, check the data and print the report; see ``cli.verb_parser`` for ``program``."""
    from toolkit.config import flags
    from toolkit.runtime.paths import output_file
    from toolkit.runtime.shipped import QUICKSTART, shipped_file

    parser = verb_parser(__doc__, program)
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="FILE",
        help="test sets that must not be in the data: files, Hub ids",
    )
    parser.add_argument(
        "--test-ids", metavar="FILE", help="JSON file with the keys of the rows of --against that are the test set"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the report as JSON")
    parser.add_argument("--html", metavar="FILE", help="also write the report as one HTML page")
    parser.add_argument("--overwrite", action="store_true", help="replace --json and --html if they exist")
    invocation = flags.parse(parser, shipped_file(QUICKSTART), words)
    given = invocation.arguments
    if given.test_ids and not given.against:
        parser.error("--test-ids names rows of --against FILE; add that")
    if given.overwrite and not (given.json or given.html):
        parser.error("--overwrite goes with --json or --html")
    data = invocation.config.data
    reads = [data.path, data.validation, data.test, *given.against, given.test_ids]
    files = {
        option: output_file(Path(name), given.overwrite, option, (name for name in reads if isinstance(name, str)))
        for option, name in (("--json", given.json), ("--html", given.html))
        if name
    }
    report = _check(invocation.config, given.against, given.test_ids)

    from toolkit.data.check.page import page
    from toolkit.data.check.table import table

    print(printable(table(report)))
    if given.json:
        _write(files["--json"], to_json(report.as_dict(), ensure_ascii=False, indent=1))
    if given.html:
        _write(files["--html"], page(report))
    return 0


def _check(config: RunConfig, against: Sequence[str], test_ids: str | Path | None) -> CheckReport:
    """Read the test sets and the tokenizer, then check the data."""
    from toolkit.data.check.check import check_data
    from toolkit.data.check.samples import compared
    from toolkit.data.examples import Encoder
    from toolkit.data.sources import read_rows
    from toolkit.data.template_choice import rendering_of
    from toolkit.inference.open_model import load_tokenizer_of
    from toolkit.models.load import end_tokens_of

    ids = None if test_ids is None else _read_ids(Path(test_ids))
    others = {}
    for path in against:
        others[path] = compared(read_rows(path, None, "--against", "test"), config.data, path, ids)
        if not others[path]:
            of_ids = f" with a key of {test_ids}" if test_ids else ""
            raise DataError(f"--against {path} has no row{of_ids}; expected the rows of a test set")
    tokenizer = load_tokenizer_of(config.model)
    rendering = rendering_of(config.data, tokenizer)
    encoder = Encoder(tokenizer, config.data.max_length, end_tokens_of(config.model), rendering)
    return check_data(config.data, encoder, config.train.seed, config.model.name_or_path, others)


def _write(path: Path, text: str) -> None:
    """Write a report."""
    from toolkit.runtime.paths import explain_refused_write, replace_text

    with explain_refused_write(path.parent):
        replace_text(path, text)


def _read_ids(path: Path) -> frozenset[str]:
    """Return the keys that a JSON file lists: those of an object, or the values of a list."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--test-ids {path} cannot be read ({error}); expected a JSON object or list") from None
    if not isinstance(content, dict | list):
        raise DataError(f"--test-ids {path} holds one {type(content).__name__}; expected a JSON object or list of keys")
    return frozenset(map(str, content))
