"""The Triton kernels of the update, as they are launched, compile for an H100: without one, and once for a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

LAUNCHED = """
import json, torch, triton
from torch import nn
from triton.backends.compiler import GPUTarget
from toolkit.optim import fused_adamw as fused
from toolkit.optim.master_adamw import MasterAdamW

class H100:  # what Triton asks a driver before it compiles
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

class Compiled:  # compiles a kernel for its arguments, and launches nothing
    def __init__(self, kernel):
        self.kernel, self.by_step = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.by_step[-1].append(
            self.kernel.run(*args, grid=grid, warmup=True, **options)
        )

triton.runtime.driver.set_active(H100())
names = ("_squares_kernel", "_accumulate_kernel", "_adamw_kernel")
kernels = [Compiled(getattr(fused, name)) for name in names]
for name, kernel in zip(names, kernels):
    setattr(fused, name, kernel)
low, own, odd = (nn.Parameter(torch.zeros(n, dtype=d)) for n, d in ((4096, torch.bfloat16), (96, None), (5, None)))
weights = {"low": low, "own": own, "odd": odd}
settings = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
groups = [{"params": [low, own], **settings}, {"params": [odd], **settings}]
optimizer = MasterAdamW(weights, groups, 1.0, accumulates=True, kernels=fused.TritonKernels)
for step in range(3):
    for kernel in kernels:
        kernel.by_step.append([])
    for group in optimizer.param_groups:
        group["lr"] = 1e-5 * step
    for micro_batch in range(2):
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight)
        optimizer.collect()
    optimizer.step()
wide = lambda one: [one.asm["ptx"].count(f"{kind}.global.v4.b32") for kind in ("ld", "st")]
print(json.dumps({
    name: [[wide(one) for one in kernel.by_step[0]], len({id(one) for step in kernel.by_step for one in step})]
    for name, kernel in zip(names, kernels)
}))
"""


def test_launched_kernels_compile_once_and_move_16_bytes_at_once_where_all_is_aligned() -> None:
    """Of 8 elements a thread, float32 takes two accesses and bfloat16 one; of 16 for the norm, twice as many."""
    pytest.importorskip("triton", minversion="3.6", reason="earlier ones ask a driver for more")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    given = [sys.executable, "-c", LAUNCHED]
    done = subprocess.run(given, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {
        "_squares_kernel": [[[4, 0], [4, 0], [0, 0]], 3],  # float32 sums, a float32 tensor, and one of 5 elements
        "_accumulate_kernel": [[[1, 2], [3, 2]], 2],  # the first of a step and the next; autograd adds up float32
        "_adamw_kernel": [[[8, 7], [8, 6], [0, 0]], 3],
    }
