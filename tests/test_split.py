"""The cut at the frost line: nothing below it is ever reached by the gradient. test_zoo.py has that it is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import tiny_llama
from torch import nn
from transformers import LlamaForCausalLM

from toolkit.config.schema import MaskConfig
from toolkit.data.batches import Batch, collate
from toolkit.data.examples import Example
from toolkit.mask.apply import apply_mask
from toolkit.mask.layer_mask import LayerMask, build_mask
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.split.activation_checkpointing import checkpoint_blocks
from toolkit.split.exactness import split_is_exact
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import Suffix, split
from toolkit.split.supervised_loss import supervised_loss


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    ids = [tuple(torch.randint(1, 60, (length,), generator=generator).tolist()) for length in (17, 11, 17)]
    return [collate([Example.with_answer(ids[0], 9)], 0), collate([Example.with_answer(row, 5) for row in ids], 0)]


def masked(model: Any, *train: str) -> tuple[LayerMask, Prefix | None, Suffix]:
    anatomy = detect_anatomy(model)
    mask = build_mask(MaskConfig(train=list(train), tied="untie"), anatomy)
    apply_mask(model, mask, anatomy)
    return mask, *split(model, anatomy, mask.boundary if mask.has_prefix else None)


class ReadsEmbeddingsAgain(LlamaForCausalLM):
    """An architecture that cannot be cut: its logits depend on the embeddings beside the blocks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + self.model.embed_tokens.weight.sum()
        return output


def test_a_model_that_cannot_be_cut_is_found_out(batches: list[Batch]) -> None:
    torch.manual_seed(0)
    model = ReadsEmbeddingsAgain(tiny_llama(tied=False).config)
    prefix, suffix = split(model, detect_anatomy(model), 2)
    assert prefix is not None
    assert not split_is_exact(model, prefix, suffix, batches[0])


def test_a_state_that_a_model_kept_from_a_pass_with_gradients_does_not_hinder_the_cut(batches: list[Batch]) -> None:
    model = tiny_llama()
    model.model.last_state = model.model.embed_tokens.weight * 2  # as recurrent models do; deepcopy refuses it
    prefix, suffix = split(model, detect_anatomy(model), 3)
    assert prefix is not None
    assert split_is_exact(model, prefix, suffix, batches[0])


def test_a_look_at_the_split_leaves_dropout_as_it_was_and_draws_no_random_number(batches: list[Batch]) -> None:
    model = tiny_llama().train()
    model.model.norm.eval()
    state = torch.get_rng_state()
    prefix, suffix = split(model, detect_anatomy(model), 3)
    assert prefix is not None
    assert split_is_exact(model, prefix, suffix, batches[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert [m for m in model.modules() if not m.training] == [model.model.norm]
    assert all(module.training for module in prefix.modules())


def test_a_suffix_that_computes_otherwise_is_not_called_exact(batches: list[Batch]) -> None:
    model = tiny_llama()
    prefix, suffix = split(model, detect_anatomy(model), 3)
    assert prefix is not None
    suffix.blocks(3)[0].forward = lambda hidden_states, **_: hidden_states  # type: ignore[method-assign]
    assert not split_is_exact(model, prefix, suffix, batches[0])


def test_the_suffix_holds_no_tensor_below_the_frost_line_and_the_prefix_none_above() -> None:
    model = tiny_llama()
    mask, prefix, suffix = masked(model, "last:4", "head")
    assert prefix is not None
    below = {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("model.embed", "model.layers.0", "model.layers.1"))
    }
    assert {name.removeprefix("model.") for name, _ in suffix.named_parameters()} == {
        name for name, _ in model.named_parameters() if name not in below
    }
    assert {name.removeprefix("model.") for name, _ in prefix.named_parameters()} == below
    assert mask.boundary == 2


def reached(suffix: Suffix, prefix: Prefix | None) -> tuple[set[int], dict[int, int]]:
    """Indices of blocks that a gradient enters, and how often each block of the suffix computes; filled by a step."""
    entered: set[int] = set()
    computed: dict[int, int] = {}
    blocks = list(suffix.blocks(0))

    def watch(block: nn.Module, index: int) -> None:
        """Note when a gradient arrives at the block's output."""

        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: entered.add(index))

        block.register_forward_hook(hook)

    for index, block in enumerate(blocks):
        watch(block, index)
        inner = getattr(block, "mlp", None)
        if inner is not None:
            inner.register_forward_pre_hook(
                lambda *_, index=index: computed.update({index: computed.get(index, 0) + 1})
            )
    if prefix is not None:
        for index, block in enumerate(prefix.model.model.layers):
            watch(block, -1 - index)
    return entered, computed


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("cut", [True, False])
def test_backward_reaches_exactly_the_trained_blocks(checkpointing: bool, cut: bool, batches: list[Batch]) -> None:
    model = tiny_llama().train()
    mask, prefix, suffix = masked(model, "last:4", "head")
    if not cut:
        prefix, suffix = split(model, detect_anatomy(model), None)
    if checkpointing:
        checkpoint_blocks(suffix.blocks(mask.boundary))
    entered, computed = reached(suffix, prefix)
    hidden = prefix(batches[0]) if prefix else None
    assert hidden is None or not hidden.requires_grad
    supervised_loss(suffix, hidden, batches[0], 8).backward()
    assert entered == {2, 3, 4, 5}
    trained = dict.fromkeys(range(2, 6), 2 if checkpointing else 1)
    assert computed == (trained if cut else {0: 1, 1: 1, **trained})


@pytest.mark.parametrize(
    "train", [("last:4", "head"), ("head",), ("norm",), ("blocks:3",), ("first:1",), ("embeddings",)]
)
def test_checkpointing_and_cutting_change_no_gradient(train: tuple[str, ...], batches: list[Batch]) -> None:
    gradients = []
    for checkpointing, cut in ((False, True), (True, True), (False, False)):
        model = tiny_llama().train()
        mask, prefix, suffix = masked(model, *train)
        if not cut:
            prefix, suffix = split(model, detect_anatomy(model), None)
        if checkpointing:
            checkpoint_blocks(suffix.blocks(mask.boundary))
        hidden = prefix(batches[1]) if prefix else None
        supervised_loss(suffix, hidden, batches[1], 30).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for other in gradients[1:]:
        assert all(torch.equal(gradients[0][name], other[name]) for name in gradients[0])
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0].values())


def test_a_pass_builds_no_new_list_of_the_blocks(batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    _, prefix, suffix = masked(tiny_llama(tied=False), "last:2")
    assert prefix is not None
    built, original = list[nn.ModuleList](), nn.ModuleList.__init__

    def count(self: nn.ModuleList, *args: Any) -> None:
        built.append(self)
        original(self, *args)

    monkeypatch.setattr(nn.ModuleList, "__init__", count)
    suffix(prefix(batches[1]), batches[1])
    assert not built
    suffix.model.model.layers.__class__ = nn.ModuleList
    suffix(prefix(batches[1]), batches[1])
    assert len(built) == 1, "as transformers' code does it"


def test_the_head_sees_supervised_positions_only(batches: list[Batch]) -> None:
    _, prefix, suffix = masked(tiny_llama(), "head")
    seen: list[torch.Size] = []
    suffix.model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert prefix is not None
    suffix(prefix(batches[1]), batches[1])
    assert seen == [torch.Size([1, len(batches[1].targets), 512])]


def test_the_loss_is_the_token_mean_over_shares_and_a_filler_adds_nothing(batches: list[Batch]) -> None:
    _, prefix, suffix = masked(tiny_llama(), "last:1")
    assert prefix is not None
    one, three = batches
    total = one.supervised_tokens + three.supervised_tokens
    with torch.no_grad():
        share = sum(float(supervised_loss(suffix, prefix(batch), batch, total)) for batch in (one, three))
        each = torch.cat(
            [
                nn.functional.cross_entropy(
                    suffix.logits(prefix(batch), batch).double(), batch.targets, reduction="none"
                )
                for batch in (one, three)
            ]
        )
    assert share == pytest.approx(float(each.mean()), abs=1e-5)
    filler = Batch(one.input_ids, None, one.supervised, one.targets, one.tokens, is_filler=True)
    assert supervised_loss(suffix, prefix(filler), filler, total).item() == 0
