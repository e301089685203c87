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
    rendering: Rendering = Rendering(),  # noqa: B008 (frozen)
) -> Iterator[str]:
    """Generate the model's answer to each sample, from the same prompt that training used.

    Args:
        loaded: the model, on the device it is to run on.
        samples: questions with their contexts.
        max_length: longest prompt in tokens; context beyond it is cut.
        max_new_tokens: longest answer in tokens.
        temperature: 0 takes the most likely token each time; above 0 samples.
        rendering: how the run behind the model writes its conversations.

    Raises:
        DataError: a question alone is longer than ``max_length``, or a prompt than the model's positions.
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
        ends = encoder.stop_ids()
        answer = complete(loaded.model.eval(), loaded.tokenizer, prompt, ends, max_new_tokens, temperature)
        yield encoder.begun + encoder.without_closing(answer)


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
    """Generate what the model writes after ``prompt``.

    Args:
        model: without dropout.
        tokenizer: its own.
        prompt: token ids.
        stop_ids: tokens that end the answer.
        max_new_tokens: longest answer in tokens.
        temperature: 0 takes the most likely token each time; above 0 samples.
        stop: asked after every token; true ends the answer there.
    """
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    if stop is not None:
        ask = stop
        sampling["stopping_criteria"] = [lambda ids, scores: ids.new_full(ids.shape[:1], ask(), dtype=torch.bool)]
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
    return str(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)).rstrip("\ufffd").strip()
