"""The supervised loss in tiles: as exact as plain cross entropy, and never all of its logits in float32."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import tiny_llama
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from zoo import make

from toolkit.data.batches import Batch, collate
from toolkit.data.examples import Example
from toolkit.mask.apply import untie_head
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.runtime.errors import ModelError
from toolkit.split.activation_checkpointing import checkpoint_blocks
from toolkit.split.logit_tiles import BLOCK_BYTES
from toolkit.split.loss_head import Shortcuts
from toolkit.split.suffix import split
from toolkit.split.supervised_loss import linear_cross_entropy, tile_width

Tensors = list[torch.Tensor]


def capped(logits: torch.Tensor) -> torch.Tensor:
    """As Gemma 2 does."""
    return torch.tanh(logits / 3) * 3


def plain(
    hidden: Any, weight: Any, bias: Any, targets: Any, processing: Any = None, tile_bytes: int = 0
) -> torch.Tensor:
    logits = functional.linear(hidden, weight, bias)
    logits = logits if processing is None else processing(logits)
    return functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum"
    )


def inputs(positions: int, vocabulary: int, size: int) -> tuple[Tensors, torch.Tensor]:
    """Hidden states, weight and bias that bfloat16 holds exactly, and targets with the first and the last class."""
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(positions, size), (vocabulary, size), (vocabulary,)]
    scales = (1.0, 0.3, 1.0)
    drawn = [
        (torch.randn(shape, generator=generator) * scale).bfloat16()
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    targets = torch.randint(0, vocabulary, (positions,), generator=generator)
    targets[0] = vocabulary - 1
    targets[1:2] = 0
    return drawn, targets


def outcome(
    loss: Callable[..., torch.Tensor], given: Tensors, targets: torch.Tensor, scale: float, dtype: Any, **options: Any
) -> Tensors:
    """The loss and the gradients of hidden states, weight and bias."""
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in given]
    hidden, weight, *bias = leaves
    value = loss(hidden, weight, bias[0] if bias else None, targets, **options)
    (value * scale).backward()
    return [value.detach(), *[leaf.grad for leaf in leaves]]


@pytest.mark.parametrize("post", [None, capped])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("positions", "vocabulary", "tile_bytes"),
    [(1, 7, 2**27), (1, 7, 1), (53, 1000, 2**27), (53, 1003, 20000), (17, 9973, 17 * 2 * 2048), (3, 102400, 2**18)],
)
def test_the_error_is_that_of_plain_cross_entropy_in_the_same_precision(
    positions: int, vocabulary: int, tile_bytes: int, dtype: torch.dtype, post: Any
) -> None:
    given, targets = inputs(positions, vocabulary, 32)
    for used, scale in ((given, 1 / 53), (given[:2], -0.7)):
        exact = outcome(plain, used, targets, scale, torch.float64, processing=post)
        usual = outcome(plain, used, targets, scale, dtype, processing=post)
        ours = outcome(linear_cross_entropy, used, targets, scale, dtype, processing=post, tile_bytes=tile_bytes)
        for place, (own, reference, true) in enumerate(zip(ours, usual, exact, strict=True)):
            error = (reference - true).norm()
            if place == 1 and tile_bytes < 2**27:
                error *= 1.5  # the gradient of hidden is rounded in each tile before it is added up in float32
            assert (own - true).norm() <= error + 8 * torch.finfo(torch.float32).eps * true.norm()


@pytest.mark.parametrize("tile_bytes", [2**27, 4096])
@pytest.mark.parametrize("wanted", [w for w in itertools.product((True, False), repeat=3) if any(w)])
def test_exactly_the_gradients_that_are_asked_for_are_computed(wanted: tuple[bool, ...], tile_bytes: int) -> None:
    given, targets = inputs(11, 499, 32)
    leaves = [tensor.float().requires_grad_(wants) for tensor, wants in zip(given, wanted, strict=True)]
    same = [tensor.float().requires_grad_(wants) for tensor, wants in zip(given, wanted, strict=True)]
    loss = linear_cross_entropy(*leaves, targets, tile_bytes=tile_bytes)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    plain(*same, targets).backward()
    again = tile_bytes < 11 * 499 * 4
    assert counter.get_total_flops() == 2 * 11 * 499 * 32 * (wanted[0] + wanted[1] + again)
    for leaf, other in zip(leaves, same, strict=True):
        assert (leaf.grad is None) is (other.grad is None)
        assert leaf.grad is None or torch.allclose(leaf.grad, other.grad, atol=1e-5)


def test_a_scale_of_zero_gives_gradients_of_zero() -> None:
    given, targets = inputs(5, 50, 8)
    loss, *gradients = outcome(linear_cross_entropy, given, targets, 0.0, torch.bfloat16)
    assert loss > 0
    assert all(bool((gradient == 0).all()) for gradient in gradients)


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out._base is None:
            self.bytes = max(self.bytes, out.nbytes)
        return out


@pytest.mark.parametrize("tile_bytes", [2**20, 2**27])
def test_the_largest_tensor_is_a_tile_in_the_models_precision(tile_bytes: int) -> None:
    given, targets = inputs(96, 102400, 4)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaves = [tensor.clone().requires_grad_() for tensor in given]
    with _Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_cross_entropy(*leaves, targets, tile_bytes=tile_bytes).backward()
    logits = 96 * 102400 * 2
    tile = min(tile_bytes, logits)
    bound = max(tile, min(2 * tile, BLOCK_BYTES))  # the tile in float32, if that is no more than a block may be
    assert bound * 0.9 < largest.bytes <= bound
    own = sum(leaf.nbytes for leaf in leaves) + targets.nbytes + 96 * 4
    assert sum(saved.values()) == own + (logits if tile_bytes >= logits else 0)


def test_tiles_have_about_the_same_width_and_cover_the_vocabulary() -> None:
    assert tile_width(53, 49152, 2) == 49152
    assert tile_width(400, 102400, 4) == 51200
    assert tile_width(10**9, 102400, 2) == 1
    for vocabulary in (1, 999, 102400, 102401):
        width = tile_width(1000, vocabulary, 2, 2**20)
        assert width * 1000 * 2 <= 2**20
        assert width * -(-vocabulary // width) - vocabulary < width
        assert width % 64 == 0 or width in (vocabulary, 2**20 // 2000)
    assert tile_width(8188, 102400, 2) == 7936, "13 tiles of 7,877 columns take a GPU several times as long"
    assert tile_width(1, 49153, 2, 2 * 16448) == 16448, "3 tiles"
    assert tile_width(1, 49153, 2, 2 * 16385) == 12352, "16,384 columns a tile would leave a fourth one of a single one"


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    rows = [tuple(torch.randint(1, 500, (length,), generator=generator).tolist()) for length in (40, 23, 31)]
    return [collate([Example.with_answer(rows[0], 30)], 0), collate([Example.with_answer(row, 15) for row in rows], 0)]


def gradients_of(model: Any, batches: list[Batch], boundary: int | None, recompute: bool, settle: bool) -> Any:
    """Losses and gradients of two micro batches, both forward passes first, so that recomputation comes later."""
    prefix, suffix = split(model, detect_anatomy(model), boundary)
    hidden = [prefix(batch) if prefix else None for batch in batches]
    if settle:
        assert suffix.choose_shortcuts(hidden[0], batches[0]) == Shortcuts(True, True, (boundary or 0) < 6)
    if recompute:
        checkpoint_blocks(suffix.blocks(boundary or 0))
    losses = [suffix(own, batch) for own, batch in zip(hidden, batches, strict=True)]
    torch.autograd.backward([losses[1], losses[0]])
    found = {name: p.grad for name, p in suffix.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    return losses, found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("boundary", [None, 4, 6])
def test_the_short_cuts_change_neither_loss_nor_gradient(
    boundary: int | None, recompute: bool, batches: list[Batch]
) -> None:
    model = tiny_llama()
    untie_head(model, detect_anatomy(model))
    losses, gradients = gradients_of(model, batches, boundary, recompute, settle=True)
    expected, others = gradients_of(model, batches, boundary, False, settle=False)
    assert torch.allclose(torch.stack(losses), torch.stack(expected), rtol=1e-6)
    assert all(torch.allclose(gradients[name], others[name], rtol=1e-4, atol=1e-4) for name in others)


def test_the_last_mlp_computes_supervised_positions_alone(batches: list[Batch]) -> None:
    model = tiny_llama()
    prefix, suffix = split(model, detect_anatomy(model), 4)
    assert prefix is not None
    batch = batches[1]
    suffix.choose_shortcuts(prefix(batch), batch)
    seen: list[int] = []
    for block in suffix.blocks(4):
        block.mlp.gate_proj.register_forward_hook(lambda module, args, output: seen.append(output[..., 0].numel()))
    suffix(prefix(batch), batch)
    assert seen == [batch.input_ids.numel(), len(batch.targets)]


def test_what_looks_at_other_positions_is_not_narrowed(batches: list[Batch]) -> None:
    """A last MLP that mixes positions, and a final norm that does: it reads what the MLP gives elsewhere."""
    for name, expected in (("layers.5.mlp", Shortcuts(True, True, False)), ("norm", Shortcuts(True))):
        model = tiny_llama()
        part = model.model.get_submodule(name)
        inner = part.forward
        part.forward = lambda states, inner=inner: inner(states + states.mean(dim=1, keepdim=True))
        _, suffix = split(model, detect_anatomy(model), None)
        assert suffix.choose_shortcuts(None, batches[0]) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("opt", Shortcuts(tiled=True)),  # projects between norm and head
        ("olmo", Shortcuts(True, True, True)),  # has a norm without parameters
        ("cpmant", Shortcuts()),  # its code after the head does not run alone
    ],
)
def test_the_norm_is_narrowed_only_where_the_head_reads_its_output(name: str, expected: Shortcuts) -> None:
    model, batch = make(name).eval(), collate([Example.with_answer((5, 9, 23, 7, 4, 11), 3)], 0)
    _, suffix = split(model, detect_anatomy(model), None)
    assert suffix.choose_shortcuts(None, batch) == expected
    logits = model(input_ids=batch.input_ids, use_cache=False).logits.detach()[batch.supervised]
    loss = functional.cross_entropy(logits, batch.targets, reduction="sum")
    assert float(suffix(None, batch).detach()) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("boundary", [None, 4, 5, 6])
def test_only_the_entry_has_a_hook_and_no_forward_is_replaced(boundary: int | None) -> None:
    model = tiny_llama()
    _, suffix = split(model, detect_anatomy(model), boundary)
    hooks = [
        name for name, m in suffix.named_modules() for _ in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    ]
    entry = {4: "layers.4", 5: "layers.5", 6: "norm"}
    assert hooks == ([] if boundary is None else [f"model.model.{entry[boundary]}"])
    assert not any("forward" in vars(module) for module in suffix.modules())
    assert {name for name, _ in suffix.model.named_parameters()} <= {name for name, _ in model.named_parameters()}


def test_a_head_that_reads_other_positions_is_refused(batches: list[Batch]) -> None:
    model = tiny_llama()
    norm = model.model.norm
    inner = norm.forward
    norm.forward = lambda states: inner(states).transpose(0, 1)
    _, suffix = split(model, detect_anatomy(model), None)
    with pytest.raises(ModelError, match=r"cannot be trained: at its head, .* of \(3, 40\) .* found \(40, 3, 32\)"):
        suffix.choose_shortcuts(None, batches[1])


def test_a_head_that_is_more_than_a_product_gives_whole_logits(batches: list[Batch]) -> None:
    model = tiny_llama()

    class Doubling(torch.nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden)

    head = Doubling(32, 512, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    _, suffix = split(model, detect_anatomy(model), None)
    assert suffix.choose_shortcuts(None, batches[0]) == Shortcuts(False, True, True)
    assert "whole logits" in suffix.shortcuts.text
    whole = model(input_ids=batches[0].input_ids, use_cache=False).logits.detach()[batches[0].supervised]
    expected = functional.cross_entropy(whole, batches[0].targets, reduction="sum")
    assert float(suffix(None, batches[0]).detach()) == pytest.approx(float(expected), rel=1e-5)
