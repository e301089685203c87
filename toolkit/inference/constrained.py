"""Constrained decoding: answers that are one of a question's options, or keep to a JSON schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from transformers import LogitsProcessor

from toolkit.data.examples import Encoder
from toolkit.inference.closing import Closer
from toolkit.runtime.errors import UsageError
from toolkit.tasks.sample import Sample

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_WHITESPACE = r"[ \n\t\r]{0,40}"
"""Blanks that JSON may have between its parts: enough for indentation, and an end to a model that writes no other."""

_LIKELIEST = 8
"""Likeliest tokens that are tried for room to end an answer, before an ending is taken as it is."""


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

    @property
    def ending(self) -> Sequence[int] | None:
        """Return tokens that make an answer of what was generated; None if none are known, or it is never cut."""
        ...

    def ends_within(self, token: int, left: int) -> bool:
        """Return whether an answer that goes on with ``token`` can be made whole by ``left`` tokens after it."""
        ...


class OneOfOptions:
    """Allows the tokens by which each option follows its prompt in training, then those that end an answer.

    They are the tokens that the likelihood of an option is taken of. Needs no library, nor a fast tokenizer. Where
    answers are ``explained``, anything may follow an option, which then ends with a line break.
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

    ending = None

    def ends_within(self, token: int, left: int) -> bool:
        """Return True: options are not cut."""
        return True


class JsonBySchema:
    """Allows the tokens of JSON that a schema validates, by llguidance, and knows how to end it.

    Raises:
        UsageError: the schema has what llguidance cannot hold an answer to.
    """

    longest = 0

    def __init__(self, tokenizer: LLTokenizer, schema: Mapping[str, Any], lead: str) -> None:
        from llguidance import LLMatcher

        self._tokenizer, self._lead = tokenizer, lead.encode()

        options = {"whitespace_flexible": True, "whitespace_pattern": _WHITESPACE}
        body = json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)
        before = f"{json.dumps(lead, ensure_ascii=False)}? " if lead else ""
        self._matcher = LLMatcher(tokenizer, f"start: {before}answer\nanswer: %json {body}\n", log_level=0)
        if error := self._matcher.get_error():
            raise UsageError(
                "the task's JSON schema has what constrained decoding cannot hold an answer to "
                f"({error.splitlines()[0][:200]}); simplify it, or leave --constrain out"
            )
        self._closer = Closer(tokenizer)
        self._taken: list[int] = []
        self._ending = self._closer.ending(self._matcher, b"")
        self._looked_at: tuple[int, list[int] | None] = (-1, None)
        """The token that was last asked about, and what would end an answer after it."""

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
            asked, ending = self._looked_at
            self._ending = ending if asked == token else None
            self._matcher.consume_token(token)
            self._taken.append(token)

    @property
    def is_whole(self) -> bool:
        """Return whether what was generated is all of a JSON value."""
        return bool(self._matcher.is_stopped() or self._matcher.is_accepting())

    @property
    def ending(self) -> Sequence[int] | None:
        """Return the tokens of a short way to end the JSON; None if none was found."""
        return self._ending

    def ends_within(self, token: int, left: int) -> bool:
        """Return whether JSON that goes on with ``token`` can be ended by ``left`` tokens after it."""
        ahead, ending = self._matcher.deep_copy(), self._ending or []
        if not ahead.consume_token(token):
            return False
        if ending and token == ending[0]:
            after: list[int] | None = ending[1:]
        else:  # most tokens are text within a string, which ends as before
            after = ending if len(ending) <= left and self._closer.still_ends(ahead, ending) else None
            after = after if after is not None else self._closer.ending(ahead, self._text([*self._taken, token]))
        self._looked_at = token, after
        return after is not None and len(after) <= left

    def _text(self, tokens: list[int]) -> bytes:
        """Return the bytes of tokens without the lead before the JSON, or with none of an unfinished one."""
        text = bytes(self._tokenizer.decode_bytes(tokens))
        return b"" if self._lead.startswith(text) else text.removeprefix(self._lead)


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
            lines = [f"{one}\n" for one in sample.options] if sample.explained else sample.options
            _, options = self._encoder.encode_answers(sample, lines)
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
        self._given = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the scores, [rows, vocabulary], with minus infinity for the tokens that may not come next."""
        allowed = torch.stack([self._allowed(row, scores.shape[1]) for row in range(len(self._constraints))])
        allowed = allowed.to(scores.device)
        left = scores.masked_fill(~allowed, -torch.inf)
        none_left = left.isneginf().all(-1, keepdim=True)  # the model's own settings forbid all of them, as min_length
        return torch.where(none_left & allowed, 0.0, left).to(scores.dtype)  # type: ignore[return-value]

    def take(self, tokens: torch.Tensor) -> None:
        """Note the newest token of each row, [rows]; after its end, while other rows go on, a row has padding."""
        self._given += 1
        for row, token in enumerate(tokens.tolist()):
            if not self._has_ended[row]:
                self._has_ended[row] = token in self._stop_ids
                self._constraints[row].take(token)

    def _allowed(self, row: int, vocabulary: int) -> torch.Tensor:
        if self._has_ended[row]:
            return torch.ones(vocabulary, dtype=torch.bool)
        return self._constraints[row].allowed(vocabulary)

    def close(self, scores: torch.Tensor, most: int) -> torch.Tensor:
        """Return the scores, [rows, vocabulary], so that the likeliest token leaves each row room to end its answer.

        Likelier tokens that do not are ruled out: a few one by one, then all but the next one of an ending. ``most`` is
        the number of tokens that an answer may have.
        """
        left = most - self._given - 1
        for row, token in enumerate(scores.argmax(-1).tolist()):
            constraint = self._constraints[row]
            if self._has_ended[row] or constraint.ending is None:
                continue
            for _ in range(_LIKELIEST):
                if constraint.ends_within(token, left):
                    break
                scores[row, token] = -torch.inf
                token = int(scores[row].argmax())
            else:
                token = [*constraint.ending, min(self._stop_ids)][0]
                constraint.ends_within(token, left)
                scores[row] = -torch.inf
                scores[row, token] = 0.0
        return scores


class Closing(LogitsProcessor):  # type: ignore[misc]
    """Comes after all that changes scores, and sees that answers of at most ``most`` tokens are not cut."""

    def __init__(self, constrained: Constrained, most: int) -> None:
        self._constrained, self._most = constrained, most

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the scores as ``Constrained.close`` does."""
        return self._constrained.close(scores.clone(), self._most)  # type: ignore[return-value]
