"""Answer questions with a trained model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from toolkit.data.examples import Encoder
from toolkit.data.tasks import RowFaultError, Sample
from toolkit.errors import DataError
from toolkit.models.load import LoadedModel


def answers(
    loaded: LoadedModel,
    samples: Iterable[Sample],
    max_length: int,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> Iterator[str]:
    """The model's answer to each sample, from the same prompt that training used.

    Args:
        loaded: the model, on the device it is to run on.
        samples: questions with their contexts.
        max_length: longest prompt in tokens; context beyond it is cut.
        max_new_tokens: longest answer in tokens.
        temperature: 0 takes the most likely token each time; above 0 samples.

    Raises:
        DataError: a question alone is longer than ``max_length``.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    encoder = Encoder(tokenizer, max_length)
    model.eval()
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    for sample in samples:
        try:
            prompt = encoder.prompt_ids(sample)
        except RowFaultError as fault:
            raise DataError(f"question {sample.question[:60]!r} {fault}") from None
        ids = torch.tensor([prompt], device=model.device)
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                eos_token_id=encoder.stop_ids(),
                pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
                **sampling,
            )
        yield tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).rstrip("\ufffd").strip()
