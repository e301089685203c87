"""Constrained decoding: answers that are one of a question's options, or keep to a JSON schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from transformers import LogitsProcessor

from toolkit.data.examples import Encoder
from toolkit.runtime.errors import UsageError
from toolkit.tasks.sample import Sample

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_WHITESPACE = r"[ \n\t\r]{0,40}"
"""Blanks that JSON may have between its parts: enough for indentation, and an end to a model that writes no other."""


class Constraint(Protocol):
    """Says what may follow in one answer, a token at a time."""

    def allowed(self, vocabulary: int) -> torch.Tensor:
        """Return which tokens may come next: [vocabulary] bool."""
        ...

    def take(self, token: int) -> None:
        """Note a token that was generated."""
        ...

    @property
    def is_whole(self) -> bool:
        """Return whether what was generated is an answer."""
        ...

    @property
    def longest(self) -> int:
        """Return the most tokens that an answer can need, with the one that ends it; 0 if there is no such number."""
        ...


class OneOfOptions:
    """Allows the tokens by which each option follows its prompt in training, then those that end an answer.

    They are the tokens that the likelihood of an option is taken of. Needs no library, nor a fast tokenizer. Where
    answers are ``explained``, anything may follow an option.
    """

    def __init__(self, options: Sequence[tuple[int, ...]], stop_ids: Sequence[int], explained: bool = False) -> None:
        self._options, self._stop_ids, self._explained = options, stop_ids, explained
        self._taken: tuple[int, ...] = ()

    def allowed(self, vocabulary: int) -> torch.Tensor:
        """Return which tokens may come next: [vocabulary] bool."""
        at = len(self._taken)
        if self._explained and any(self._taken[: len(ids)] == ids for ids in self._options):
            return torch.ones(vocabulary, dtype=torch.bool)
        following = {ids[at] for ids in self._options if len(ids) > at and ids[:at] == self._taken}
        mask = torch.zeros(vocabulary, dtype=torch.bool)
        mask[sorted(following or self._stop_ids)] = True
        return mask

    def take(self, token: int) -> None:
        """Note a token that was generated."""
        self._taken += (token,)

    is_whole = True
    """Options are not cut, see ``longest``."""

    @property
    def longest(self) -> int:
        """Return the most tokens that an option has, with one that ends it."""
        return max(map(len, self._options)) + 1


class JsonBySchema:
    """Allows the tokens of JSON that a schema validates, by llguidance.

    Raises:
        UsageError: the schema has what llguidance cannot hold an answer to.
    """

    longest = 0

    def __init__(self, tokenizer: LLTokenizer, schema: Mapping[str, Any], lead: str) -> None:
        from llguidance import LLMatcher

        options = {"whitespace_flexible": True, "whitespace_pattern": _WHITESPACE}
        body = json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)
        before = f"{json.dumps(lead, ensure_ascii=False)}? " if lead else ""
        self._matcher = LLMatcher(tokenizer, f"start: {before}answer\nanswer: %json {body}\n", log_level=0)
        if error := self._matcher.get_error():
            raise UsageError(
                "the task's JSON schema has what constrained decoding cannot hold an answer to "
                f"({error.splitlines()[0][:200]}); simplify it, or leave --constrain out"
            )

    def allowed(self, vocabulary: int) -> torch.Tensor:
        """Return which tokens may come next: [vocabulary] bool."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.zeros(vocabulary, bool)
        known = np.unpackbits(bits, bitorder="little")[:vocabulary]
        mask[: len(known)] = known
        return torch.from_numpy(mask)

    def take(self, token: int) -> None:
        """Note a token that was generated."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    @property
    def is_whole(self) -> bool:
        """Return whether what was generated is all of a JSON value."""
        return bool(self._matcher.is_stopped() or self._matcher.is_accepting())


class Constraints:
    """Makes the constraint of each sample, for one tokenizer whose model has ``vocabulary`` logits."""

    def __init__(self, encoder: Encoder, vocabulary: int) -> None:
        self._encoder, self._vocabulary = encoder, vocabulary
        self._tokenizer: LLTokenizer | None = None

    def of(self, sample: Sample) -> Constraint:
        """Return the constraint of the answer to a sample.

        Raises:
            RowFaultError: the options are not told apart by their tokens.
            UsageError: the answer is free text; or it is JSON and llguidance is missing, cannot read the tokenizer, or
                cannot hold an answer to the schema.
        """
        require_format(sample)
        if sample.options:
            _, options = self._encoder.encode_answers(sample, sample.options)
            return OneOfOptions(options, self._encoder.stop_ids(), sample.explained)
        assert sample.schema is not None
        self._tokenizer = self._tokenizer or self._read_tokenizer()
        return JsonBySchema(self._tokenizer, sample.schema, self._encoder.turns.before_answer)

    def _read_tokenizer(self) -> LLTokenizer:
        try:
            from llguidance.hf import from_tokenizer
        except ModuleNotFoundError:
            raise UsageError('--constrain of JSON needs llguidance: pip install "llguidance>=1.8"') from None
        tokenizer = self._encoder.tokenizer
        size = max(self._vocabulary, len(tokenizer))
        try:
            return from_tokenizer(tokenizer, n_vocab=size, eos_token=self._encoder.stop_ids())
        except ValueError as error:
            raise UsageError(
                f"llguidance cannot read this tokenizer ({error}), so that answers in JSON cannot be held to their "
                "schema; leave --constrain out"
            ) from None


def require_format(sample: Sample) -> None:
    """Raise UsageError if the answer to a sample is free text, which nothing constrains."""
    if not sample.options and sample.schema is None:
        raise UsageError(
            "--constrain holds answers to the labels, options or JSON schema of a task, and the answers of this one "
            "are free text; leave --constrain out, or name a task with an output"
        )


class Constrained(LogitsProcessor):  # type: ignore[misc]
    """Leaves each row of a batch the tokens that its constraint allows."""

    def __init__(self, constraints: Sequence[Constraint], stop_ids: Sequence[int]) -> None:
        self._constraints, self._stop_ids = constraints, frozenset(stop_ids)
        self._has_ended = [False] * len(constraints)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the scores, [rows, vocabulary], with minus infinity for the tokens that may not come next."""
        allowed = torch.stack([self._allowed(row, scores.shape[1]) for row in range(len(self._constraints))])
        allowed = allowed.to(scores.device)
        left = scores.masked_fill(~allowed, -torch.inf)
        none_left = left.isneginf().all(-1, keepdim=True)  # the model's own settings forbid all of them, as min_length
        return torch.where(none_left & allowed, 0.0, left).to(scores.dtype)  # type: ignore[return-value]

    def take(self, tokens: torch.Tensor) -> None:
        """Note the newest token of each row, [rows]; after its end, while other rows go on, a row has padding."""
        for row, token in enumerate(tokens.tolist()):
            if not self._has_ended[row]:
                self._has_ended[row] = token in self._stop_ids
                self._constraints[row].take(token)

    def _allowed(self, row: int, vocabulary: int) -> torch.Tensor:
        if self._has_ended[row]:
            return torch.ones(vocabulary, dtype=torch.bool)
        return self._constraints[row].allowed(vocabulary)
