"""The optimizer's step alone: clip, upcast, AdamW, write-back, on the tensors that SmolLM2-135M trains by default.

    python benchmarks/update.py [--rounds 15] [--device cuda]

Random bfloat16 tensors in the shapes of the top 4 blocks and the head, fresh gradients for each step, all ways in
alternating rounds. DeepSpeedCPUAdam is left out where it does not compile.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import clip_grads_with_norm_, get_total_norm  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from toolkit.optim.master_adamw import MasterAdamW  # noqa: E402

LR, DECAY = 1e-5, 0.01
BLOCK = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536), (576,), (576,)]
SHAPES = [*BLOCK * 4, (49152, 576)]

Step = Callable[[], object]


class StorageBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of storages that are allocated while it is entered: those still alive, and the peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: set[int] = set()
        self.now = self.most = self.held = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in before | self.known:
                storage = tensor.untyped_storage()
                self.known.add(key)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._release, key, storage.nbytes())
        return out

    def _release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def by_hand(parameters: list[nn.Parameter], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Step:
    """Return a step of a plain loop: float32 masters, their gradients and one of torch's or DeepSpeed's optimizers."""
    masters = [nn.Parameter(p.detach().float()) for p in parameters]
    optimizer = make(masters)

    @torch.no_grad()
    def step() -> None:
        for parameter, master in zip(parameters, masters, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        clip_grads_with_norm_(masters, 1.0, get_total_norm([m.grad for m in masters if m.grad is not None]))
        optimizer.step()
        torch._foreach_copy_(list[torch.Tensor](parameters), list[torch.Tensor](masters))
        optimizer.zero_grad()

    return step


Make = Callable[[list[nn.Parameter]], Step]


def step_builders(device: torch.device) -> dict[str, Make]:
    """Return functions that build a step on bfloat16 parameters, by name."""
    options: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "betas": (0.9, 0.999), "eps": 1e-8}

    def ours(own: list[nn.Parameter]) -> Step:
        return MasterAdamW({str(i): p for i, p in enumerate(own)}, [{"params": own, **options}], 1.0).step

    found: dict[str, Make] = {
        "frostline": ours,
        "torch, fused": lambda own: by_hand(own, lambda m: torch.optim.AdamW(m, fused=True, **options)),
        "torch, foreach": lambda own: by_hand(own, lambda m: torch.optim.AdamW(m, foreach=True, **options)),
    }
    if device.type == "cpu" and (cpu_adam := deepspeed_cpu_adam()):
        found["DeepSpeedCPUAdam"] = lambda own: by_hand(own, lambda m: cpu_adam(m, **options))
    return found


def deepspeed_cpu_adam() -> Callable[..., torch.optim.Optimizer] | None:
    """Return DeepSpeed's optimizer for CPUs, if it is installed and compiles here."""
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        DeepSpeedCPUAdam([nn.Parameter(torch.zeros(1))])
    except Exception as error:
        print(f"DeepSpeedCPUAdam left out: {' '.join(str(error).split())[:200]}")
        return None
    made: Callable[..., torch.optim.Optimizer] = DeepSpeedCPUAdam
    return made


def seconds(step: Step, device: torch.device) -> float:
    """Return the wall-clock seconds of one step, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main() -> int:
    """Time all ways in alternating rounds and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each way; default: 15")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    makers = step_builders(device)
    gradients = [torch.randn(shape, device=device).mul_(1e-4).bfloat16() for shape in SHAPES]
    steps: dict[str, tuple[list[nn.Parameter], Step]] = {}
    memory: dict[str, StorageBytes] = {}
    times: dict[str, list[float]] = {name: [] for name in makers}
    for name, make in makers.items():  # the first step makes what is missing; its time does not count
        with StorageBytes() as memory[name]:
            own = [nn.Parameter(torch.randn(shape, device=device).mul_(0.02).bfloat16()) for shape in SHAPES]
            steps[name] = own, make(own)
            memory[name].most = 0
            set_gradients(own, gradients)
            steps[name][1]()
            memory[name].held = memory[name].now
    for _ in range(arguments.rounds):
        for name, (own, step) in steps.items():
            set_gradients(own, gradients)
            times[name].append(seconds(step, device))
    total = sum(gradient.numel() for gradient in gradients)
    print(f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads, {total / 1e6:.1f} M elements")
    print(f"{'bytes an element':>53}\n{'step':<18}{'median ms':>10}{'best ms':>9}{'ratio':>7}{'held':>7}{'at most':>9}")
    ours = statistics.median(times["frostline"])
    for name, taken in times.items():
        held, most = (size / total for size in (memory[name].held, memory[name].most))
        median = statistics.median(taken)
        print(f"{name:<18}{median * 1e3:>10.1f}{min(taken) * 1e3:>9.1f}{median / ours:>7.2f}{held:>7.1f}{most:>9.1f}")
    return 0


def set_gradients(parameters: list[nn.Parameter], gradients: list[torch.Tensor]) -> None:
    """Set fresh copies of ``gradients``, as backward does."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()


if __name__ == "__main__":
    sys.exit(main())
