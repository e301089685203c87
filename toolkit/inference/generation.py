"""Generate the continuations of prompts, a token of each in every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from toolkit.data.model_limits import padding_id, room_for_answer
from toolkit.runtime.errors import ModelError


def complete_together(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    processors: LogitsProcessorList | None = None,
    stop: Callable[[torch.Tensor], bool] | None = None,
    streamer: Any = None,
    cache: Cache | None = None,
) -> list[str]:
    """Generate and decode the continuations of prompts, in token ids, a token of each in every pass.

    The model must be in evaluation mode, and allow padding on the left: see ``can_complete_together``. A continuation
    ends at a token of ``stop_ids``, after ``max_new_tokens``, or when ``stop``, called with the
    newest token of each, [rows], returns True.
    The longest prompt decides how many tokens the model's positions leave for every answer. Tokens are the likeliest
    ones after ``processors`` changed their logits; ``streamer``, transformers', is given those of a single prompt, of
    whose first tokens ``cache`` may hold keys and values.
    """
    options: dict[str, Any] = {}
    if stop is not None:
        is_stopped = stop  # a name that mypy knows is not None within the lambda
        options["stopping_criteria"] = [
            lambda ids, scores: ids.new_full(ids.shape[:1], is_stopped(ids[:, -1]), dtype=torch.bool)
        ]
    if processors:
        options["logits_processor"] = processors
    if streamer is not None:
        options["streamer"] = streamer
    if cache is not None:
        options |= {"past_key_values": cache, "cache_implementation": None}  # a model's own setting would exclude it
    pad_id = padding_id(tokenizer, model)
    lines = next_tokens(model, prompts, stop_ids, max_new_tokens, pad_id, **options)
    return [_decode(tokenizer, line) for line in lines]


@torch.no_grad()
def next_tokens(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], max_new_tokens: int, pad_id: int,
    **options: Any,
) -> list[list[int]]:  # fmt: skip
    """Return the tokens that follow each prompt, up to the first of ``stop_ids``; see ``complete_together``.

    ``options`` are further ones of transformers' ``generate``.
    """
    ids, mask = pad_left(prompts, pad_id)
    with explain_refused_settings():
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=min(room_for_answer(prompt, model, max_new_tokens) for prompt in prompts),
            eos_token_id=list(stop_ids),
            pad_token_id=pad_id,
            use_cache=True,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            **options,
        )
    lines = [line[ids.shape[1] :].tolist() for line in output]
    ends = [next((index for index, token in enumerate(line) if token in stop_ids), len(line)) for line in lines]
    return [line[: end + 1] for line, end in zip(lines, ends, strict=True)]


@contextmanager
def explain_refused_settings() -> Iterator[None]:
    """Turn what transformers says of the settings of generation_config.json into an error that names the file.

    Raises:
        ModelError: it refuses them.
    """
    try:
        yield
    except ValueError as error:
        said = " ".join(str(error).split())[:400]
        raise ModelError(
            f"transformers does not generate with the settings of the model's generation_config.json: {said} "
            "Correct that file, or remove the setting from it"
        ) from error


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int, extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask, [rows, longest + extra], of prompts padded on the left."""
    width = max(map(len, prompts)) + extra
    padding = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor([[pad_id] * left + list(prompt) for left, prompt in zip(padding, prompts, strict=True)])
    return ids, torch.tensor([[0] * left + [1] * (width - left) for left in padding])


def looks_back(model: PreTrainedModel) -> bool:
    """Return whether the model's generation settings change logits by the tokens before, padding among them."""
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}
    settings = model.generation_config
    return any(getattr(settings, name, None) not in (None, value) for name, value in neutral.items())


def can_complete_together(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> bool:
    """Return whether ``complete_together`` gives each prompt the answer that it has alone, but for rounding.

    A recurrent model reads padding too, as a penalty on repetitions does, and a long prompt would leave the others less
    room.
    """
    room = min(room_for_answer(prompt, model, max_new_tokens) for prompt in prompts)
    return not model._is_stateful and not looks_back(model) and room == max_new_tokens


def _decode(tokenizer: PreTrainedTokenizerBase, answer: Sequence[int]) -> str:
    """Return the text of an answer's tokens."""
    text = str(tokenizer.decode(list(answer), skip_special_tokens=True))
    return text.rstrip("\ufffd").strip()  # U+FFFD: a character whose last bytes the length limit cut off
