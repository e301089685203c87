"""The attention of packed rows, wherever rows are not packed: transformers' ``sdpa`` to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ENGLISH, metrics, tiny_flags, train
from test_packing import APART
from test_zoo import make

from toolkit.activation_cache.packing import set_attention
from toolkit.models.varlen import VARLEN

PROMPTS = ((5, 9, 7, 11, 6, 8, 10, 12, 9), (0, 0, 0, 9, 7, 5, 8, 6, 13))
"""Longer than the zoo's sliding windows; the second one is padded on the left."""


SEVERAL = ("llama", "gpt2", "mistral", "gemma3_text", "exaone4")
"""Learned and rotary positions, with a sliding window in every block, in some and in none."""


def answer(model: Any, attention: str, prompts: Any, **options: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Tokens, and the logits that they were chosen by, under an attention."""
    set_attention(model, attention)
    ids = torch.tensor(prompts)
    found = model.generate(
        input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=8, min_new_tokens=8, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    return found.sequences, list(found.logits)


@pytest.mark.parametrize(
    ("name", "cache"), [*((name, "dynamic") for name in APART), *((name, "static") for name in SEVERAL)]
)
def test_a_model_that_was_trained_on_packed_rows_answers_as_under_sdpa(name: str, cache: str) -> None:
    model = make(name).eval()
    options = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    for prompts in (PROMPTS[:1], PROMPTS):
        expected, logits = answer(model, "sdpa", prompts, **options)
        found, own = answer(model, VARLEN, prompts, **options)
        assert model.config._attn_implementation == VARLEN
        assert torch.equal(found, expected)
        assert all(torch.equal(one, other) for one, other in zip(own, logits, strict=True))


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("masked", [True, False])
def test_a_prompt_in_pieces_fills_the_cache_as_under_sdpa(name: str, masked: bool) -> None:
    """Pieces of several tokens meet what is there already: as many queries, more keys."""
    model = make(name).eval()
    ids = torch.tensor(PROMPTS[:1])
    found = []
    for attention in ("sdpa", VARLEN):
        set_attention(model, attention)
        cache, logits = None, []
        for start, end in ((0, 4), (4, 8), (8, 9)):
            mask = torch.ones(1, end, dtype=torch.long) if masked else None
            output = model(ids[:, start:end], attention_mask=mask, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        found.append(torch.cat(logits, dim=1))
    assert torch.equal(*found)


def test_the_quickstart_with_larger_micro_batches_shows_answers(tiny_model: Path, tmp_path: Path) -> None:
    flags = tiny_flags(
        tiny_model, tmp_path / "run", "--train.micro_batch_size", 8, "--data.path", ENGLISH, "--data.validation", 0.25,
        "--train.epochs", 1, "--output.sample_answers", 2, "--output.sample_tokens", 4,
    )  # fmt: skip
    assert train(*flags) == 0
    assert len(metrics(tmp_path / "run", "eval_loss")) == 1
