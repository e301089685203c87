"""Answer questions with a trained model: several at once, each as if it were alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from toolkit.data.chat_rendering import Rendering
from toolkit.data.dataset import control_tokens_text
from toolkit.data.examples import Encoder
from toolkit.data.model_limits import padding_id, room_for_answer
from toolkit.engine.deepspeed.inference import PartitionedModel
from toolkit.inference.constrained import Closing, Constrained, Constraint, Constraints
from toolkit.inference.generation import complete_together, explain_refused_settings, looks_back, pad_left
from toolkit.inference.sampling import Sampling
from toolkit.models.load import LoadedModel
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import DataError, UsageError
from toolkit.runtime.out_of_memory import explain_out_of_memory
from toolkit.tasks.sample import RowFaultError, Sample

log = logging.getLogger("frostline")

_SORTED_BATCHES = 8
"""Batches of each rank whose prompts are sorted by length together; so many are held."""

_PADDING = 7
"""Tokens of padding before a prompt that the model is tried on."""

PADDING_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest change of a logit that padding may make, of the largest logit; ``LOW_PRECISION_TOLERANCE`` in 16 bits."""
LOW_PRECISION_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Prompt:
    """The tokens that an answer follows, and what it may be; None if it is free."""

    ids: tuple[int, ...]
    constraint: Constraint | None = None

    def __len__(self) -> int:
        return len(self.ids)


class QuestionError(DataError):
    """A question cannot be answered: it is too long, or the chat template refuses it."""


@dataclass
class Answerer:
    """Answers samples from the same prompts that training used.

    Prompts of about the same length are answered together, padded on the left, where the model gives each the answer
    that it has alone, but for rounding. Ranks divide the batches, and every rank is given all answers.
    """

    loaded: LoadedModel
    """Model, on this rank's device, and tokenizer."""
    max_length: int
    """Longest prompt in tokens; contexts are cut where one is longer."""
    max_new_tokens: int
    """Longest answer in tokens."""
    batch_size: int = 1
    """Most prompts that are answered together on a rank."""
    sampling: Sampling = field(default_factory=Sampling)
    """How each token is chosen."""
    rendering: Rendering = field(default_factory=Rendering)
    """Chat format of the training."""
    world: World = field(default_factory=World)
    """Ranks that divide the samples."""
    skips_bad_rows: bool = False
    """Whether a question that is too long is logged and has no answer; else it is an error."""
    constrains: bool = False
    """Whether answers can be nothing but one of the question's options, or JSON by the task's schema."""
    partitioned: PartitionedModel | None = None
    """The model again, where ZeRO-3 has divided it among the ranks; else each holds all of it."""
    on_token: Callable[[int], None] | None = None
    """Called with the number of tokens that the answers of a batch have, after each."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; expected a whole number from 1")
        self._encoder = Encoder(self.loaded.tokenizer, self.max_length, self.loaded.ends, self.rendering)
        for note in self._encoder.notes():
            log.info("%s", note)
        vocabulary = self.loaded.model.config.get_text_config().vocab_size
        self._constraints = Constraints(self._encoder, vocabulary) if self.constrains else None
        self._said = set[str]()
        self._with_control_token = list[tuple[int, str]]()
        self._pads: bool | None = None

    def in_order(self, samples: Iterable[tuple[int, Sample]]) -> Iterator[tuple[int, str | None]]:
        """Yield row number and answer as ``batches`` does, in the order of the samples."""
        waiting: list[int] = []

        def asked() -> Iterator[tuple[int, Sample]]:
            for row, sample in samples:
                waiting.append(row)
                yield row, sample

        done: dict[int, str | None] = {}
        for batch in self.batches(asked()):
            done |= batch
            while waiting and waiting[0] in done:
                row = waiting.pop(0)
                yield row, done.pop(row)

    def batches(self, samples: Iterable[tuple[int, Sample]]) -> Iterator[dict[int, str | None]]:
        """Yield answers by row number as they are given, from samples with their row numbers; a collective.

        Samples are read a few batches at a time, of which the longest are answered first. The answer is None to a
        question that is skipped.

        Raises:
            QuestionError: a question alone exceeds ``max_length``, or a prompt the model's positions.
            ModelError: the tokenizer belongs to another model.
            UsageError: ``constrains`` is set, and nothing says what an answer may be; see ``Constraints.of``.
        """
        rows = iter(samples)
        size = self.batch_size if self.batch_size * self.world.size == 1 else self.batch_size * _SORTED_BATCHES
        while some := list(islice(rows, size * self.world.size)):
            prompts, skipped = dict[int, Prompt](), dict[int, str | None]()
            for row, sample in some:
                try:
                    prompts[row] = self.prompt(sample, row)
                except QuestionError as error:
                    if not self.skips_bad_rows:
                        raise
                    log.warning("skipped: %s", error)
                    skipped[row] = None
            if skipped:
                yield skipped
            batches = self._together(prompts)
            for start in range(0, len(batches), self.world.size):
                own = batches[start : start + self.world.size][self.world.rank :]
                answered = self._answer({row: prompts[row] for row in own[0]}) if own else {}
                if self.partitioned is not None:
                    self.partitioned.wait()
                together: dict[int, str | None] = {}
                for of_rank in self.world.all_gather_object(answered):
                    together |= of_rank
                yield together

    def answer(self, sample: Sample, row: int = 0, streamer: Any = None) -> str:
        """Return the answer to a sample by itself, on this rank; ``streamer``, transformers', is given its tokens.

        Raises:
            QuestionError, ModelError: as ``batches``.
        """
        return self._answer({row: self.prompt(sample, row)}, streamer)[row]

    def answer_prompt(self, prompt: Prompt, row: int, cache: Cache | None = None) -> str:
        """Return the answer to a prompt by itself, of which ``cache`` holds the first tokens, if given."""
        return self._answer({row: prompt}, None, cache)[row]

    def report_control_tokens(self) -> None:
        """Log how many questions so far held the text of a control token, and forget them."""
        if found := self._with_control_token:
            row, token = found[0]
            parses = self.rendering.parses_special
            log.info("%s", control_tokens_text(len(found), token, f"question {row + 1}", parses))
            found.clear()

    @property
    def opening(self) -> str:
        """Return the part of every answer that its prompt holds already."""
        return self._encoder.answer_opening

    def prompt(self, sample: Sample, row: int) -> Prompt:
        """Return the prompt; say once what is odd about it."""
        try:
            if token := self._encoder.control_token(sample):
                self._with_control_token.append((row, token))
            prompt = self._encoder.prompt_ids(sample)
            constraint = self._constraints.of(sample) if self._constraints else None
            room = room_for_answer(prompt, self.loaded.model, self.max_new_tokens)
            self._require_room(constraint, room)
        except (RowFaultError, DataError) as fault:
            between = " " if isinstance(fault, RowFaultError) else " has no answer: "
            raise QuestionError(f"question {row + 1}, {sample.question[:60]!r},{between}{fault}") from None
        template = self._encoder.turns.template
        if sample.tools and not template.shows(sample.tools, self.loaded.tokenizer.decode(list(prompt))):
            hidden = (
                f"the chat template does not show the tools of question {sample.question[:60]!r}: they have no effect "
                "there and where else it hides them; data.chat_template of a run names one that shows them"
            )
            self._say_once(logging.WARNING, hidden, "tools")
        if room < self.max_new_tokens:
            self._say_once(logging.INFO, f"answers end where the model's {len(prompt) + room} positions do", "room")
        return Prompt(prompt, constraint)

    def _require_room(self, constraint: Constraint | None, room: int) -> None:
        """Raise UsageError if an answer takes more than ``max_new_tokens``, DataError if the prompt leaves fewer."""
        shortest = len((constraint and constraint.ending) or ())
        if shortest > self.max_new_tokens:
            raise UsageError(
                f"the shortest answer that was found by the task's JSON schema takes {shortest} tokens, and "
                f"--max-new-tokens is {self.max_new_tokens}; allow more, or require fewer fields"
            )
        if shortest > room:
            raise DataError(
                f"its prompt leaves {room} of the model's positions, and the shortest answer takes {shortest}"
            )

    def _together(self, prompts: dict[int, Prompt]) -> list[list[int]]:
        """Divide the rows into batches of prompts of about the same length, the longest first."""
        rows = sorted(prompts, key=lambda row: (-len(prompts[row]), row))
        if self.batch_size == 1 or len(rows) <= 1:
            return [[row] for row in rows]
        model, most = self.loaded.model, self.max_new_tokens
        if self._pads is None and room_for_answer(prompts[rows[-1]].ids, model, _PADDING + 1) > _PADDING:
            self._pads = self.world.broadcast_object(self._padding_is_exact(prompts[rows[-1]].ids))
        fits = {row: self._pads and room_for_answer(prompts[row].ids, model, most) == most for row in rows}
        rest = [row for row in rows if fits[row]]
        return [[row] for row in rows if not fits[row]] + [
            rest[n : n + self.batch_size] for n in range(0, len(rest), self.batch_size)
        ]

    def _padding_is_exact(self, prompt: Sequence[int]) -> bool:
        """Return whether padding on the left leaves a prompt's next token as it is, but for rounding; say if not."""
        model, pad_id = self.loaded.model.eval(), padding_id(self.loaded.tokenizer, self.loaded.model)
        exact = not model._is_stateful and not looks_back(model)
        if exact:
            with explain_out_of_memory("generation", f"1 x {len(prompt) + _PADDING} tokens", "a smaller model"):
                alone, padded = (next_logits(model, prompt, pad_id, extra) for extra in (0, _PADDING))
            most = PADDING_TOLERANCE.get(model.dtype, LOW_PRECISION_TOLERANCE) * float(alone.abs().max())
            exact = float((padded - alone).abs().max()) <= most
        if not exact:
            why = "this model, or its generation_config.json, reads padding too: questions are answered one by one"
            self._say_once(logging.INFO, why, "pads")
        return exact

    def _answer(self, prompts: dict[int, Prompt], streamer: Any = None, cache: Cache | None = None) -> dict[int, str]:
        """Answer one batch; ``cache`` has keys and values of the first tokens of a single prompt."""
        shape = f"{len(prompts)} x {max(map(len, prompts.values()))} tokens"
        advice = f"--batch-size {self.batch_size // 2}" if self.batch_size > 1 else "--max-new-tokens, to fewer"
        stop_ids, processors = self._encoder.stop_ids(), self.sampling.processors(list(prompts))
        constraints = [prompt.constraint for prompt in prompts.values() if prompt.constraint is not None]
        constrained = Constrained(constraints, stop_ids) if constraints else None
        if constrained is not None:
            processors.insert(0, constrained)
        most = max([self.max_new_tokens, *(constraint.longest for constraint in constraints)])  # an option is not cut
        if constrained is not None:
            room = min(room_for_answer(prompt.ids, self.loaded.model, most) for prompt in prompts.values())
            processors.append(Closing(constrained, room))
        counted = count(1)

        def after_token(tokens: torch.Tensor) -> bool:
            if constrained is not None:
                constrained.take(tokens)
            if self.on_token is not None:
                self.on_token(next(counted))
            return False

        passes = self.partitioned.passes() if self.partitioned is not None else nullcontext()
        with explain_out_of_memory("generation", shape, advice), passes:
            texts = complete_together(
                self.loaded.model.eval(), self.loaded.tokenizer, [prompt.ids for prompt in prompts.values()], stop_ids,
                most, processors, after_token, streamer, cache,
            )  # fmt: skip
        if not all(constraint.is_whole for constraint in constraints):
            cut = f"answers ended at {self.max_new_tokens} tokens, before their JSON did: no way to end it was found"
            self._say_once(logging.WARNING, cut, "cut")
        opening = self._encoder.answer_opening
        return {row: opening + self._encoder.without_closing(text) for row, text in zip(prompts, texts, strict=True)}

    def _say_once(self, level: int, text: str, key: str) -> None:
        if key not in self._said:
            self._said.add(key)
            log.log(level, "%s", text)


@torch.no_grad()
def next_logits(
    model: PreTrainedModel, prompt: Sequence[int], pad_id: int, padding: int = 0, **options: Any
) -> torch.Tensor:
    """Return the logits of the first token after ``prompt`` behind ``padding`` tokens, [1, vocabulary], float32.

    ``options`` are further ones of transformers' ``generate``.
    """
    ids, mask = pad_left([prompt], pad_id, padding)
    with explain_refused_settings():
        output = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=1, do_sample=False,
            num_beams=1, num_return_sequences=1, pad_token_id=pad_id, return_dict_in_generate=True, output_logits=True,
            **options,
        )  # fmt: skip
    logits: torch.Tensor = output.logits[0].float()
    return logits
