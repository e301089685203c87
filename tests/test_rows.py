"""Rows of tables: what a plain loop learns that trains the whole table with all other rows' gradient zeroed."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo import CUT, OTHER, UNCUT, make

from toolkit.config.schema import MaskConfig, OptimConfig, TrainConfig
from toolkit.data.batches import Batch, collate
from toolkit.data.examples import Example
from toolkit.engine.local import LocalEngine
from toolkit.mask.apply import apply_mask, trainable_parameters
from toolkit.mask.layer_mask import LayerMask, build_mask
from toolkit.mask.row_layers import RowPlaces, TrainedRows, merge_rows
from toolkit.models.added_tokens import add_token_rows
from toolkit.models.anatomy import Anatomy
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import ModelError
from toolkit.split import supervised_loss as loss_module
from toolkit.split.exactness import split_is_exact
from toolkit.split.suffix import split
from toolkit.split.supervised_loss import supervised_loss

STEPS, RATE, DECAY = 30, 1e-2, 0.1
IDS = (7, 8, 9, 30)
ROWS = [{"rows": {"select": ["embeddings", "head"], "from": 7, "to": 9, "weight_decay": DECAY}}]
ROWS += [{"rows": {"select": ["embeddings", "head"], "ids": [30], "weight_decay": DECAY}}]


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """A micro batch of two rows a step, of which one is padded; some of the tokens are those whose rows train."""
    generator = torch.Generator().manual_seed(1)
    rows = [tuple(torch.randint(3, 35, (n,), generator=generator).tolist()) for n in (17, 11, 13, 17) * (STEPS // 2)]
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return [collate([Example.with_answer(first, 9), Example.with_answer(second, 5)], 0) for first, second in pairs]


def tiny(name: str, tied: bool) -> Any:
    model = make(name, tie_word_embeddings=tied)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def build(model: Any, train: list[Any], **settings: Any) -> tuple[LayerMask, Anatomy]:
    anatomy = detect_anatomy(model)
    return build_mask(MaskConfig(train=train, **settings), anatomy), anatomy


def learn(model: Any, mask: LayerMask, anatomy: Anatomy, batches: list[Batch]) -> list[float]:
    """Train the masked model, cut at its frost line; return the loss of every step."""
    apply_mask(model.train(), mask, anatomy)
    prefix, suffix = split(model, anatomy, mask.boundary if mask.has_prefix else None)
    assert prefix is None or split_is_exact(model, prefix, suffix, batches[0])
    shortcuts = suffix.choose_shortcuts(prefix(batches[0]) if prefix else None, batches[0])
    assert shortcuts.tiled
    train = TrainConfig(learning_rate=RATE, warmup_ratio=0, max_grad_norm=0)
    engine = LocalEngine(
        suffix, trainable_parameters(suffix.model, mask), mask.groups, train, OptimConfig(), STEPS, World()
    )
    losses = []
    for batch in batches:
        hidden = prefix(batch) if prefix else None
        loss = supervised_loss(engine.forward_loss, hidden, batch, len(batch.targets))
        engine.backward(loss, is_last=True)
        engine.update()
        losses.append(float(loss.detach()))
    return losses


def learn_by_masking(model: Any, tables: list[Any], batches: list[Batch]) -> list[float]:
    """Train whole tables in a plain loop, the gradient of all rows but ``IDS`` zeroed, and decay on those alone."""
    model.train().requires_grad_(False)
    for table in tables:
        table.requires_grad_(True)
    optimizer = torch.optim.AdamW(tables, lr=RATE, weight_decay=0.0)
    own = list(IDS)
    losses = []
    for step, batch in enumerate(batches):
        rate = optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[batch.supervised], batch.targets)
        loss.backward()
        with torch.no_grad():
            for table in tables:
                kept = table.grad[own].clone()
                table.grad.zero_()
                table.grad[own] = kept
                table[own] *= 1 - rate * DECAY
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


SEVERAL = [pytest.param(name, 3, marks=pytest.mark.slow) for name in ("qwen2", "gemma2", "gemma3_text", "gpt2")]
SEVERAL += [pytest.param(name, 3, marks=pytest.mark.slow) for name in ("cohere", "phi")]


@pytest.mark.parametrize("tied", ["apart", "both", "head_only", "untie"])
@pytest.mark.parametrize(("name", "tiles"), [("llama", 1), ("llama", 3), *SEVERAL])
def test_rows_learn_what_a_masked_gradient_teaches_the_whole_table(
    name: str, tied: str, tiles: int, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cohere scales its logits, Gemma 2 caps them, Gemma 3 scales its embeddings, and Phi's head has a bias."""
    width = -(-64 // tiles)
    monkeypatch.setattr(loss_module, "tile_width", lambda *sizes: width)
    model = tiny(name, tied != "apart")
    train = [{"rows": {**entry["rows"], "select": "head"}} for entry in ROWS] if tied == "head_only" else ROWS
    mask, anatomy = build(model, train, tied=tied if tied != "apart" else "error")
    reference, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    head, embeddings = reference.get_output_embeddings(), reference.get_input_embeddings()
    if tied == "untie":
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    if tied == "head_only":
        embeddings.register_forward_hook(lambda module, args, output: output.detach())
    assert mask.boundary == (mask.block_count if tied == "head_only" else 0)
    tables = list(dict.fromkeys([embeddings.weight, head.weight]))
    assert len(mask.trainable) == 2 * len(tables), "an entry is a tensor for each table"
    expected = learn_by_masking(reference, tables, batches)
    found = learn(model, mask, anatomy, batches)
    assert found == pytest.approx(expected, abs=1e-5)
    merge_rows(model, {}, lambda exact, out: out.copy_(exact))
    after, trained = model.state_dict(), {f"{name}.weight" for name in (anatomy.token_table, anatomy.head)}
    others = [row for row in range(64) if row not in IDS]
    for key, tensor in reference.state_dict().items():
        if key not in trained:
            assert torch.equal(after[key], before[key]), key
            continue
        assert torch.equal(after[key][others], before[key][others]), key
        assert torch.allclose(after[key][list(IDS)], tensor[list(IDS)], atol=1e-5), key
        assert float((after[key][list(IDS)] - before[key][list(IDS)]).abs().min(1).values.max()) > 1e-4, key
    assert type(model.get_input_embeddings()) is type(embeddings)
    assert set(after) == set(before)


class Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The shapes of all tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.seen |= {tuple(each.shape) for each in tree_leaves(out) if isinstance(each, torch.Tensor)}
        return out


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("tied", ["apart", "both"])
def test_no_gradient_as_large_as_the_table_is_made(tied: str, tiled: bool, batches: list[Batch]) -> None:
    model = tiny("llama", tied == "both")
    mask, anatomy = build(model, ROWS, tied="both")
    apply_mask(model.train(), mask, anatomy)
    _, suffix = split(model, anatomy, None)
    if tiled:
        suffix.choose_shortcuts(None, batches[0])
    shapes = Shapes()
    with shapes:
        suffix(None, batches[0]).backward()
    assert (64, 32) not in shapes.seen
    assert (4, 32) in shapes.seen
    gradients = {name: parameter.grad for name, parameter in suffix.model.named_parameters()}
    assert {name for name, grad in gradients.items() if grad is not None} == set(mask.names)


def test_many_equal_tokens_add_up_in_float32() -> None:
    """In bfloat16, where torch's own lookup loses a part of the sum; the padding row of a table gets no gradient."""
    model = tiny("llama", tied=False).to(torch.bfloat16)
    mask, anatomy = build(model, [{"rows": {"select": "embeddings", "ids": [0, 7]}}])
    apply_mask(model, mask, anatomy)
    table = model.get_input_embeddings()
    assert table.padding_idx == 0
    ids = torch.tensor([[7] * 1000 + [0] * 5 + [8] * 3])
    gradient = torch.randn(1, ids.numel(), 32, generator=torch.Generator().manual_seed(0)).bfloat16() + 0.5
    table(ids).backward(gradient)
    (rows,) = trainable_parameters(model, mask).values()
    assert rows.grad is not None
    exact = gradient[0, :1000].double().sum(0)
    assert torch.equal(rows.grad[1], exact.to(torch.bfloat16))
    assert not rows.grad[0].any()


@pytest.mark.parametrize("in_float32", [False, True])
@pytest.mark.parametrize("width", [16, 64])
def test_the_loss_of_rows_is_that_of_the_table_with_the_rows_put_in(width: int, in_float32: bool) -> None:
    """In bfloat16, to within its rounding; the rows lie in two tiles, next to one another and apart."""
    generator = torch.Generator().manual_seed(0)
    hidden, table, values = (torch.randn(n, 24, generator=generator).bfloat16() for n in (9, 64, 4))
    bias, targets = torch.randn(64, generator=generator).bfloat16(), torch.tensor([7, 8, 30, 40, 5, 7, 63, 0, 30])
    inputs = [tensor.clone().requires_grad_() for tensor in (hidden, values)]
    rows = TrainedRows(inputs[1], RowPlaces(IDS, torch.tensor(IDS)))
    loss = loss_module.linear_cross_entropy(
        inputs[0], table, bias, targets, lambda logits: logits / 4, 2 * width * 9, in_float32, rows
    )
    loss.backward()
    exact = [tensor.double().requires_grad_() for tensor in (hidden, values)]
    whole = table.double().index_copy(0, torch.tensor(IDS), exact[1])
    expected = torch.nn.functional.cross_entropy((exact[0] @ whole.T + bias.double()) / 4, targets, reduction="sum")
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=5e-3)
    for found, right in zip(inputs, exact, strict=True):
        assert found.grad is not None
        assert right.grad is not None
        assert float((found.grad - right.grad).abs().max()) < 0.03 * float(right.grad.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CUT, *UNCUT, *OTHER])
def test_every_types_rows_take_part_and_new_ones_have_room(name: str, batches: list[Batch]) -> None:
    """A model with rows computes what it does with the rows put in, and the gradient reaches those that occur."""
    model = make(name, vocab_size=72, vocab_size_per_layer_input=72).eval()
    inputs = {"input_ids": batches[0].input_ids, "use_cache": False}
    with torch.no_grad():
        before = model(**inputs).logits
    try:
        add_token_rows(model, (72, 73))
    except ModelError as error:
        assert re.search("which transformers does not lengthen|which cannot be lengthened", str(error))
        assert name in ("gemma3n_text", "gemma4_text:per layer", "cpmant")
        return
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits[..., :72], before, atol=1e-5), "old tokens as before"
    mask, anatomy = build(model, [{"rows": {"select": ["embeddings", "head"], "ids": [*IDS, 73]}}], tied="both")
    apply_mask(model, mask, anatomy)
    trained = trainable_parameters(model, mask)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    inputs["input_ids"] = torch.cat((batches[0].input_ids, torch.tensor([[73, *IDS], [*IDS, 73]])), 1)
    logits = model(**inputs).logits
    assert logits.shape[-1] == 74
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["input_ids"].flatten()).backward()
    for key, parameter in trained.items():
        assert parameter.grad is not None
        assert parameter.grad.any(1).all(), key
    merge_rows(model, {}, lambda exact, out: out.copy_(exact))
    with torch.no_grad():
        merged = model(**inputs).logits
    assert torch.allclose(logits.detach(), merged, atol=1e-4 * float(merged.abs().max()))
