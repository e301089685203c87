"""Compare models on the same rows: scores with intervals, paired differences, and what trivial answers score."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.checkpoint.run_directory import fold_runs
from toolkit.data.examples import Encoder
from toolkit.data.sources import Source
from toolkit.evaluation.contamination import public_sources
from toolkit.evaluation.events import retrieval_note
from toolkit.evaluation.outputs import Asked, Outputs, fitting_shots
from toolkit.evaluation.rows import EvaluatedRows, Part
from toolkit.evaluation.running import Runner
from toolkit.evaluation.scoring import Scorer
from toolkit.evaluation.sources import BASE, ModelName, OpenOptions
from toolkit.evaluation.verdicts import Entry, ModelScores, Resampling, judge
from toolkit.evaluation.worst_cases import WorstCase
from toolkit.metrics.abstention import CoveragePoint
from toolkit.metrics.pubmedqa import OfficialScore, scores_of_task
from toolkit.runtime.errors import DataError, UsageError
from toolkit.tasks.sample import Sample

log = logging.getLogger("frostline")


@dataclass(frozen=True)
class AnsweredRow:
    """A row with the answers that models generated."""

    id: str
    """Its id, or file and row where it has none."""
    question: str
    contexts: tuple[str, ...]
    reference: str
    answers: Mapping[str, str]
    """By the model's name."""
    constrained: Mapping[str, str] = field(default_factory=dict)
    """Those of constrained decoding, by the model's name; none where it was not asked for."""


@dataclass(frozen=True)
class Comparison:
    """Scores of several models on the same rows. Loss and step of its own are those of the first model named."""

    loss: float
    """Mean cross entropy over all supervised tokens."""
    perplexity: float
    """Its exponential."""
    supervised_tokens: int
    """Number of those tokens."""
    step: int | None
    """Step of the checkpoint; None if the source is not a run."""
    rows: int
    """Number of rows."""
    data: str
    """Origin of the rows, as a phrase."""
    held_out: bool | None
    """True if the run held these rows out; False if it trained on rows of their file, None if that is not known."""
    units: int
    """Rows, or groups of ``data.group_by``, that are independent of each other."""
    answered: int
    """Rows, from the first, that were answered by generation."""
    task: str
    """Task by which the rows were read."""
    primary: str
    """Metric that the task declares; verdicts on the others are corrected for their number (Holm)."""
    against: str | None
    """Model that the others are compared with; None if there is one only."""
    models: tuple[ModelScores, ...]
    """Scores of the models in their order, then of trivial answers."""
    public_sources: tuple[str, ...] = ()
    """Public sources of the rows, as far as they are known."""
    retrieval: str | None = None
    """What the retrieval of a dictionary's terms finds of those of the rows, as a sentence; None without one."""
    drift: Comparison | None = None
    """How far the models moved from their base, on everyday prompts; None if not asked for. Loss and step are those of
    the base there."""
    forgetting: Comparison | None = None
    """Scores on labelled items of another ability; None if not asked for."""
    worst: Mapping[str, tuple[WorstCase, ...]] = field(default_factory=dict)
    """Of labels in an order: the rows furthest below and above their class, by the model's name."""
    abstention: Mapping[str, tuple[CoveragePoint, ...]] = field(default_factory=dict)
    """Of labels in an order: what abstaining below a confidence gives, by the model's name."""
    predictions: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)
    """Of questions with options: the likeliest one by the row's id, by the model's name."""
    truth: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Of questions with options: the right one by the row's id."""
    answered_rows: tuple[AnsweredRow, ...] = field(default=(), repr=False)
    """The rows that were answered by generation."""

    @property
    def contamination(self) -> str | None:
        """Say that the base may have seen the rows before, if their source is public.

        What a base model had seen is not published for most, so that it saw a public source cannot be excluded.
        """
        if not self.public_sources:
            return None
        return (
            f"Rows come from {' and '.join(self.public_sources)}, public before the base was made: that it saw them "
            "cannot be excluded, so both scores may be too high, their difference less so."
        )

    @property
    def official(self) -> dict[str, OfficialScore]:
        """Return PubMedQA's official score of each model and of people, for the task decision; else none."""
        return scores_of_task(self.task, self.predictions, self.truth)

    def as_dict(self) -> dict[str, Any]:
        """Return everything but what single rows have as JSON takes it; values that are not finite are None."""
        values = asdict(replace(self, predictions={}, truth={}, answered_rows=(), drift=None, forgetting=None))
        del values["predictions"], values["truth"], values["answered_rows"]
        more = {"drift": self.drift, "forgetting": self.forgetting}
        return (
            dict(_finite(values))
            | {"contamination": self.contamination, "official": {k: v._asdict() for k, v in self.official.items()}}
            | {name: part and part.as_dict() for name, part in more.items()}
        )


def compare_models(
    sources: Sequence[str], named: Source | None, part: Part, asked: Asked, options: OpenOptions, shots: int = 0,
    seed: int = 42,
) -> Comparison:  # fmt: skip
    """Evaluate models on the same rows and compare them, in this one process.

    Args:
        sources: what to evaluate, as ``ModelName`` reads it; ``base`` is the model that the first run began from.
        named: the rows; None takes those that the first run held out.
        part: which of these.
        asked: what is computed.
        options: how models are opened.
        shots: answered training rows that precede each question to the base, which is then evaluated with and without.
        seed: of resampling, of the shots and of trivial answers.

    Raises:
        UsageError: the sources are none, twice the same, or ``base`` alone; or shots are asked for and there is no base
            or no training row.
        DataError: as ``rows_for`` and ``compute_outputs``.
    """
    names = _names(sources, shots)
    if named is not None:
        named.check_there()  # before a model loads
    first = next(name for name in names if not name.is_base)
    runner = Runner(names, asked, options, len(names) + bool(shots))
    begun = runner.first(first, named, part)
    rows, base = begun.rows, begun.base
    examples = _shots(begun.encoder, rows, shots, seed)
    scorer = Scorer(rows.rows, rows.train, asked.answers, asked.constrained)
    scorer.require_primary()
    if asked.keeps_predictions and scorer.classes is None and not scorer.answered:
        raise DataError("--predictions keeps what each row is given: rows without options need --answers N")
    found = {first: begun.compute()}
    del begun  # and its model
    more: list[Entry] = []
    for name in (name for name in names if name != first):
        if not name.is_base:
            found[name] = runner.other(name, rows, is_named=named is not None)
        elif base is not None:
            found[name], *with_shots = runner.base(base, rows, examples)
            if metrics := scorer.corrected(found[name].outputs):
                more.append(Entry(f"{name.text}, prior-corrected", metrics))
            more += [Entry(f"{name.text}, {shots} shots", scorer.metrics(one.outputs)) for one in with_shots]
    trivial = scorer.trivial(seed)
    more += [Entry(text, metrics, is_trivial=True) for text, metrics in trivial.items()]
    entries = [Entry(name.text, scorer.metrics(found[name].outputs), found[name].step) for name in names]
    own = entries[names.index(first)]
    against = next((name.text for name in names if name.is_base), names[0].text) if len(names) > 1 else None
    comparison = _compare([*entries, *more], own, against, rows, scorer, seed)
    outputs = {name.text: found[name].outputs for name in names}
    predictions = {name: scorer.predictions(of) for name, of in outputs.items()} if scorer.classes is not None else {}
    truth = {key: row.sample.label or "" for key, row in zip(scorer.ids, scorer.rows, strict=True)}
    truth = truth if scorer.classes is not None else {}
    far = {name: scorer.furthest_off(of) for name, of in outputs.items()}
    return replace(
        comparison, predictions=predictions, truth=truth, answered_rows=_answered(scorer, outputs),
        worst={name: worst for name, (worst, _) in far.items() if worst},
        abstention={name: curve for name, (_, curve) in far.items() if curve},
    )  # fmt: skip


def _answered(scorer: Scorer, outputs: Mapping[str, Outputs]) -> tuple[AnsweredRow, ...]:
    """Return the rows that were answered, with the answers of all models."""
    return tuple(
        AnsweredRow(
            key, row.sample.question, row.sample.contexts, row.sample.answer or "",
            {name: of.answers[at] for name, of in outputs.items() if of.answers is not None},
            {name: of.constrained[at] for name, of in outputs.items() if of.constrained is not None},
        )
        for at, (key, row) in enumerate(zip(scorer.ids, scorer.rows[: scorer.answered], strict=False))
    )  # fmt: skip


def _names(sources: Sequence[str], shots: int) -> list[ModelName]:
    """Read the names of the sources."""
    names = [ModelName.parse(source) for source in sources]
    if twice := [name.text for at, name in enumerate(names) if name in names[:at]]:
        raise UsageError(f"{twice[0]} is named twice; name each source once")
    has_base = any(name.is_base for name in names)
    if all(name.is_base for name in names):
        directory = f"; write ./{BASE} for the directory of that name" if Path(BASE).exists() else ""
        raise UsageError(
            f"expected a source, such as a run; {BASE} is the model that one of them began from{directory}"
        )
    if shots and any(fold_runs(Path(name.path)) for name in names):
        raise UsageError("folds know no training rows that all of them may see; leave out --shots")
    if shots and not has_base:
        raise UsageError(f"shots are put before the questions to the base; name {BASE} among the sources")
    return names


def _shots(encoder: Encoder, rows: EvaluatedRows, count: int, seed: int) -> list[Sample]:
    """Draw training rows to put before questions, of each class in turn where rows have options.

    Raises:
        UsageError: there are too few, or no question has room for one.
    """
    if len(rows.train) < count:
        raise UsageError(
            f"{count} shots were asked for, and {len(rows.train)} training rows are known; expected the rows that a "
            "run held out, which leave its training rows to draw from"
        )
    order = np.random.default_rng(seed).permutation(len(rows.train)).tolist()
    seen = Counter[str | None]()
    turns = []
    for at in order:
        label = rows.train[at].sample.label
        turns.append((seen[label], at))
        seen[label] += 1
    shots = [rows.train[at].sample for _, at in sorted(turns, key=lambda turn: turn[0])[:count]]
    fitting = [len(fitting_shots(row.sample, shots, encoder)) for row in rows.rows] if count else []
    if count and not any(fitting):
        raise UsageError(
            f"no question has room for an answered row before it within data.max_length ({rows.config.max_length} "
            "tokens); leave --shots out"
        )
    if count and min(fitting) < count:
        log.warning(
            "data.max_length has room for all %d shots before %d of %d questions, on average for %.1f",
            count, fitting.count(count), len(fitting), float(np.mean(fitting)),
        )  # fmt: skip
    return shots


def _compare(
    entries: Sequence[Entry], first: Entry, against: str | None, rows: EvaluatedRows, scorer: Scorer, seed: int
) -> Comparison:
    """Judge all entries; ``first`` is that of the first model named."""
    resampling = Resampling([row.group for row in rows.rows], seed)
    loss = first.metrics["loss"]
    return Comparison(
        loss.value, first.metrics["perplexity"].value, int(loss.statistics[:, 1].sum()), first.step, len(rows.rows),
        rows.data, rows.held_out, resampling.units(len(rows.rows)), scorer.answered, rows.rows[0].task.name,
        scorer.primary, against, judge(entries, against, scorer.primary, resampling), public_sources(rows.rows),
        retrieval_note(rows),
    )  # fmt: skip


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
