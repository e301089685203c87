"""Gradients that are summed over ranks while backward runs: what is launched when, and how many bytes it takes."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from toolkit.optim import gradient_buckets
from toolkit.optim.gradient_buckets import GradientBuckets
from toolkit.optim.master_adamw import MasterAdamW
from toolkit.planning.engine_memory import engine_memory
from toolkit.planning.engine_spec import engine_spec
from toolkit.planning.prefix_memory import PrefixMemory
from toolkit.planning.tensor_sizes import TensorSizes
from toolkit.runtime.errors import ModelError

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
WIDTH, BLOCKS = 16, 4


@pytest.fixture(autouse=True)
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone, and buckets as large as one of ``blocks`` in float32."""
    monkeypatch.setattr(gradient_buckets, "BUCKET_BYTES", 4 * (WIDTH + 1) * WIDTH)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of each all-reduce, in order."""
    given: list[int] = []
    all_reduce = dist.all_reduce

    def watched(tensor: torch.Tensor, **options: Any) -> Any:
        given.append(tensor.numel())
        return all_reduce(tensor, **options)

    monkeypatch.setattr(dist, "all_reduce", watched)
    return given


class Bytes(TorchDispatchMode):
    """The bytes of tensors that are made, by precision, without those of single numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.untyped_storage()._cdata not in known:
                self.made[tensor.dtype] += tensor.untyped_storage().nbytes()
        return out


def blocks(dtype: torch.dtype = FLOAT32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(BLOCKS)))


def loss_of(model: nn.Module, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    dtype = next(model.parameters()).dtype
    output: torch.Tensor = model(torch.randn(8, WIDTH, dtype=dtype))
    return output.square().sum()


def collect(buckets: GradientBuckets, loss: torch.Tensor, is_last: bool = True) -> None:
    with buckets.collecting(is_last):
        loss.backward()


def test_a_bucket_is_launched_when_backward_has_passed_it(launched: list[int]) -> None:
    model = blocks()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(loss_of(model), parameters)
    buckets, before = GradientBuckets(parameters, FLOAT32), []

    def note(_module: nn.Module, _given: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda _: before.append(len(launched)))

    for block in model:
        block.register_forward_hook(note)
    with buckets.collecting(is_last=True):
        loss_of(model).backward()
        assert launched == [(WIDTH + 1) * WIDTH] * BLOCKS, "none is left for when backward has ended"
    assert before == [0, 1, 2, 3]
    assert all(parameter.grad is None for parameter in parameters)
    assert all(map(torch.equal, buckets.wait().values(), [expected[i] for i in (7, 6, 5, 4, 3, 2, 1, 0)]))


@pytest.mark.parametrize("summed_in", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_passes_add_up_in_float32_and_the_last_alone_is_summed(
    launched: list[int], dtype: torch.dtype, summed_in: torch.dtype
) -> None:
    model = blocks(dtype)
    parameters = list(model.parameters())
    buckets, passes = GradientBuckets(parameters, summed_in), []
    for seed in range(3):
        assert not launched
        passes.append(torch.autograd.grad(loss_of(model, seed), parameters))
        collect(buckets, loss_of(model, seed), is_last=seed == 2)
    summed = buckets.wait()
    for index, parameter in enumerate(parameters):
        a, b, c = (gradients[index].float() for gradients in passes)
        assert torch.equal(summed[parameter], (a + b + c).to(summed_in))


def test_what_a_pass_does_not_reach_counts_as_zero_and_changes_no_order(launched: list[int]) -> None:
    """As experts that no token of a rank goes to; another rank launches the same buckets meanwhile."""
    model = blocks()
    parameters = list(model.parameters())
    buckets = GradientBuckets(parameters, FLOAT32)
    with buckets.collecting(is_last=True):
        (model[3](model[1](torch.ones(2, WIDTH))).sum()).backward()
        assert len(launched) == 1, "the second is not whole, and those after it wait"
    assert launched == [(WIDTH + 1) * WIDTH] * BLOCKS
    summed = buckets.wait()
    assert [bool(summed[block.weight].any()) for block in model] == [False, True, False, True]
    collect(buckets, loss_of(model), is_last=False)
    collect(buckets, model[0](torch.ones(2, WIDTH)).sum())
    assert all(bool(summed.any()) for summed in buckets.wait().values())


def test_a_tensor_in_two_places_is_taken_when_it_has_both_gradients(launched: list[int]) -> None:
    model = blocks()
    model[3].weight = model[0].weight  # as a tied head
    parameters = list(model.parameters())
    expected = torch.autograd.grad(loss_of(model), parameters)
    buckets = GradientBuckets(parameters, FLOAT32)
    collect(buckets, loss_of(model))
    summed = buckets.wait()
    assert all(torch.equal(summed[p], gradient) for p, gradient in zip(parameters, expected, strict=True))


def test_recomputed_blocks_are_summed_once_and_reentrant_ones_refused() -> None:
    model = blocks()
    parameters, states = list(model.parameters()), torch.ones(2, WIDTH, requires_grad=True)
    buckets = GradientBuckets(parameters, FLOAT32)
    expected = torch.autograd.grad(model(states).sum(), parameters)
    collect(buckets, checkpoint(model, states, use_reentrant=False).sum())
    summed = buckets.wait()
    assert all(torch.equal(summed[p], gradient) for p, gradient in zip(parameters, expected, strict=True))
    twice = checkpoint(model, checkpoint(model, states, use_reentrant=True), use_reentrant=True).sum()
    with pytest.raises(ModelError, match="another gradient after its sum over ranks had begun"):
        collect(buckets, twice)


def update(buckets: GradientBuckets, optimizer: MasterAdamW, model: nn.Module, passes: int) -> Bytes:
    """A step, and the bytes that it makes beside gradients and activations."""
    losses = [loss_of(model, seed) for seed in range(passes)]
    with Bytes() as without:
        torch.autograd.grad(loss_of(model), list(model.parameters()))
    with Bytes() as forward:
        loss_of(model)
    with Bytes() as seen:
        for number, loss in enumerate(losses, start=1):
            with optimizer.collecting(number == passes):
                loss.backward()
        optimizer.step()
    for dtype in seen.made:
        seen.made[dtype] -= passes * (without.made[dtype] - forward.made[dtype])
    return seen


def optimizer_of(model: nn.Module, summed_in: torch.dtype) -> tuple[GradientBuckets, MasterAdamW]:
    parameters = dict(model.named_parameters())
    buckets = GradientBuckets(list(parameters.values()), summed_in)
    options = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    groups = [{"params": [p for p in parameters.values() if (p.dim() > 1) is is_matrix]} for is_matrix in (True, False)]
    return buckets, MasterAdamW(parameters, [{**group, **options} for group in groups], 1.0, buckets=buckets)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("summed_in", [FLOAT32, BFLOAT16])
def test_a_step_makes_float32_gradients_only_to_add_up(summed_in: torch.dtype, passes: int) -> None:
    model = blocks(BFLOAT16)
    made = update(*optimizer_of(model, summed_in), model, passes).made
    total = sum(p.numel() for p in model.parameters())
    is_added_up = summed_in == FLOAT32 or passes > 1
    assert made[FLOAT32] == (4 * total if is_added_up else 0)
    assert made[BFLOAT16] == (2 * total if summed_in == BFLOAT16 else 0)


def test_a_gradient_that_fills_a_bucket_stays_where_it_is() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 8 * WIDTH, bias=False, dtype=BFLOAT16))
    assert update(*optimizer_of(model, BFLOAT16), model, 1).made.total() == 0


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("summed_in", ["float32", "bfloat16"])
def test_the_plan_counts_the_sums_in_their_precision(dtype: torch.dtype, summed_in: str) -> None:
    tensors = TensorSizes(shared=0, trained=(10_000_000, 2_000_000), frozen=(), width=dtype.itemsize)
    for accumulation in (1, 2):
        spec = engine_spec(None, 2, accumulation, reduce_dtype=summed_in)
        plan = engine_memory(spec, tensors, PrefixMemory(0, 0, 0))
        width = getattr(torch, summed_in).itemsize
        assert plan.update_gradients == 12_000_000 * width
        assert plan.accumulated == (48_000_000 if accumulation == 2 else 0)
        assert plan.share * dtype.itemsize == (0 if accumulation == 2 else width)
        assert plan.buffers >= 10_000_000 * dtype.itemsize


def test_hooks_end_with_the_buckets(launched: list[int]) -> None:
    model = blocks()
    closed, forgotten = (GradientBuckets(list(model.parameters()), FLOAT32) for _ in range(2))
    closed.close()
    with closed.collecting(is_last=False):
        loss_of(model).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    del forgotten
    gc.collect()
    loss_of(model).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not launched
