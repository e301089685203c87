"""The Triton kernels of the update, under Triton's interpreter: right numbers, few launches, no copy of anything."""

from __future__ import annotations

import importlib
import math
import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from test_master_adamw import BFLOAT16, FLOAT32, Ops, by_hand, error, give, made, masters_of, settings
from torch import nn

from toolkit.optim import update_kernels
from toolkit.optim.master_adamw import MasterAdamW
from toolkit.optim.update_kernels import table_bytes
from toolkit.planning.engine_memory import engine_memory
from toolkit.planning.engine_spec import engine_spec
from toolkit.planning.prefix_memory import PrefixMemory
from toolkit.planning.tensor_sizes import TensorSizes

FLOAT16, BLOCK = torch.float16, 64
SHAPES = [(1,), (257,), (BLOCK,), (20, 50), (2 * BLOCK + 3,), (16,), (3, BLOCK)]
"""One element; whole and broken blocks; alone in the second group, a tensor whose reads are aligned."""


@pytest.fixture(scope="module")
def fused() -> Iterator[ModuleType]:
    """The module with its kernels interpreted, whatever imported Triton or it before, in blocks of 64."""
    pytest.importorskip("triton")
    name = "toolkit.optim.fused_adamw"
    before = sys.modules.pop(name, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(update_kernels, "BLOCK", BLOCK)
        yield importlib.import_module(name)
    del sys.modules[name]
    if before is not None:
        sys.modules[name] = before
        importlib.reload(before)  # registers the compiled kernels' operators again


@pytest.fixture
def launches(fused: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the kernels that are launched, by name."""
    counts: Counter[str] = Counter()
    for name in ("_squares_kernel", "_accumulate_kernel", "_adamw_kernel"):
        kernel = getattr(fused, name)

        class Counted:
            def __getitem__(self, grid: Any, kernel: Any = kernel, name: str = name) -> Any:
                counts[name] += 1
                return kernel[grid]

        monkeypatch.setattr(fused, name, Counted())
    return counts


def written(master: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the interpreter writes of a master: it cuts bfloat16 off, where compiled kernels round to the nearest."""
    return (master.view(torch.int32) & -65536).view(FLOAT32).to(dtype) if dtype == BFLOAT16 else master.to(dtype)


@pytest.mark.parametrize("dtypes", [[BFLOAT16], [FLOAT16], [FLOAT32], [BFLOAT16, FLOAT32]], ids=str)
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("accumulates", [False, True])
def test_masters_are_as_exact_as_torchs_own(
    fused: ModuleType, dtypes: list[torch.dtype], max_norm: float, accumulates: bool
) -> None:
    parameters = made(SHAPES, dtypes)
    start = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    optimizer = MasterAdamW(parameters, settings(parameters), max_norm, accumulates, kernels=fused.TritonKernels)
    steps = []
    for seed in range(3):
        steps.append(give(parameters, seed))
        optimizer.collect()
        optimizer.step()
        exact_norm = math.sqrt(sum(float(g.double().square().sum()) for g in steps[-1].values()))
        assert float(optimizer.grad_norm) == pytest.approx(exact_norm, rel=1e-5), "the interpreter adds up one by one"
    masters = masters_of(optimizer)
    exact, torchs = (by_hand(start, steps, dtype, max_norm) for dtype in (torch.float64, FLOAT32))
    assert error(masters, exact) <= 1.5 * error(torchs, exact)
    for parameter, master in zip(parameters.values(), masters, strict=True):
        assert torch.equal(parameter, written(master, parameter.dtype))


def test_moments_stay_exact_over_many_steps_and_bias_is_corrected(fused: ModuleType) -> None:
    """1 - 0.999**step near 0 and near 1; moments beside float64's, whose betas are not rounded to float32."""
    parameters = made([(40,)], [FLOAT32])
    group = {**settings(parameters)[0], "betas": (0.9, 0.999)}
    optimizer = MasterAdamW(parameters, [group], 0.0, kernels=fused.TritonKernels)
    (state,) = optimizer.by_name.values()
    first, second = (torch.zeros(40, dtype=torch.float64) for _ in range(2))
    for step in (*range(1, 4), 500, 1000, 100_000):
        state.write({}, step - 1)
        before = masters_of(optimizer)[0].double()
        gradient = give(parameters, step)["t0"].double()
        optimizer.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        taken = before - masters_of(optimizer)[0].double()
        torch.testing.assert_close(taken / 1e-3, update + 0.1 * before, rtol=2e-5, atol=1e-5)
        for kind, exact in (("exp_avg", first), ("exp_avg_sq", second)):
            assert (state.read()[kind].double() - exact).norm() < 2e-7 * exact.norm()


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.3, 0.99), (0.9, 0.9999999)])
def test_any_betas_that_a_recipe_allows_are_computed(fused: ModuleType, betas: tuple[float, float]) -> None:
    parameters = made([(300,)], [FLOAT32])
    start = parameters["t0"].detach().double()
    optimizer = MasterAdamW(parameters, [{**settings(parameters)[0], "betas": betas}], 0.0, kernels=fused.TritonKernels)
    exact = nn.Parameter(start.clone())
    torchs = torch.optim.AdamW([exact], lr=1e-3, weight_decay=0.1, betas=betas, eps=1e-8)
    for seed in range(3):
        exact.grad = give(parameters, seed)["t0"].double()
        torchs.step()
        optimizer.step()
    assert error(masters_of(optimizer), [exact]) < 1e-8


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_tensor_no_gradient_reached_counts_as_zero(fused: ModuleType, accumulates: bool) -> None:
    parameters = made([(3,), (2, 2)], [BFLOAT16])
    groups = settings(parameters, lr=0.5, decay=0.5)
    optimizer = MasterAdamW(parameters, groups, 1.0, accumulates, kernels=fused.TritonKernels)
    before = masters_of(optimizer)[0].clone()
    parameters["t1"].grad = torch.full((2, 2), 3.0, dtype=BFLOAT16)
    optimizer.collect()
    optimizer.step()
    assert optimizer.grad_norm == 6
    assert torch.allclose(masters_of(optimizer)[0], before * 0.75), "weight decay alone"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("accumulates", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing(fused: ModuleType, bad: float, accumulates: bool) -> None:
    parameters = made(SHAPES, [BFLOAT16, FLOAT32])
    optimizer = MasterAdamW(parameters, settings(parameters), 1.0, accumulates, kernels=fused.TritonKernels)

    def everything() -> list[torch.Tensor]:
        kept = [
            t for state in optimizer.by_name.values() for t in (*state.read().values(), torch.tensor(state.updates))
        ]
        return [t.detach().clone() for t in (*parameters.values(), *kept)]

    for gradient in (bad, 0.0, bad, 0.0):
        give(parameters, 0)
        parameters["t3"].grad[3, 3] = gradient
        before = everything()
        optimizer.collect()
        optimizer.step()
        same = all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
        assert same == (gradient is bad)
        assert all(p.grad is None for p in parameters.values())
    assert optimizer.by_name["t0"].updates == 2


def test_gradients_add_up_in_float32_and_are_freed(fused: ModuleType) -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=BFLOAT16))
    groups = settings({"w": parameter})
    optimizer = MasterAdamW({"w": parameter}, groups, 1.0, accumulates=True, kernels=fused.TritonKernels)
    for value in (256.0, 1.0, 1.0):
        parameter.grad = torch.tensor([value], dtype=BFLOAT16)
        optimizer.collect()
        assert parameter.grad is None
    optimizer.step()
    assert optimizer.grad_norm == 258, "bfloat16 would give 256"


@pytest.mark.parametrize("accumulates", [False, True])
def test_8_bit_moments_keep_their_own_update_and_the_rest_takes_the_kernels(
    fused: ModuleType, launches: Counter[str], accumulates: bool
) -> None:
    ways = []
    for kernels in (None, fused.TritonKernels):
        parameters = made([(70, 70), (40,), (64, 65)], [BFLOAT16, FLOAT32])
        groups = [settings(parameters)[0] | {"params": list(parameters.values())}]
        optimizer = MasterAdamW(parameters, groups, 0.0, accumulates, name="adamw_8bit", kernels=kernels)
        for seed in range(3):
            give(parameters, seed)
            optimizer.collect()
            optimizer.step()
        ways.append(masters_of(optimizer))
    (eight, vector, other), expected = ways[1], ways[0]
    assert torch.equal(eight, expected[0])
    assert torch.equal(other, expected[2])
    torch.testing.assert_close(vector, expected[1], rtol=1e-6, atol=1e-9)
    assert launches["_squares_kernel"] == 9, "of three states in three steps"
    assert launches["_adamw_kernel"] == 3


def test_a_gradient_of_another_layout_is_read_in_its_order(fused: ModuleType) -> None:
    ways = []
    for layout in (torch.Tensor.contiguous, lambda gradient: gradient.t().contiguous().t()):
        parameters = made([(8, 4), (3,)], [BFLOAT16])
        optimizer = MasterAdamW(parameters, settings(parameters), 1.0, kernels=fused.TritonKernels)
        give(parameters, 0)
        parameters["t0"].grad = layout(parameters["t0"].grad)
        optimizer.step()
        ways.append(masters_of(optimizer)[0])
    assert torch.equal(*ways)


@pytest.mark.parametrize("accumulates", [False, True])
def test_launches_do_not_follow_the_number_of_tensors(
    launches: Counter[str], fused: ModuleType, accumulates: bool
) -> None:
    counts = []
    for shapes in ([(8, 64)] * 2, [(2, 8)] * 150):
        launches.clear()
        parameters = made(shapes, [BFLOAT16])
        group = [settings(parameters)[0] | {"params": list(parameters.values())}]
        optimizer = MasterAdamW(parameters, group, 1.0, accumulates, kernels=fused.TritonKernels)
        give(parameters, 0)
        with Ops() as ops:
            optimizer.collect()
            optimizer.step()
        counts.append((dict(launches), sum(ops.count.values())))
    assert counts[0][0] == {"_squares_kernel": 1, "_adamw_kernel": 1} | (
        {"_accumulate_kernel": 1} if accumulates else {}
    )
    assert counts[0] == counts[1]
    assert counts[0][1] < 30, "the rest computes scalars"


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_the_plan_says_what_is_held_and_a_step_copies_nothing(fused: ModuleType, dtype: torch.dtype) -> None:
    parameters = made([(256, 64), (64,)], [dtype])
    sizes = tuple(p.numel() for p in parameters.values())
    tensors = TensorSizes(shared=0, trained=sizes, frozen=(), width=dtype.itemsize)
    plan = engine_memory(engine_spec(None, ranks=1, accumulation=1), tensors, PrefixMemory(0, 0, 0))
    group = [settings(parameters)[0] | {"params": list(parameters.values())}]
    optimizer = MasterAdamW(parameters, group, 1.0, kernels=fused.TritonKernels)
    (state,) = optimizer._states
    own = [t for t in vars(state).values() if isinstance(t, torch.Tensor) and t.ndim]
    assert sum(t.nbytes for t in own) == plan.masters + plan.moments
    owners, layout, _ = state.kernels._table
    assert plan.scratch == table_bytes(sizes) == owners.nbytes + layout.nbytes + optimizer._squares.nbytes
    assert state.slices == [], "no workspace"
    give(parameters, 0)
    with Ops() as ops:
        optimizer.step()
    assert ops.bytes < 256, "scalars and addresses"


def test_a_step_never_asks_the_device_for_a_number(fused: ModuleType) -> None:
    """On the meta device, which has no numbers to give; the kernels' operators pass there, as on fake tensors."""
    parameters = made(SHAPES, [BFLOAT16, FLOAT32], "meta")
    optimizer = MasterAdamW(parameters, settings(parameters), 1.0, True, kernels=fused.TritonKernels)
    for parameter in parameters.values():
        parameter.grad = torch.empty_like(parameter)
    optimizer.collect()
    with Ops() as ops:
        optimizer.step()
    assert ops.count["frostline.adamw.default"] == 3, "one group in two precisions, one of one tensor"
    with pytest.raises(RuntimeError, match="meta"):
        float(optimizer.grad_norm)
