"""What a report says of scores: the result in one sentence, the table of metrics, and answers side by side."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from markupsafe import Markup

from toolkit.evaluation.comparison import AnsweredRow, Comparison
from toolkit.evaluation.sources import BASE, ModelName
from toolkit.evaluation.table import interval, metric_names, number, signed
from toolkit.evaluation.trivial import NEAREST_TO_REFERENCE
from toolkit.evaluation.verdicts import ModelScores, Score, is_detail
from toolkit.metrics.resampling import LEAST_UNITS
from toolkit.report.clean import clean
from toolkit.report.phrases import Phrases
from toolkit.runtime.errors import UsageError

_SENTENCES = {
    "better": "result_better", "worse": "result_worse", "no difference shown": "result_none_shown",
    "too few rows": "result_few", None: "result_undirected",
}  # fmt: skip


def scores_of(run: Path, comparison: Comparison) -> ModelScores:
    """Return the scores of a run, or of a directory of folds.

    Raises:
        UsageError: the comparison has none of it.
    """
    for model in comparison.models:
        if not model.is_trivial and Path(ModelName.parse(model.name).path).resolve() == run.resolve():
            return model
    names = ", ".join(model.name for model in comparison.models if not model.is_trivial)
    raise UsageError(f"the comparison has no scores of {run}; expected one that names it, and it is of {names}")


def result(own: ModelScores, comparison: Comparison, text: Phrases) -> Markup:
    """Say what the declared metric shows of a model, and what the best trivial answer scored."""
    metric, score = comparison.primary, own.scores[comparison.primary]
    other = next((model for model in comparison.models if model.name == comparison.against), None)
    if other is None or score.difference is None:
        first = text(
            "result_alone", metric=metric, value=number(score.value), interval=interval(score.low, score.high)
        )  # fmt: skip
    else:
        base, of = other.scores[metric], score.difference
        values = text(
            "values", value=number(score.value), interval=interval(score.low, score.high), other=number(base.value),
            other_interval=interval(base.low, base.high), difference=signed(of.value),
            difference_interval=interval(of.low, of.high),
        )  # fmt: skip
        first = text(
            _SENTENCES[score.verdict], metric=metric, against=text.named(other.name), values=values, least=LEAST_UNITS
        )
    return first + " " + _trivial(comparison, text)


def _trivial(comparison: Comparison, text: Phrases) -> Markup:
    """Say what the best trivial answer scored; the oracle, which reads the reference, is none that could be given."""
    known = [
        (model.name, model.scores[comparison.primary])
        for model in comparison.models
        if model.is_trivial and model.name != NEAREST_TO_REFERENCE and comparison.primary in model.scores
    ]
    judged = [(name, score) for name, score in known if score.higher_is_better is not None]
    if not judged:
        return text("result_no_trivial")
    name, best = max(judged, key=lambda one: one[1].value if one[1].higher_is_better else -one[1].value)
    return text(
        "result_trivial", name=text.model(name), value=number(best.value), interval=interval(best.low, best.high)
    )


def rows_text(comparison: Comparison, text: Phrases) -> Markup:
    """Say which rows the scores are of."""
    if comparison.held_out is None:
        return text("rows_unknown", rows=comparison.rows)
    if not comparison.held_out:
        return text("rows_seen", rows=comparison.rows)
    seen = text("contamination", sources=", ".join(comparison.public_sources)) if comparison.public_sources else ""
    named = re.search(r"\(data\.(validation|test)", comparison.data)
    part = text(f"of_{named[1]}" if named else "of_folds")
    said = text("rows_held_out", rows=comparison.rows, part=part)
    is_grouped = comparison.units != comparison.rows
    grouped = text("rows_grouped", units=comparison.units) if is_grouped else ""
    return Markup(" ").join(part for part in (said, grouped, seen) if part)


@dataclass(frozen=True)
class Column:
    """A column of the table of metrics."""

    name: str
    model: ModelScores
    shows: str
    """``value``, or ``difference`` with its verdict."""


@dataclass(frozen=True)
class Line:
    """A metric with the cells of all columns."""

    metric: Markup
    """With places at which a long name may break."""
    is_declared: bool
    direction: str
    """Whether higher or lower is better, in words; empty if neither is."""
    cells: Sequence[tuple[str, str, str]]
    """Value, interval and verdict of each column; empty where there is none."""


def columns(own: ModelScores, comparison: Comparison, text: Phrases) -> list[Column]:
    """Return the columns: base, the run with its difference and verdict, other models, trivial answers."""
    base = [model for model in comparison.models if model.name == comparison.against and model is not own]
    found = [Column(text.model(model.name), model, "value") for model in base]
    found.append(Column(text.plain("model_run"), own, "value"))
    if base:
        against = text.model(base[0].name)
        found += [Column(text.plain("difference", against=against), own, "difference")]
    others = [model for model in comparison.models if model is not own and model not in base]
    for model in others:
        name = text.model(model.name)
        found.append(Column(f"{name} ({text.plain('trivial')})" if model.is_trivial else name, model, "value"))
    return found


def lines(table: Sequence[Column], comparison: Comparison, text: Phrases, details: bool) -> list[Line]:
    """Return the metrics, the declared one first; those of single labels or fields where ``details`` is true."""
    found = []
    for metric in metric_names(comparison):
        is_declared = metric == comparison.primary
        if (is_detail(metric) and not is_declared) != details:
            continue
        scores = [column.model.scores.get(metric) for column in table]
        higher = next((score.higher_is_better for score in scores if score is not None), None)
        direction = "" if higher is None else text.plain("higher" if higher else "lower")
        cells = [_cell(column.shows, score, text) for column, score in zip(table, scores, strict=True)]
        found.append(
            Line(
                Markup.escape(clean(metric)).replace("_", Markup("_<wbr>")).replace("/", Markup("/<wbr>")),
                is_declared,
                direction,
                cells,
            )
        )
    return found


def _cell(shows: str, score: Score | None, text: Phrases) -> tuple[str, str, str]:
    of = score.difference if score is not None and shows == "difference" else score
    if score is None or of is None:
        return "–", "", ""
    if of is score:
        return number(of.value), interval(of.low, of.high), ""
    return signed(of.value), interval(of.low, of.high), text.verdict(score.verdict)


@dataclass(frozen=True)
class SideEffect:
    """Shows what training did beside its task, as a table of its own."""

    heading: Markup
    note: Markup
    columns: Sequence[Column]
    lines: Sequence[Line]


def side_effects(own: str, comparison: Comparison, text: Phrases) -> Iterator[SideEffect]:
    """Yield drift and forgetting of the model named ``own``, as far as they were measured."""
    for key, part in (("drift", comparison.drift), ("items", comparison.forgetting)):
        if part is not None:
            model = next(one for one in part.models if one.name == own)
            table = columns(model, part, text)
            yield SideEffect(
                text(f"forgetting_{key}"), text(f"forgetting_{key}_note", rows=part.rows, metric=part.primary), table,
                lines(table, part, text, details=False),
            )  # fmt: skip


@dataclass(frozen=True)
class AnswerCard:
    """A row with the answers of base and run; the words that differ are marked."""

    number: int
    id: str
    question: str
    contexts: tuple[str, ...]
    reference: str
    base: Markup | None
    """None if no base was compared."""
    run: Markup


def answer_cards(own: ModelScores, comparison: Comparison, most: int) -> Iterator[AnswerCard]:
    """Yield the first ``most`` answered rows."""
    base = comparison.against if comparison.against != own.name else None
    for at, row in enumerate(comparison.answered_rows[:most], start=1):
        old, new = _marked(row, base, own.name)
        yield AnswerCard(at, row.id, row.question, row.contexts, row.reference, old, new)


def _marked(row: AnsweredRow, base: str | None, own: str) -> tuple[Markup | None, Markup]:
    """Return both answers with the words that differ marked: ``del`` in the base's, ``ins`` in the run's."""
    if base is None:
        return None, Markup.escape(clean(row.answers[own]))
    old, new = (re.findall(r"(\s*)(\S+)", clean(row.answers[name])) for name in (base, own))
    pieces: tuple[list[Markup], list[Markup]] = ([], [])
    compared = difflib.SequenceMatcher(None, [word for _, word in old], [word for _, word in new], autojunk=False)
    for what, a, b, c, d in compared.get_opcodes():
        for side, tag, words in zip(pieces, ("del", "ins"), (old[a:b], new[c:d]), strict=True):
            blank, joined = words[0][0] if words else "", "".join(chain.from_iterable(words))
            side.append(Markup.escape(blank))
            joined = joined[len(blank) :]
            is_marked = what != "equal" and joined
            side.append(Markup(f"<{tag}>{{}}</{tag}>").format(joined) if is_marked else Markup.escape(joined))
    return Markup("").join(pieces[0]), Markup("").join(pieces[1])


def base_name(own: ModelScores, comparison: Comparison, text: Phrases) -> str:
    """Return what the model that answers are compared with is called."""
    return text.model(comparison.against or BASE) if comparison.against != own.name else ""
