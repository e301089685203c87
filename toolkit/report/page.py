"""Write the report of a run: one HTML file a language, with no script and nothing from elsewhere."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import toolkit
import toolkit.report.run_view as run_view
import toolkit.report.scores as scores
from toolkit.checkpoint.choice import Step
from toolkit.config.recipe import dump
from toolkit.evaluation.comparison import Comparison
from toolkit.evaluation.verdicts import ModelScores
from toolkit.metrics.resampling import RESAMPLES
from toolkit.report.clean import clean, clean_title
from toolkit.report.facts import RunFacts, read_runs
from toolkit.report.mask_picture import draw_parts
from toolkit.report.methods import methods
from toolkit.report.phrases import Language, Phrases
from toolkit.runtime.errors import DiskError, UsageError
from toolkit.runtime.paths import explain_refused_write, replace_text
from toolkit.runtime.redact import redact
from toolkit.runtime.shipped import command_line

_GENERATOR = "Frostline"
_MODE = 0o600
"""Of the file: answers are as private as the rows."""


def write_report(
    run: Path, comparison: Comparison | None, languages: Sequence[Language] = ("en", "ko"), folder: Path | None = None,
    answers: int = 20, step: Step | None = None,
) -> list[Path]:  # fmt: skip
    """Write the report of a run, or of a directory of folds, and return its files.

    Args:
        run: run directory, or that of ``data.folds``.
        comparison: scores of the run beside others, as ``compare_models`` or ``toolkit.evaluate`` gives them; None
            writes a report without scores, which says so and names the command that adds them.
        languages: ``en`` gives ``report.html``, ``ko`` gives ``report.ko.html``.
        folder: where they are written. Defaults to the run.
        answers: most rows that are shown with their answers.
        step: checkpoint, by its number or as ``latest`` or ``best``. Defaults to the one that was compared, else to the
            latest.

    Raises:
        UsageError: the comparison is not of this run, or there is a file of another origin.
        CheckpointError: ``run`` is no run, has no checkpoint yet, or a file of it is damaged.
        DiskError: a file cannot be written.
    """
    own = None if comparison is None else scores.scores_of(run, comparison)
    runs = read_runs(run, own.step if own is not None and own.step is not None else step)
    paths = report_paths(run if folder is None else folder, languages)
    for language, path in zip(languages, paths, strict=True):
        page = render(run, runs, own, comparison, Phrases(language), answers)
        with explain_refused_write(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, page, _MODE)
    return paths


def report_paths(folder: Path, languages: Sequence[Language]) -> list[Path]:
    """Return the files of a report in a folder.

    Raises:
        UsageError: one is there that is no report, and would be overwritten.
    """
    paths = [folder / ("report.html" if language == "en" else f"report.{language}.html") for language in languages]
    for path in paths:
        if path.exists() and not _is_report(path):
            raise UsageError(f"{path} exists and is no report of Frostline; move it, or write the report elsewhere")
    return paths


def _is_report(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return f'<meta name="generator" content="{_GENERATOR} ' in file.read(1000)
    except OSError as error:
        raise DiskError(f"{path} cannot be read ({error.strerror}); choose another --output-dir") from None


def render(
    run: Path, runs: Sequence[RunFacts], own: ModelScores | None, comparison: Comparison | None, text: Phrases,
    answers: int = 20,
) -> str:  # fmt: skip
    """Return the page in one language; see ``write_report``."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, finalize=_clean, trim_blocks=False
    )
    name = run.resolve().name
    values: dict[str, Any] = {
        "t": text,
        "generator": f"{_GENERATOR} {toolkit.__version__}",
        "title": clean_title(text.plain("title", run=name)),
        "style": Markup((here / "page.css").read_text(encoding="utf-8")),
        "run_name": name,
        **_of_run(run, runs, text),
        **_of_scores(own, comparison, text, answers),
        "methods": methods(runs, own, comparison, text),
    }
    return environment.get_template("page.html").render(values) + "\n"


def _clean(value: object) -> object:
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _of_run(run: Path, runs: Sequence[RunFacts], text: Phrases) -> dict[str, Any]:
    """Return what the page says of the run itself."""
    first = runs[0]
    recipe = shlex.quote(str(first.path / "config.yaml"))
    other = shlex.quote(f"{run}-again") + ("" if len(runs) == 1 else " --data.fold none")
    is_plain = first.state.engine == "local" and first.state.ranks == 1
    return {
        "one_run": len(runs) == 1,
        "about": list(run_view.about(runs, text)),
        "trained": list(run_view.trained(first, text)),
        "parts": first.parts,
        "mask_picture": draw_parts(first.parts, text),
        "phases": list(run_view.phases(first, text)),
        "curves": run_view.curves(runs, text),
        "data": list(run_view.data(runs, text)),
        "files": run_view.files(first, text),
        "data_command": f"{command_line('data-check')} --config {recipe}",
        "cost": list(run_view.cost(runs, text)),
        "on_cpu": first.hardware.get("kind") == "cpu",
        "versions": list(run_view.versions(first, text)),
        "fingerprints": run_view.fingerprints(first, text),
        "train_command": f"{command_line('train')} --config {recipe} --output.dir {other}",
        "repeat_ds": "" if is_plain else text("repeat_ds", engine=first.state.engine, ranks=first.state.ranks),
        "report_command": f"{command_line('report')} {shlex.quote(str(run))}",
        "recipe": redact(dump(first.config)),
    }


def _of_scores(own: ModelScores | None, comparison: Comparison | None, text: Phrases, answers: int) -> dict[str, Any]:
    """Return what the page says of scores and answers; empty without a comparison."""
    if own is None or comparison is None:
        return {"result": "", "cards": [], "side_effects": []}
    columns = scores.columns(own, comparison, text)
    cards = list(scores.answer_cards(own, comparison, answers))
    note = "answers_plain" if not cards or cards[0].base is None else "answers_note"
    return {
        "result": scores.result(own, comparison, text),
        "rows_text": scores.rows_text(comparison, text),
        "columns": columns,
        "lines": scores.lines(columns, comparison, text, details=False),
        "details": scores.lines(columns, comparison, text, details=True),
        "scores_note": text("scores_note", metric=comparison.primary, resamples=f"{RESAMPLES:,}"),
        "answered_note": text("answered_note", answered=comparison.answered) if comparison.answered else "",
        "cards": cards,
        "side_effects": list(scores.side_effects(own.name, comparison, text)),
        "answers_note": text(note, shown=len(cards), answered=comparison.answered),
        "base_name": scores.base_name(own, comparison, text),
    }
