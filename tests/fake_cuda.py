"""Run a step on tensors of device ``cuda`` without a GPU, and count what it would do there. Not a test itself.

torch's FakeTensorMode holds tensors without content, so a model of billions of parameters takes no memory. It works
out each operator's result and raises where devices mix. A small C++ extension (``fake_cuda_guard.cpp``) lets it do so
for ``cuda`` on torch's build for CPUs. Values are unknown: whoever reads one gets 1, or True.

It leans on parts of torch that have no public name, which is why ``unavailable`` names what another torch lacks.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from fake_gpu import one_gpu, sdpa
from filelock import FileLock
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).resolve().parent

NO_KERNEL = {
    "alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "empty_strided", "expand", "is_pinned",
    "is_same_size", "lift_fresh", "narrow", "new_empty", "new_empty_strided", "permute", "resize_", "select", "set_",
    "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
    "_has_compatible_shallow_copy_type", "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "unflatten",
    "is_contiguous", "stride", "numel", "dim", "storage_offset", "layout", "sym_size", "sym_numel", "sym_stride",
    "sym_storage_offset", "device", "is_strides_like_format", "is_non_overlapping_and_dense",
}  # fmt: skip
"""Operators that touch a tensor's description alone."""

KERNELS = {
    "logsumexp": 7, "index_put_": 2, "nonzero_static": 3, "sort": 3, "_foreach_norm": 2,
    "_scaled_dot_product_flash_attention_backward": 3, "_scaled_dot_product_efficient_attention_backward": 2,
}  # fmt: skip
"""Kernels of the operators that launch several, about, from ATen's native/cuda; of all others it is one."""

READS_THE_COUNT = {"nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "bincount"}
"""Operators whose result has a size that only the device knows."""

INDEXES = {"index", "index_put", "index_put_"}
"""Operators that take indices or masks, whose number of True elements only the device knows."""

_CHUNK, _BLOCKS = 65_536, 320
"""Elements a block and blocks a launch of torch's multi-tensor kernels (ForeachFunctors.cuh)."""


@cache
def unavailable() -> str | None:
    """Return why this torch cannot hold fake CUDA tensors, as a phrase; None if it can.

    The torch that constraints.txt pins must be able to: there the reason is raised instead.
    """
    reason = None
    if torch.version.cuda is not None:
        return f"torch {torch.__version__} is built with CUDA, whose own device guard cannot be replaced"
    try:
        _guard()
        with fake_cuda():
            torch.ones(2, device="cuda").add_(1)
    except Exception as error:
        reason = f"torch {torch.__version__} has moved its private parts ({type(error).__name__}: {error})"[:400]
        pins = (HERE.parent / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if f"torch=={torch.__version__.partition('+')[0]}" in pins:
            raise RuntimeError(f"{reason}, and it is the torch that constraints.txt pins") from error
    return reason


@cache
def _guard() -> Any:
    """Compile the extension, or find it compiled, and load it."""
    source = HERE / "fake_cuda_guard.cpp"
    folder = Path(cpp_extension.get_default_build_root()) / f"frostline-guard-{importlib.metadata.version('torch')}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "held"):
        (folder / "lock").unlink(missing_ok=True)  # torch's own, which outlives a process that was killed
        return cpp_extension.load("frostline_fake_cuda_guard", [str(source)], build_directory=str(folder))


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts kernels, waits for the device and copies, and the places where devices mix."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = ""
        """What the step is at, set by whoever runs it."""
        self.launches: Counter[tuple[str, str]] = Counter()
        """Kernels by phase and operator."""
        self.waits: Counter[str] = Counter()
        """Waits by what waits and the line of this project that asks."""
        self.copies: Counter[str] = Counter()
        self.mixed: Counter[str] = Counter()
        """Operators that were given tensors of both devices, which torch's fake tensors do not refuse."""

    def clear(self) -> None:
        """Begin to count anew."""
        for counter in (self.launches, self.waits, self.copies, self.mixed):
            counter.clear()

    def launched(self, *phases: str) -> int:
        """Return the kernels of some phases, or of all."""
        return sum(count for (phase, _), count in self.launches.items() if not phases or phase in phases)

    def wait(self, what: str) -> None:
        """Count a wait of the host for the device."""
        self.waits[f"{what} at {_caller()}"] += 1

    @property
    def values_of(self) -> Callable[[torch.Tensor], Any]:
        """Return what takes the place of ``tolist``: one wait, and ones."""

        def values(tensor: torch.Tensor) -> Any:
            if tensor.device.type == "cuda":
                self.wait("tolist")
            return _ones(tuple(tensor.shape), 1.0 if tensor.is_floating_point() else 1)

        return values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_cuda = any(tensor.device.type == "cuda" for tensor in given)
        if on_cuda:
            self._check(name, given, args)
        if name == "_local_scalar_dense" and isinstance(args[0], FakeTensor):
            return args[0].dtype == torch.bool or (1.0 if args[0].is_floating_point() else 1)
        if name == "equal" and any(isinstance(tensor, FakeTensor) for tensor in given):
            return True
        if name == "nonzero" and isinstance(args[0], FakeTensor):
            return torch.zeros(1, args[0].dim(), dtype=torch.long, device=args[0].device)
        if name in INDEXES and isinstance(args[0], FakeTensor):
            args = args[0], _without_masks(args[1]), *args[2:]
        out = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if name in ("copy_", "_to_copy") and self._copied(name, args, kwargs, out):
            return out
        if (on_cuda or any(tensor.device.type == "cuda" for tensor in results)) and name not in NO_KERNEL:
            many = name.startswith(("_foreach_copy", "_fused_adamw"))
            self.launches[self.phase, name] += multi_tensor_launches(args[0]) if many else KERNELS.get(name, 1)
            if func.namespace == "frostline":  # our kernels of the update are given the addresses of their tensors
                self.copies["cpu to cuda, page-locked"] += 1
        return out

    def _check(self, name: str, given: list[torch.Tensor], args: Any) -> None:
        """Count the waits of an operator on CUDA tensors, and devices that mix where torch's mode lets them."""
        by_mask = name in INDEXES and any(index is not None and index.dtype == torch.bool for index in args[1])
        if by_mask or name in ("_local_scalar_dense", "equal") or name in READS_THE_COUNT:
            self.wait(name)
        scalars_pass = not name.startswith(("_foreach", "_fused"))
        on_cpu = [tensor for tensor in given if tensor.device.type == "cpu" and (tensor.dim() or not scalars_pass)]
        if on_cpu and name not in ("copy_", "_to_copy"):
            self.mixed[f"{name} at {_caller()}"] += 1

    def _copied(self, name: str, args: Any, kwargs: Any, out: torch.Tensor) -> bool:
        """Count a copy between host and device; return False if it is none."""
        source, target = (args[1], args[0]) if name == "copy_" else (args[0], out)
        places = source.device.type, target.device.type
        if "cuda" not in places or places[0] == places[1] or "meta" in places:
            return False
        ahead = bool(kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        pinned = getattr(source, "fake_pinned", False)
        kind = f"{places[0]} to {places[1]}, {'page-locked' if pinned else 'pageable'}"
        self.copies[kind] += 1
        if places[1] == "cpu" or not (ahead and pinned):
            self.wait(f"copy, {kind}")
        return True


def _pin_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Take the place of ``pin_memory``, which asks the driver: the copy says that it is page-locked."""
    pinned: Any = tensor.clone()
    pinned.fake_pinned = True
    return cast(torch.Tensor, pinned)


def _apply(module: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """Take the place of ``nn.Module._apply``, which swaps fake tensors, and cannot where something refers to them."""
    applied: dict[torch.Tensor, torch.Tensor] = {}
    for owner in module.modules() if recurse else (module,):
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                if parameter not in applied:
                    with torch.no_grad():
                        moved = fn(parameter)
                    same = moved is parameter
                    applied[parameter] = parameter if same else torch.nn.Parameter(moved, parameter.requires_grad)
                owner._parameters[name] = cast(torch.nn.Parameter, applied[parameter])
        for name, buffer in owner._buffers.items():
            owner._buffers[name] = None if buffer is None else fn(buffer)
    return module


def _address(tensor: FakeTensor) -> int:
    """Return a number in place of a tensor's address, for code that asks whether two tensors are one."""
    return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()


def _ones(shape: tuple[int, ...], one: float) -> Any:
    """Return nested lists of ones."""
    return [_ones(shape[1:], one) for _ in range(shape[0])] if shape else one


def _without_masks(indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Return indices with every mask replaced by the index of one element."""
    replaced: list[torch.Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool
        replaced += [index.new_zeros(1, dtype=torch.long) for _ in range(index.dim())] if is_mask else [index]
    return replaced


def multi_tensor_launches(tensors: list[torch.Tensor]) -> int:
    """Return the launches of a multi-tensor kernel."""
    blocks = sum(-(-tensor.numel() // _CHUNK) for tensor in tensors)
    return max(1, -(-blocks // _BLOCKS))


def _caller() -> str:
    """Return the innermost line of this project, or of a library of models, that is being run."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent != HERE and any(part in path.parts for part in ("toolkit", "transformers", "bitsandbytes")):
            return f"{path.name}:{frame.f_lineno}"
        frame = cast(Any, frame.f_back)
    return "a test"


class _Mode(FakeTensorMode):  # type: ignore[no-untyped-call]
    avoid_device_init = True


@contextlib.contextmanager
def fake_cuda() -> Iterator[Count]:
    """Make every tensor a fake one, with one GPU; yield what counts."""
    guard = _guard()
    count = Count()
    with one_gpu(count.wait), contextlib.ExitStack() as stack:
        guard.install()
        stack.callback(guard.uninstall)
        if hasattr(fake_tensor, "init_gpu_context"):
            stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context"))
        # transformers makes every mask while it is traced, for which it takes fake tensors; here it is to look
        stack.enter_context(mock.patch("transformers.masking_utils.is_tracing", return_value=False))
        stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", sdpa))
        stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", _address, create=True))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream"))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", _pin_memory))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", count.values_of))
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _apply))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(_Mode(allow_non_fake_inputs=True))
        stack.enter_context(count)
        only_lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, only_lift)
        yield count
