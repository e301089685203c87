"""AdamW on float32 masters, in pieces: the right numbers, few kernels, few bytes, no wait for the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from toolkit.optim.master_adamw import MasterAdamW, total_norm
from toolkit.planning.engine_memory import engine_memory
from toolkit.planning.engine_spec import engine_spec
from toolkit.planning.prefix_memory import PrefixMemory
from toolkit.planning.tensor_sizes import TensorSizes

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
SHAPES = [(33, 7), (5,), (64, 64), (1,), (129,)]


def made(shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], device: str = "cpu") -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device=device) * 0.02 for shape in shapes]
    return {f"t{i}": nn.Parameter(t.to(dtypes[i % len(dtypes)])) for i, t in enumerate(tensors)}


def settings(parameters: dict[str, nn.Parameter], lr: float = 1e-3, decay: float = 0.1) -> list[dict[str, Any]]:
    """Two groups, the second without weight decay."""
    own = list(parameters.values())
    shared = {"lr": lr, "betas": (0.9, 0.99), "eps": 1e-8}
    parts = [(own[:-1], decay), (own[-1:], 0.0)] if len(own) > 1 else [(own, decay)]
    return [{"params": part, "weight_decay": own_decay, **shared} for part, own_decay in parts]


def give(parameters: dict[str, nn.Parameter], seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Random gradients, as backward leaves them."""
    torch.manual_seed(seed)
    gradients = {name: (torch.randn(p.shape) * scale).to(p.dtype) for name, p in parameters.items()}
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].clone()
    return gradients


class Ops(TorchDispatchMode):
    """Counts what is dispatched, and the bytes of storages that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        made = {t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        self.bytes += sum(storage.nbytes() for storage in made if storage._cdata not in known)
        self.count[str(func)] += 1
        return out


def by_hand(
    parameters: dict[str, nn.Parameter], steps: list[dict[str, torch.Tensor]], dtype: torch.dtype, max_norm: float
) -> list[torch.Tensor]:
    """Masters after ``steps`` of torch's own AdamW and clipping, in ``dtype``."""
    masters = {name: nn.Parameter(p.detach().to(dtype, copy=True)) for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(settings(masters), fused=True)
    for gradients in steps:
        for name, master in masters.items():
            master.grad = gradients[name].to(dtype, copy=True)
        if max_norm:
            clip_grads_with_norm_(masters.values(), max_norm, get_total_norm([m.grad for m in masters.values()]))
        optimizer.step()
    return list(masters.values())


def masters_of(optimizer: MasterAdamW) -> list[torch.Tensor]:
    """Each tensor's master, in its shape."""
    states = zip(
        optimizer.by_name.values(), (p for group in optimizer.param_groups for p in group["params"]), strict=True
    )
    return [state.read()["master"].view(parameter.shape) for state, parameter in states]


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("dtypes", [[BFLOAT16], [FLOAT32], [BFLOAT16, FLOAT32]], ids=["low", "float32", "mixed"])
@pytest.mark.parametrize("piece", [60, None])
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e9])
@pytest.mark.parametrize("accumulates", [False, True])
def test_masters_are_as_exact_as_torchs_own(
    dtypes: list[torch.dtype], piece: int | None, max_norm: float, accumulates: bool
) -> None:
    parameters = made(SHAPES, dtypes)
    start = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    optimizer = MasterAdamW(parameters, settings(parameters), max_norm, accumulates, piece=piece)
    steps = []
    for seed in range(5):
        steps.append(give(parameters, seed))
        optimizer.collect()
        optimizer.step()
    masters = masters_of(optimizer)
    exact, torchs = (by_hand(start, steps, dtype, max_norm) for dtype in (torch.float64, FLOAT32))
    assert error(masters, exact) <= 1.5 * error(torchs, exact)
    for parameter, master in zip(parameters.values(), masters, strict=True):
        assert torch.equal(parameter, master.to(parameter.dtype))


def test_masters_keep_the_updates_that_bfloat16_rounds_away() -> None:
    """At 1e-5 a step on a weight of 1 is far below bfloat16's spacing of 1/128 there."""
    naive, kept = (nn.Parameter(torch.ones(64, dtype=BFLOAT16)) for _ in range(2))
    options = {"lr": 1e-5, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}
    optimizers = [
        torch.optim.AdamW([{"params": [naive], **options}], fused=True),
        MasterAdamW({"w": kept}, [{"params": [kept], **options}], 0),
    ]
    for _ in range(1000):
        naive.grad, kept.grad = torch.ones_like(naive), torch.ones_like(kept)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(naive, torch.ones_like(naive))
    assert torch.allclose(masters_of(optimizers[1])[0], torch.tensor(0.99), atol=1e-4)
    assert torch.equal(kept, masters_of(optimizers[1])[0].bfloat16())


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_gradients_add_up_in_float32_and_are_freed(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=dtype))
    optimizer = MasterAdamW({"w": parameter}, settings({"w": parameter}), 1.0, accumulates=True)
    for value in (256.0, 1.0, 1.0):
        gradient = torch.tensor([value], dtype=dtype)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient  # as autograd does
        optimizer.collect()
        assert (parameter.grad is None) == (dtype == BFLOAT16), "autograd adds up float32 in place"
    optimizer.step()
    assert optimizer.grad_norm == 258, "bfloat16 would give 256"
    assert parameter.grad is None


def test_float32_parameters_are_their_own_masters() -> None:
    parameters = made([(2, 2)], [FLOAT32])
    (master,) = masters_of(MasterAdamW(parameters, settings(parameters), 1.0))
    assert master.data_ptr() == parameters["t0"].data_ptr()


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_tensor_no_gradient_reached_counts_as_zero(accumulates: bool) -> None:
    parameters = made([(3,), (2, 2)], [BFLOAT16])
    optimizer = MasterAdamW(parameters, settings(parameters, lr=0.5, decay=0.5), 1.0, accumulates)
    before = masters_of(optimizer)[0].clone()
    parameters["t1"].grad = torch.full((2, 2), 3.0, dtype=BFLOAT16)
    optimizer.collect()
    optimizer.step()
    assert optimizer.grad_norm == 6
    assert torch.allclose(masters_of(optimizer)[0], before * 0.75), "weight decay alone"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("accumulates", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float, accumulates: bool) -> None:
    parameters = made(SHAPES, [BFLOAT16, FLOAT32])
    optimizer = MasterAdamW(parameters, settings(parameters), 1.0, accumulates, piece=50)

    def everything() -> list[torch.Tensor]:
        kept = [
            t for state in optimizer.by_name.values() for t in (*state.read().values(), torch.tensor(state.updates))
        ]
        return [t.detach().clone() for t in (*parameters.values(), *kept)]

    for gradient in (0.0, bad, 0.0):
        give(parameters, 0)
        parameters["t2"].grad[3, 3] = gradient
        before = everything()
        optimizer.collect()
        optimizer.step()
        same = all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
        assert same == (gradient is bad)
        assert bool(optimizer.grad_norm.isfinite()) != same
        assert all(p.grad is None for p in parameters.values())
    assert optimizer.by_name["t0"].updates == 2


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
@pytest.mark.parametrize("accumulates", [False, True])
def test_kernels_follow_the_bytes_and_not_the_number_of_tensors(dtype: torch.dtype, accumulates: bool) -> None:
    counts = []
    for shapes, piece in (([(64, 64)] * 3, 4096), ([(8, 8)] * 192, 4096), ([(8, 8)] * 192, 1024)):
        parameters = made(shapes, [dtype])
        group = [settings(parameters)[0] | {"params": list(parameters.values())}]
        optimizer = MasterAdamW(parameters, group, 1.0, accumulates, piece=piece)
        give(parameters, 0)
        with Ops() as ops:
            optimizer.collect()
            optimizer.step()
        counts.append(sum(ops.count.values()))
        assert ops.count["aten._fused_adamw_.default"] == 3 * 4096 // piece
    assert counts[0] == counts[1], "192 tensors in as many calls as 3"
    assert counts[1] < counts[2] <= 4 * counts[1], "four times the pieces"


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_a_step_makes_no_copy_of_anything(dtype: torch.dtype) -> None:
    parameters = made([(256, 64), (64,)], [dtype])
    optimizer = MasterAdamW(parameters, settings(parameters), 1.0, piece=1024)
    give(parameters, 0)
    with Ops() as ops:
        optimizer.collect()
        optimizer.step()
    assert ops.bytes < 256, "scalars"


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_the_plan_says_what_is_held_and_what_a_step_adds(dtype: torch.dtype, accumulates: bool) -> None:
    parameters = made([(256, 64), (64,)], [dtype])
    sizes = tuple(p.numel() for p in parameters.values())
    tensors = TensorSizes(shared=0, trained=sizes, frozen=(), width=dtype.itemsize)
    spec = engine_spec(None, ranks=1, accumulation=1 + accumulates, host_is_device=True)
    plan = engine_memory(spec, tensors, PrefixMemory(0, 0, 0))
    with Ops() as made_once:
        optimizer = MasterAdamW(parameters, settings(parameters), 1.0, accumulates)
    assert made_once.bytes == pytest.approx(plan.masters + plan.moments + plan.scratch, abs=256)
    left = sum(gradient.nbytes for gradient in give(parameters, 0).values())
    with Ops() as made_in_step:
        optimizer.collect()
        optimizer.step()
    assert left + made_in_step.bytes == pytest.approx(plan.update_gradients, abs=256)


def test_the_norm_does_not_stall_over_many_numbers() -> None:
    parameters = {"w": nn.Parameter(torch.zeros(2**24, dtype=BFLOAT16))}
    gradient = torch.rand(2**24).to(BFLOAT16)
    exact = float(gradient.double().norm())
    optimizer = MasterAdamW(parameters, settings(parameters), 1.0)
    parameters["w"].grad = gradient
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(exact, rel=1e-5)


def test_the_gpus_norm_is_the_same_number() -> None:
    gradients = [torch.randn(100, 100).to(BFLOAT16), torch.randn(7)]
    exact = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
    assert float(total_norm(gradients)) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("dtypes", [[BFLOAT16], [FLOAT32], [BFLOAT16, FLOAT32]], ids=["low", "float32", "mixed"])
def test_a_step_never_asks_the_device_for_a_number(dtypes: list[torch.dtype], accumulates: bool) -> None:
    """On the meta device, which takes the way of the GPU and has no numbers to give."""
    parameters = made(SHAPES, dtypes, "meta")
    optimizer = MasterAdamW(parameters, settings(parameters), 1.0, accumulates, piece=100)
    for parameter in parameters.values():
        parameter.grad = torch.empty_like(parameter)
    optimizer.collect()
    optimizer.step()
    with pytest.raises(RuntimeError, match="meta"):
        float(optimizer.grad_norm)


def test_each_tensors_state_is_at_hand_by_name() -> None:
    parameters = made(SHAPES, [BFLOAT16, FLOAT32])
    optimizer = MasterAdamW(parameters, settings(parameters), 1.0, piece=64)
    give(parameters, 0)
    optimizer.step()
    assert list(optimizer.by_name) == list(parameters)
    assert all(state.updates == 1 for state in optimizer.by_name.values())
    for name, state in optimizer.by_name.items():
        assert {values.shape for values in state.read().values()} == {(parameters[name].numel(),)}
        ones = torch.ones(parameters[name].numel())
        state.write({"master": ones / 2, "exp_avg": ones, "exp_avg_sq": ones}, 1000)
    optimizer.write_back()
    assert all((p == 0.5).all() for p in parameters.values())
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert optimizer.by_name["t4"].updates == 1001
    assert torch.allclose(masters_of(optimizer)[4], torch.tensor(0.5 - 1e-3 * 0.9 / 0.99**0.5), atol=1e-6)


def test_the_resulting_groups_are_those_asked_for() -> None:
    parameters = made(SHAPES, [BFLOAT16, FLOAT32])
    optimizer = MasterAdamW(parameters, settings(parameters), 1.0)
    names = {parameter: name for name, parameter in parameters.items()}
    held = [({names[p] for p in group["params"]}, group["weight_decay"]) for group in optimizer.param_groups]
    assert held == [({"t0", "t1", "t2", "t3"}, 0.1), ({"t4"}, 0.0)]
