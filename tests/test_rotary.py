"""Rotary frequencies that change with the length: a sample's are its own, whoever shares its batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from toolkit.activation_cache.packing import choose_packing, set_attention
from toolkit.config.schema import ModelConfig
from toolkit.data.batches import Batch, collate, pack
from toolkit.data.examples import Example
from toolkit.data.model_limits import position_limit
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.models.load import load
from toolkit.models.varlen import VARLEN
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import Suffix, split

SMALL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0, 6.0, 4.0, 2.0]}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", {"max_position_embeddings": 512, "original_max_position_embeddings": 20,
                          "rope_scaling": LONGROPE}),
    "dynamic": ("llama", {"max_position_embeddings": 20, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "by layer": ("gemma3_text", {
        "head_dim": 8, "max_position_embeddings": 20, "sliding_window": 8, "rope_parameters": {
            "full_attention": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }, "layer_types": ["sliding_attention", "full_attention"] * 2,
    }),
}  # fmt: skip


def rows(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    return [
        Example.with_answer(tuple(torch.randint(1, 500, (n,), generator=generator).tolist()), n - 4) for n in lengths
    ]


ROWS = rows(40, 12, 30, 8)
"""Some beyond 20 tokens, where the frequencies change, and some not."""


@pytest.fixture(params=KINDS)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    kind, values = KINDS[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **values}))
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def halves(directory: Path, boundary: int | None) -> tuple[Prefix | None, Suffix]:
    loaded = load(ModelConfig(name_or_path=str(directory), dtype="float32"))
    return split(loaded.model.eval(), loaded.anatomy, boundary)


@torch.no_grad()
def loss(prefix: Prefix | None, suffix: Suffix, batch: Batch) -> float:
    return float(suffix(prefix(batch) if prefix else None, batch))


@pytest.mark.parametrize("boundary", [None, 2])
def test_a_loss_does_not_depend_on_who_shares_the_micro_batch(directory: Path, boundary: int | None) -> None:
    prefix, suffix = halves(directory, boundary)
    alone = [loss(prefix, suffix, collate([row], 0)) for row in ROWS]
    again = [loss(prefix, suffix, collate([row], 0)) for row in ROWS]
    assert alone == again, "nor on what ran before"
    together = pytest.approx(sum(alone), rel=1e-5)
    assert loss(prefix, suffix, collate(ROWS, 0)) == together
    set_attention(suffix.model, VARLEN)
    assert loss(prefix, suffix, pack(ROWS)) == together


@torch.no_grad()
def test_alone_each_row_has_the_loss_that_transformers_gives_it(directory: Path) -> None:
    _, suffix = halves(directory, None)
    for row in ROWS:
        model = AutoModelForCausalLM.from_pretrained(directory).eval()
        ids = torch.tensor([row.token_ids])
        labels = ids.clone()
        labels[0, : row.answer_start] = -100
        expected = float(model(input_ids=ids, labels=labels).loss) * row.supervised_tokens
        assert loss(None, suffix, collate([row], 0)) == pytest.approx(expected, rel=1e-5)


def test_packing_is_tried_across_the_length_and_refused_where_it_matters(directory: Path) -> None:
    """The model as transformers loads it, whose rows of a batch share their frequencies."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    packing = choose_packing("auto", 2, None, Suffix(model, detect_anatomy(model), None), ROWS, torch.device("cpu"))
    assert not packing.on
    assert "other logits packed than alone" in packing.reason
    _, suffix = halves(directory, None)
    assert choose_packing("auto", 2, None, suffix, ROWS, torch.device("cpu")).on


def test_generation_with_a_cache_is_transformers_own(directory: Path) -> None:
    loaded = load(ModelConfig(name_or_path=str(directory), dtype="float32"))
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.tensor([ROWS[1].token_ids])
    ours, own = (
        model.eval().generate(ids, max_new_tokens=12, do_sample=False, use_cache=True, eos_token_id=None)
        for model in (loaded.model, theirs)
    )
    assert torch.equal(ours, own)


@pytest.mark.parametrize(("kind", "most"), [("longrope", 512), ("dynamic", 4 * 20), ("by layer", 4 * 20)])
def test_dynamic_ntk_stretches_the_positions_of_the_config(kind: str, most: int) -> None:
    model_type, values = KINDS[kind]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **values}))
    assert position_limit(model) == most
