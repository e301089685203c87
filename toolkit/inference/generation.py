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
from toolkit.tasks.pubmedqa import RowFaultError, Sample

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
    encoder, cut_short = Encoder(loaded.tokenizer, max_length, loaded.ends, rendering), False
    for note in encoder.notes():
        log.info("%s", note)
    for sample in samples:
        try:
            prompt = encoder.prompt_ids(sample)
            room = room_for_answer(prompt, loaded.model, max_new_tokens)
        except RowFaultError as fault:
            raise DataError(f"question {sample.question[:60]!r} {fault}") from None
        if room < max_new_tokens and not cut_short:
            cut_short = True
            log.info("answers end where the model's %d positions do", len(prompt) + room)
        stop_ids = encoder.stop_ids()
        answer = complete(loaded.model.eval(), loaded.tokenizer, prompt, stop_ids, max_new_tokens, temperature)
        yield encoder.answer_opening + encoder.without_closing(answer)


@torch.no_grad()
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
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    if stop is not None:
        is_stopped = stop  # a name that mypy knows is not None within the lambda
        sampling["stopping_criteria"] = [
            lambda ids, scores: ids.new_full(ids.shape[:1], is_stopped(), dtype=torch.bool)
        ]
    ids = torch.tensor([list(prompt)], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=room_for_answer(prompt, model, max_new_tokens),
        eos_token_id=list(stop_ids),
        pad_token_id=padding_id(tokenizer, model),
        use_cache=True,
        **sampling,
    )
    text = str(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    return text.rstrip("\ufffd").strip()  # U+FFFD: a character whose last bytes the length limit cut off
