"""Answer questions with a trained model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolkit.data.chat_rendering import Rendering
from toolkit.data.examples import Encoder
from toolkit.data.model_limits import padding_id, room_for_answer
from toolkit.models.load import LoadedModel
from toolkit.runtime.errors import DataError
from toolkit.tasks.sample import RowFaultError, Sample

log = logging.getLogger("frostline")


def answers(
    loaded: LoadedModel,
    samples: Iterable[Sample],
    max_length: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    rendering: Rendering = Rendering(),
) -> Iterator[str]:
    """Yield the model's answer of at most ``max_new_tokens`` to each sample, from the same prompt that training used.

    Contexts are cut where a prompt exceeds ``max_length`` tokens. A ``temperature`` of 0 decodes greedily.

    Raises:
        DataError: a question alone exceeds ``max_length``, or a prompt the model's positions.
        ModelError: the tokenizer belongs to another model.
    """
    encoder, cut_short, hid_tools = Encoder(loaded.tokenizer, max_length, loaded.ends, rendering), False, False
    for note in encoder.notes():
        log.info("%s", note)
    for sample in samples:
        try:
            prompt = encoder.prompt_ids(sample)
            room = room_for_answer(prompt, loaded.model, max_new_tokens)
        except RowFaultError as fault:
            raise DataError(f"question {sample.question[:60]!r} {fault}") from None
        if (
            sample.tools
            and not hid_tools
            and not encoder.turns.template.shows(sample.tools, loaded.tokenizer.decode(list(prompt)))
        ):
            hid_tools = True
            log.warning("the chat template does not show the tools of question %r: they have no effect there and where "
                        "else it hides them; data.chat_template of a run names one that shows them",
                        sample.question[:60])  # fmt: skip
        if room < max_new_tokens and not cut_short:
            cut_short = True
            log.info("answers end where the model's %d positions do", len(prompt) + room)
        stop_ids = encoder.stop_ids()
        answer = complete(loaded.model.eval(), loaded.tokenizer, prompt, stop_ids, max_new_tokens, temperature)
        yield encoder.answer_opening + encoder.without_closing(answer)


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    stop: Callable[[], bool] | None = None,
) -> str:
    """Generate the continuation of the token ids ``prompt`` by a model in evaluation mode, and decode it.

    It ends at a token of ``stop_ids``, after ``max_new_tokens``, or when ``stop``, called after every token, returns
    True. A ``temperature`` of 0 decodes greedily.
    """
    return complete_together(model, tokenizer, [prompt], stop_ids, max_new_tokens, temperature, stop)[0]


@torch.no_grad()
def complete_together(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    stop: Callable[[], bool] | None = None,
) -> list[str]:
    """Generate the continuations of several prompts, a token of each in every pass; otherwise as ``complete``.

    Prompts are padded on the left, which the model must allow: see ``can_complete_together``. The longest prompt
    decides how many tokens the model's positions leave for every answer.
    """
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    if stop is not None:
        is_stopped = stop  # a name that mypy knows is not None within the lambda
        sampling["stopping_criteria"] = [
            lambda ids, scores: ids.new_full(ids.shape[:1], is_stopped(), dtype=torch.bool)
        ]
    pad_id, width = padding_id(tokenizer, model), max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor([[pad_id] * left + list(prompt) for left, prompt in zip(padding, prompts, strict=True)])
    mask = torch.tensor([[0] * left + [1] * (width - left) for left in padding])
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=min(room_for_answer(prompt, model, max_new_tokens) for prompt in prompts),
        eos_token_id=list(stop_ids),
        pad_token_id=pad_id,
        use_cache=True,
        **sampling,
    )
    return [_decode(tokenizer, line[width:].tolist(), stop_ids) for line in output]


def can_complete_together(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> bool:
    """Return whether ``complete_together`` gives each prompt the answer that it has alone, but for rounding.

    A recurrent model reads padding too, and a long prompt would leave the others less room.
    """
    room = min(room_for_answer(prompt, model, max_new_tokens) for prompt in prompts)
    return not model._is_stateful and room == max_new_tokens


def _decode(tokenizer: PreTrainedTokenizerBase, answer: list[int], stop_ids: Sequence[int]) -> str:
    """Return the text of an answer's tokens up to the first of ``stop_ids``, behind which others were padded."""
    end = next((index for index, token in enumerate(answer) if token in stop_ids), len(answer))
    text = str(tokenizer.decode(answer[: end + 1], skip_special_tokens=True))
    return text.rstrip("\ufffd").strip()  # U+FFFD: a character whose last bytes the length limit cut off
