"""Have several runs over one base answer the steps of the clinical road about a note, its common tokens computed once.

A step is asked when those before it have answered, and as often as its rules want. What all prompts begin with, the
note, has passed the shared blocks before; each task goes on from there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from toolkit.clinical.road import NOTE_FAULTS, RECORDS_COLUMN, AskedStep
from toolkit.data.questions import RowReader
from toolkit.data.sources import Row
from toolkit.inference.answering import Answerer
from toolkit.inference.open_model import OpenedModel
from toolkit.inference.shared_prefix import SharedNote, SharedPrefix
from toolkit.inference.verified import drawing_again
from toolkit.runtime.out_of_memory import explain_out_of_memory
from toolkit.tasks.columns import loose
from toolkit.tasks.sample import Sample


@dataclass(frozen=True)
class StepModel:
    """Answers a step: a run's model, and how it reads rows."""

    opened: OpenedModel
    answerer: Answerer
    reader: RowReader


class NoteModels:
    """Answers as ``clinical.road.Respondent``; ``models`` by step share all blocks below ``boundary``."""

    def __init__(self, models: Mapping[str, StepModel], boundary: int) -> None:
        self.steps = list(models)
        self.models = models
        self.shared = SharedPrefix({step: model.answerer for step, model in models.items()}, boundary)
        self._number = 0
        self._values: Mapping[str, Any] = {}
        self._shared_note: SharedNote | None = None

    def begin(self, number: int, values: Mapping[str, Any]) -> None:
        """Take up a note; nothing is run before a model is to answer."""
        self._number, self._values, self._shared_note = number, values, None

    @property
    def _note(self) -> SharedNote:
        """Run what the prompts of the steps have in common, once a note; a document's before it has records."""
        if self._shared_note is None:
            ids = {}
            for step, model in self.models.items():
                try:
                    sample = self._sample(step, {**self._values, RECORDS_COLUMN: []})[0]
                    ids[step] = model.answerer.prompt(sample, self._number).ids
                except NOTE_FAULTS:  # which asking the step says
                    continue
            self._shared_note = self.shared.begin(ids)
        return self._shared_note

    def ask(self, step: str, values: Mapping[str, Any]) -> AskedStep:
        """Ask a step's task about the note; raises RowFaultError or DataError if it cannot be asked about."""
        sample, row = self._sample(step, values)
        model = self.models[step]

        def draw(number: int, label: str | None) -> str:
            asked = sample if label is None else replace(sample, allowed=lambda: (label,))
            prompt = model.answerer.prompt(asked, self._number)
            with drawing_again(model.answerer, number):
                cache = self._note.cache(step, prompt.ids)
                return model.answerer.answer_prompt(prompt, self._number, cache)

        return AskedStep(row, draw, sample.answer, sample.options, lambda: self._probabilities(step, sample))

    def _sample(self, step: str, values: Mapping[str, Any]) -> tuple[Sample, Mapping[str, Any]]:
        """Read a row for a step, without the right answers of the other steps, which a case record would hold."""
        task = self.models[step].reader.task
        own = task.answer_columns | task.asked_columns
        others = {
            name for key, model in self.models.items() if key != step for name in model.reader.task.answer_columns
        }
        row = {name: value for name, value in values.items() if not _is_anothers(str(name), own, others)}
        question = self.models[step].reader.question(self._number, Row("", row))
        return question.sample, question.values

    def _probabilities(self, step: str, sample: Sample) -> Sequence[float]:
        model = self.models[step]
        prompt, options = model.opened.encoder.encode_answers(sample, sample.options)
        return option_probabilities(model.opened, prompt, options, self._note, step)


def _is_anothers(name: str, own: Collection[str], others: Collection[str]) -> bool:
    """Return whether a column is the right answer of another step; names as they are go before what is like them."""
    if name in own or name in others:
        return name not in own
    return loose(name) in set(map(loose, others)) - set(map(loose, own))


@torch.no_grad()
def option_probabilities(
    opened: OpenedModel, prompt: Sequence[int], options: Sequence[Sequence[int]], note: SharedNote, step: str
) -> list[float]:
    """Return the probability of each option after a prompt: the same, but for rounding, as ``evaluate.py`` scores.

    What the note's common tokens gave is not computed again; the rest of the prompt is, with each option.
    """
    model = opened.loaded.model
    with explain_out_of_memory("scoring options", f"1 x {len(prompt)} tokens", "shorter notes"):
        scores = []
        for option in options:
            cache = note.cache(step, prompt)
            ids = torch.tensor([[*prompt, *option]], device=model.device)
            known = 0 if cache is None else cache.get_seq_length()
            output = model(input_ids=ids[:, known:], past_key_values=cache, use_cache=cache is not None)
            logits = output.logits[0, -len(option) - 1 : -1].float().log_softmax(-1).double()
            scores.append(logits.gather(1, ids[0, -len(option) :, None]).sum())
        return torch.stack(scores).softmax(0).tolist()
