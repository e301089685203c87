"""Run a model on two tokens, to learn what its structure alone does not tell."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.runtime.errors import ModelError


@contextlib.contextmanager
def evaluation_mode(*parts: nn.Module) -> Iterator[None]:
    """Turn dropout and gradients off inside; restore each module's training mode afterwards.

    Raises:
        ModelError: a forward pass changed a weight (RWKV rescales its own for evaluation, and back when it next
            trains).
    """
    modes = {module: module.training for part in parts for module in part.modules()}
    weights = [(name, weight, weight._version) for part in parts for name, weight in part.named_parameters()]
    for part in parts:
        part.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
    for name, weight, version in weights:
        if weight._version != version:
            raise ModelError(
                f"this model changes its own weights in a forward pass (first {name}), so frozen tensors would not "
                "stay as they are; expected an architecture that computes without doing so"
            )


def probe_blocks(
    model: nn.Module, watched: Iterable[nn.Module], device: torch.device | None = None
) -> list[tuple[nn.Module, Any]]:
    """Return the ``watched`` modules in the order in which a pass over two tokens runs them, with their outputs.

    An exception that ends the pass early is suppressed: the caller decides if what was recorded until then is enough.
    The input ids are on ``device``, or on that of the model's first parameter, which may be the meta device.
    """
    recorded: list[tuple[nn.Module, Any]] = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: recorded.append((module, output)))
        for module in watched
    ]
    device = device or next(model.parameters()).device
    answers: Any = _OneSample() if device.type == "meta" else contextlib.nullcontext()  # type: ignore[no-untyped-call]
    try:
        with evaluation_mode(model), contextlib.suppress(Exception), answers:
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return recorded


class _OneSample(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answer what transformers asks about masks and positions on the meta device, as those of one sample would be."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return True
        return func(*args, **(kwargs or {}))


def called_modules(model: nn.Module, run: Callable[[], object]) -> set[nn.Module]:
    """Return the modules of ``model`` that are called while ``run`` runs it."""
    called: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, args: called.add(module)) for module in model.modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return called
