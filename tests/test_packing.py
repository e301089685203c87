"""Packing: rows laid end to end have the losses and gradients of padded rows, and never see each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import ROOT, tiny_llama
from test_zoo import CUT, make
from torch.nn import functional
from transformers import modeling_flash_attention_utils as flash

from toolkit.activation_cache.packing import choose_packing, set_attention
from toolkit.config.policy import Decision
from toolkit.config.schema import MaskConfig
from toolkit.data.batches import Batch, BatchPlan, collate, epoch_order, pack, step_batches
from toolkit.data.examples import Example
from toolkit.mask.apply import apply_mask
from toolkit.mask.layer_mask import build_mask
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.models.varlen import VARLEN
from toolkit.runtime.errors import ModelError
from toolkit.split.activation_checkpointing import checkpoint_blocks
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import Suffix, split
from toolkit.split.supervised_loss import supervised_loss

CPU = torch.device("cpu")

CROSSES = {
    "bamba": "causal_conv1d|mamba",
    "falcon_h1": "causal_conv1d|mamba",
    "jamba": "change the logits of the next one",
    "lfm2": "causal_conv1d",
    "minimax": "change the logits of the next one",
    "qwen3_next": "causal_conv1d|fla",
    "recurrent_gemma": "change the logits of the next one",
    # attention with biases or masks of its own
    "gpt_neo": "its code refuses packed rows",  # beyond its positions
    "bloom": "change the logits of the next one",
    "falcon": "change the logits of the next one",
    "falcon_mamba": "change the logits of the next one",
    "gpt_oss": "change the logits of the next one",
    "mamba": "change the logits of the next one",
    "mpt": "change the logits of the next one",
    "openai-gpt": "change the logits of the next one",
    "xglm": "change the logits of the next one",
}
"""Types that packing is refused for, with what the message says."""

UNDER_A_MASK = ["codegen", "gemma2", "gptj", "llama4_text", "nemotron", "stablelm"]
"""Types whose attention cannot be exchanged: exact, but each token of the row meets each; only on request."""

APART = [name for name in CUT if name not in CROSSES and name not in UNDER_A_MASK]
"""Types that auto packs."""


def rows(*lengths: int) -> tuple[Example, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        Example.with_answer(tuple(torch.randint(3, 60, (n,), generator=generator).tolist()), 5) for n in lengths
    )


ROWS = rows(17, 11, 14, 25)


def choose(
    mode: Any, prefix: Prefix | None, suffix: Suffix, micro: int = 4, examples: Sequence[Example] = ROWS
) -> Decision:
    return choose_packing(mode, micro, prefix, suffix, examples, CPU)


def gradients(prefix: Prefix | None, suffix: Suffix, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss on ``batch`` and the gradient of everything that trains."""
    suffix.model.zero_grad()
    loss = supervised_loss(suffix, prefix(batch) if prefix else None, batch, batch.supervised_tokens)
    loss.backward()
    found = {name: p.grad.clone() for name, p in suffix.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


def assert_same_learning(prefix: Prefix | None, suffix: Suffix, examples: Sequence[Example] = ROWS) -> None:
    """Packed, padded, and one by one: the same loss and gradients to float32's rounding."""
    packed, loss = pack(examples), 0.0
    assert packed.is_packed
    packed_loss, own = gradients(prefix, suffix, packed)
    if suffix.model.config._attn_implementation == VARLEN:
        assert gradients(prefix, suffix, collate(examples, 0))[0] == pytest.approx(packed_loss, rel=1e-5)
        set_attention(suffix.model, "sdpa")  # what the model comes with
    padded_loss, padded = gradients(prefix, suffix, collate(examples, 0))
    for example in examples:
        batch = collate([example], 0)
        loss += gradients(prefix, suffix, batch)[0] * batch.supervised_tokens / packed.supervised_tokens
    assert packed_loss == pytest.approx(padded_loss, rel=1e-5)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert own.keys() == padded.keys() != set()
    largest = max(float(gradient.abs().max()) for gradient in padded.values())
    for name, gradient in padded.items():
        assert (own[name] - gradient).abs().max() <= 2e-5 * largest, name


@pytest.mark.parametrize("name", APART)
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(name: str) -> None:
    model = make(name).eval()
    for boundary in (2, None):
        prefix, suffix = split(model, detect_anatomy(model), boundary)
        assert choose("auto", prefix, suffix) == Decision(True, "on (auto: exact on rows of this data)")
        assert_same_learning(prefix, suffix)


@pytest.mark.parametrize("name", UNDER_A_MASK)
def test_attention_under_a_mask_is_packed_only_on_request(name: str) -> None:
    model = make(name).eval()
    prefix, suffix = split(model, detect_anatomy(model), 2)
    assert not choose("auto", prefix, suffix).on
    assert choose("on", prefix, suffix).on
    assert_same_learning(prefix, suffix)


@pytest.mark.parametrize("name", CROSSES)
def test_a_model_that_lets_samples_cross_is_refused_by_name(name: str) -> None:
    model = make(name)
    prefix, suffix = split(model, detect_anatomy(model), 2)
    attention = model.config._attn_implementation
    auto = choose("auto", prefix, suffix)
    assert not auto.on
    assert auto.reason.startswith("off (auto: ")
    with pytest.raises(ModelError, match=CROSSES[name]) as refusal:
        choose("on", prefix, suffix)
    assert f"data.packing is on, but {type(suffix.model).__name__} " in str(refusal.value)
    assert "Set data.packing to off, or to auto" in str(refusal.value)
    assert suffix.model.config._attn_implementation == attention, "padded rows run as they did"


def test_what_needs_no_packing_is_left_as_it_is() -> None:
    _, suffix = split(tiny_llama(), detect_anatomy(tiny_llama()), None)
    assert choose("off", None, suffix) == Decision(False, "off, as the recipe says")
    assert "one row" in choose("on", None, suffix, micro=1).reason
    assert "one length" in choose("on", None, suffix, examples=rows(9, 9)).reason
    assert suffix.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", ["untie", "head_only", "both"])
@pytest.mark.parametrize("selectors", [("last:4", "head"), ("head",), ("first:1", "head"), ("embeddings", "head")])
def test_every_mask_learns_the_same_packed(selectors: tuple[str, ...], tied: Any, checkpointing: bool) -> None:
    if "embeddings" in selectors and tied == "head_only":
        return  # contradicts itself
    model = tiny_llama().train()
    anatomy = detect_anatomy(model)
    mask = build_mask(MaskConfig(train=list(selectors), tied=tied), anatomy)
    apply_mask(model, mask, anatomy)
    prefix, suffix = split(model, anatomy, mask.boundary if mask.has_prefix else None)
    assert choose("auto", prefix, suffix).on
    if checkpointing:
        checkpoint_blocks(suffix.blocks(mask.boundary))
    assert_same_learning(prefix, suffix)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_packed_row_may_be_longer_than_the_models_positions(name: str) -> None:
    model = make(name).eval()
    examples = rows(50, 64, 33)  # of 64 positions
    prefix, suffix = split(model, detect_anatomy(model), 2)
    assert choose("on", prefix, suffix, examples=examples).on
    assert_same_learning(prefix, suffix, examples)


def test_attention_is_computed_inside_each_sample_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, seen = functional.scaled_dot_product_attention, []

    def watched(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((query.shape[2], key.shape[2], kwargs.get("is_causal"), kwargs.get("attn_mask") is None))
        return kernel(query, key, value, *args, **kwargs)

    model = make("mistral").eval()  # sees 6 tokens back
    prefix, suffix = split(model, detect_anatomy(model), 2)
    assert prefix is not None
    assert choose("auto", prefix, suffix).on
    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    batch = pack(rows(5, 9))
    suffix(prefix(batch), batch)
    assert seen == [(5, 5, True, True), (9, 9, False, False)] * 4, "a sample within the window needs no mask"


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize(("drop", "finding"), [("sample_lengths", "change the logits of the next one")])
def test_the_check_sees_samples_that_attend_to_each_other(
    name: str, drop: str, finding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Batch.forward_inputs
    monkeypatch.setattr(Batch, "forward_inputs", lambda *args: {k: v for k, v in inputs(*args).items() if k != drop})
    prefix, suffix = split(make(name), detect_anatomy(make(name)), 2)
    assert finding in choose("auto", prefix, suffix).reason


def test_the_check_sees_positions_that_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def running_on(examples: Sequence[Example]) -> Batch:
        batch = pack(examples)
        return replace(batch, position_ids=torch.arange(batch.tokens)[None])

    monkeypatch.setattr("toolkit.activation_cache.packing.pack", running_on)
    model = make("gpt2")
    prefix, suffix = split(model, detect_anatomy(model), 2)
    assert "rows give other logits packed than alone" in choose("auto", prefix, suffix, micro=2).reason


def test_flash_attention_is_told_where_samples_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for its kernel, which no CPU runs."""
    seen = []

    def varlen(query: Any, key: Any, value: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **options: Any) -> Any:
        ends = cu_seqlens_q.tolist()
        seen.append((ends, cu_seqlens_k.tolist(), options["max_seqlen_q"]))
        pieces = []
        for start, end in pairwise(ends):
            states = [s[start:end].transpose(0, 1)[None] for s in (query, key, value)]
            out = functional.scaled_dot_product_attention(*states, is_causal=True, enable_gqa=True)
            pieces.append(out[0].transpose(0, 1))
        return torch.cat(pieces)

    def whole(query: Any, key: Any, value: Any, **options: Any) -> Any:
        states = [s.transpose(1, 2) for s in (query, key, value)]
        return functional.scaled_dot_product_attention(*states, is_causal=True, enable_gqa=True).transpose(1, 2)

    def unpad(states: Any, mask: Any) -> Any:
        raise AssertionError("queries and keys are of one length")

    def pad(states: Any, indices: Any, batch: int, length: int) -> Any:
        out = states.new_zeros(batch * length, *states.shape[1:])
        out[indices] = states
        return out.view(batch, length, *states.shape[1:])

    functions = ((whole, varlen, None, pad, unpad), (lambda **options: options, None))
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda implementation: functions)
    model = make("llama").eval()
    model.config._attn_implementation = "flash_attention_2"
    prefix, suffix = split(model, detect_anatomy(model), 2)
    assert prefix is not None
    assert choose("auto", prefix, suffix).on
    assert model.config._attn_implementation == "flash_attention_2"
    seen.clear()
    batch = pack(ROWS)
    suffix(prefix(batch), batch)
    assert seen == [([0, 17, 28, 42, 67], [0, 17, 28, 42, 67], 25)] * 4
    assert_same_learning(prefix, suffix)


def test_the_batches_of_an_epoch_hold_the_same_rows_and_no_padding() -> None:
    examples = rows(*(3 + index * 7 % 11 + 5 for index in range(14)))
    plan, order = BatchPlan(14, 3, accumulation=2), epoch_order(14, 0, 0)
    packed, padded = (
        [batch for step in step_batches(examples, order, plan, 0, packed=on) for batch in step] for on in (True, False)
    )
    assert [batch.examples for batch in packed] == [batch.examples for batch in padded]
    tokens = sum(len(example.token_ids) for example in examples)
    assert sum(batch.input_ids.numel() for batch in packed) == tokens
    assert sum(batch.input_ids.numel() for batch in padded) > tokens
    assert all(batch.attention_mask is None for batch in packed)


def test_the_documentation_counts_these_types() -> None:
    text = " ".join((ROOT / "docs/packing.md").read_text(encoding="utf-8").split())
    assert (
        f"Of the {len(CUT)} model types of `tests/test_zoo.py` that are cut, `auto` packs {len(APART)}, and `on` takes "
        f"{len(UNDER_A_MASK)} more under a mask. The other {len(CROSSES)} are padded"
    ) in text
