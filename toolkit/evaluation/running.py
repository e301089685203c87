"""Run the models of a comparison one after the other, so that one is in memory at a time."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from toolkit.checkpoint.run_directory import fold_runs
from toolkit.data.dataset import load_dataset
from toolkit.data.examples import Encoder
from toolkit.data.rows import shared_rows
from toolkit.data.source_rows import source_rows
from toolkit.data.sources import Source
from toolkit.evaluation.outputs import Asked, Outputs, compute_outputs, encode_rows, encoder_for
from toolkit.evaluation.rows import EvaluatedRows, Part, joined, require_unchanged_rows, rows_for
from toolkit.evaluation.scoring import Scorer
from toolkit.evaluation.sources import BASE, BaseModel, ModelName, OpenOptions, boundary_of, open_source
from toolkit.inference.open_model import OpenedModel
from toolkit.runtime.errors import DataError, UsageError
from toolkit.tasks.sample import Sample

log = logging.getLogger("frostline")


@dataclass(frozen=True)
class Found:
    """Holds what was computed of a source."""

    outputs: Outputs
    step: int | None
    """Step of the checkpoint; None if it is not a run, or several of folds."""


@dataclass(frozen=True)
class Begun:
    """The source that gives the rows, opened: what it gives is computed once all is known to be right."""

    rows: EvaluatedRows
    base: BaseModel | None
    """None for a whole model."""
    encoder: Encoder
    compute: Callable[[], Found]


@dataclass(frozen=True)
class Runner:
    """Computes what models make of rows."""

    names: Sequence[ModelName]
    """All sources."""
    asked: Asked
    options: OpenOptions
    models: int
    """Number of models that may share a prefix."""

    def first(self, name: ModelName, named: Source | None, part: Part) -> Begun:
        """Open the source that gives the rows, and read them; its model is freed with what is returned.

        Raises:
            UsageError: it is a whole model, and its base is needed; or it holds folds, and what is asked is not for
                them.
            DataError: as ``rows_for``.
        """
        if runs := fold_runs(Path(name.path)):
            return self._first_of_folds(name, runs, named)
        opened = self.open(name)
        base = self._base_of(opened, name)
        rows = rows_for(opened, name.path, named, part)
        log.info("evaluating on %s", rows.data)
        return Begun(rows, base, encoder_for(opened, rows), lambda: self._compute(opened, rows, is_first=True))

    def other(self, name: ModelName, rows: EvaluatedRows, is_named: bool) -> Found:
        """Compute another source on the same rows; ``is_named`` if the user named them.

        Raises:
            DataError: its run was trained on some of the rows, which ``is_named`` allows; or it holds folds of others.
        """
        gc.collect()  # the model before is not to be in memory beside this one
        if runs := fold_runs(Path(name.path)):
            own = self._first_of_folds(name, runs, None)
            places = {row.origin: at for at, row in enumerate(own.rows.rows)}
            if is_named or places.keys() != {row.origin for row in rows.rows}:
                raise DataError(f"{name.text} holds folds of other rows than those that are scored; name it by itself")
            order = [places[row.origin] for row in rows.rows]
            for row, at in zip(rows.rows, order, strict=True):
                if not _is_same_question(row.sample, own.rows.rows[at].sample):
                    raise DataError(f"{name.text} reads {row.origin} by another task than the first source does")
            return Found(own.compute().outputs.take(order), None)
        opened = self.open(name)
        if opened.run is not None and not is_named:
            _require_unseen(opened, rows, name.text)
        elif opened.run is None and not is_named:
            log.info("%s: whether it was trained on some of the rows is not known", name.text)
        return self._compute(opened, rows)

    def base(self, base: BaseModel, rows: EvaluatedRows, shots: Sequence[Sample]) -> list[Found]:
        """Compute the base on the same rows, and a second time with answered samples before them, if there are some."""
        gc.collect()
        opened = base.open(self.options)
        line, found = base.boundary, []
        for examples in ((), shots) if shots else ((),):
            found.append(Found(compute_outputs(opened, rows, self.asked, line, self.models, examples), None))
        return found

    def open(self, name: ModelName) -> OpenedModel:
        """Open a source; of several, those take a step or a base's new place that have one."""
        options = self.options
        if any(one.is_run for one in self.names) and not name.is_run:
            options = replace(options, step=None)
        if any(one.has_base for one in self.names) and not name.has_base:
            options = replace(options, base=None)
        return open_source(name, options)

    def _compute(self, opened: OpenedModel, rows: EvaluatedRows, is_first: bool = False) -> Found:
        line = boundary_of(opened)
        outputs = compute_outputs(opened, rows, self.asked, line, self.models, is_first=is_first)
        return Found(outputs, opened.choice.step if opened.choice else None)

    def _first_of_folds(self, name: ModelName, runs: Sequence[Path], named: Source | None) -> Begun:
        """Compute each fold's run on the rows that it held out, one run after the other, and join what they give."""
        if named is not None:
            raise UsageError(f"{name.text} holds folds, each scored on the rows that it held out; name one for others")
        parts, outputs, base, encoder = list[EvaluatedRows](), list[Outputs](), None, None
        for run in runs:
            opened = self.open(ModelName(str(run), str(run), name.step))
            folds = opened.config.data.folds or 0
            if len(runs) != folds:
                raise DataError(f"{name.text} holds {len(runs)} of {folds} folds; train the others first")
            base = base or self._base_of(opened, name)
            rows = rows_for(opened, str(run), None, "test")
            if 0 < self.asked.answers < len(rows.rows):
                raise UsageError("--answers of folds is all or 0: each fold answers the rows that it held out")
            encoder = encoder or encoder_for(opened, rows)
            scorer = Scorer(rows.rows, (), self.asked.answers, self.asked.constrained)
            scorer.require_primary()  # what is asked is right before anything is computed
            parts.append(rows)
            outputs.append(self._compute(opened, rows, is_first=True).outputs)
            del opened
            gc.collect()  # the model of one fold is not to be in memory beside the next
        assert encoder is not None  # there is a fold
        every = joined(parts, f"each by that one of the {len(runs)} folds of {name.text} that did not see it")
        log.info("evaluating on %s", every.data)
        return Begun(every, base, encoder, lambda: Found(Outputs.joined(outputs), None))

    def _base_of(self, opened: OpenedModel, name: ModelName) -> BaseModel | None:
        base = BaseModel.of(opened)
        if base is None and any(one.is_base for one in self.names):
            raise UsageError(
                f"{BASE} is the model that a run began from, and {name.text} is none; name the base itself"
            )
        return base


def _require_unseen(opened: OpenedModel, rows: EvaluatedRows, name: str) -> None:
    """Raise DataError if a run was trained on rows that another one held out."""
    loaded, config = opened.loaded, opened.config
    dataset = load_dataset(config.data, loaded.tokenizer, config.train.seed, loaded.ends, opened.rendering)
    encoder = Encoder(loaded.tokenizer, config.data.max_length, loaded.ends, opened.rendering)
    require_unchanged_rows(dataset, opened, "validation")
    own, starts = encode_rows(encoder, rows.rows)
    seen = set(_rows_of(shared_rows(dataset.train, own), starts))
    if (places := source_rows(dataset.train, rows.examples)) is not None:  # rows of one file, also by another task
        seen |= set(_rows_of(np.flatnonzero(np.isin(places[1], places[0])), rows.starts))
    if seen:
        raise DataError(
            f"{name} was trained on {len(seen)} of the {len(rows.rows)} rows, of which "
            f"{rows.rows[min(seen)].origin} is the first; score runs of "
            "one split together, or name rows with --data.path that none has seen"
        )


def _rows_of(examples: np.ndarray, starts: np.ndarray) -> list[int]:
    """Return the numbers of the rows that some examples belong to."""
    return [int(row) for row in np.searchsorted(starts, examples, "right") - 1]


def _is_same_question(one: Sample, other: Sample) -> bool:
    """Return whether two samples ask the same and have the same options and answer."""
    return (one.turns, one.options, one.label) == (other.turns, other.options, other.label)
