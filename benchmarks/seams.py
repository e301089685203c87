"""Time the phases of a training step between its engine's methods, its last block and its backward pass."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.floors import synchronise
from toolkit.training.trainer import Trainer

PHASES = (
    "data", "prefix or cache read", "suffix forward", "head and loss forward", "head and loss backward",
    "suffix backward", "gradients to masters", "gradient norm, clip, update, write-back", "sync and checks",
)  # fmt: skip
"""The phases of a step in their order. Each ends where its mark is made."""

_UPDATE = "benchmark: update"
_KINDS = {
    "AdamW": ("adam",),
    "copies: upcast, flatten, write-back": ("copy", "cat", "flatten"),
    "gradient norm and clip": ("norm", "dot", "isinf", "isnan", "any", "mul", "div", "clamp", "stack"),
}


class Seams:
    """Marks the phases of ``train_step`` while entered.

    Only public seams are used: ``engine.forward_loss``, ``backward`` and ``update``, a hook on the last block, and
    hooks of autograd. On a GPU each mark waits for the device, so the phases do not overlap there as they do in a run.
    """

    def __init__(self, trainer: Trainer, counter: FlopCounterMode | None = None) -> None:
        """
        Args:
            trainer: a run that is set up.
            counter: if given, is read at the start of the suffix and at the end of its backward pass.
        """  # noqa: D205, D212
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.suffix_flops = 0
        self._engine, self._device, self._counter = trainer.state.engine, trainer.context.world.device, counter
        self._blocks = trainer.state.suffix.blocks(0)
        self._undo: list[Callable[[], None]] = []
        self._last = time.perf_counter()

    def __enter__(self) -> Seams:
        self._replace("forward_loss", self._forward)
        self._replace("backward", self._backward)
        self._replace("update", self._update)
        if self._blocks:
            self._undo.append(self._blocks[-1].register_forward_hook(self._after_blocks).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for undo in reversed(self._undo):
            undo()

    def begin(self) -> None:
        """Begin a step."""
        for times in self.seconds.values():
            times.append(0.0)
        self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """Add the time since the last mark to ``phase`` of the current step."""
        synchronise(self._device)
        now = time.perf_counter()
        if self.seconds[phase]:
            self.seconds[phase][-1] += now - self._last
        self._last = now

    def _replace(self, name: str, around: Callable[..., Any]) -> None:
        """Put ``around(original, …)`` in the place of a method of the engine."""
        original = getattr(self._engine, name)
        setattr(self._engine, name, functools.partial(around, original))
        self._undo.append(lambda: delattr(self._engine, name))

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.mark("prefix or cache read")
        if self._counter:
            self.suffix_flops -= self._counter.get_total_flops()
        return original(*args, **kwargs)

    def _after_blocks(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        if torch.is_grad_enabled() and hidden.requires_grad:
            self.mark("suffix forward")
            hidden.register_hook(self._gradient_arrived)

    def _gradient_arrived(self, gradient: torch.Tensor) -> None:
        self.mark("head and loss backward")
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: self.mark("suffix backward"))  # at the end of this backward pass

    def _backward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.mark("head and loss forward")
        result = original(*args, **kwargs)
        self.mark("gradients to masters")
        if self._counter:
            self.suffix_flops += self._counter.get_total_flops()
        return result

    def _update(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.mark("gradients to masters")
        with record_function(_UPDATE):
            result = original(*args, **kwargs)
        self.mark("gradient norm, clip, update, write-back")
        return result


def update_kinds(events: Iterable[Any], attribute: str) -> dict[str, float]:
    """Return the seconds of the operations inside the engine's update by kind, which their names tell.

    Args:
        events: of torch's profiler.
        attribute: the time that counts, of the CPU or of the device.
    """
    every = list(events)
    updates = [event for event in every if event.name == _UPDATE]
    kinds = dict.fromkeys((*_KINDS, "other"), 0.0)
    for update in updates:
        span = update.time_range
        inside = [e for e in every if span.start <= e.time_range.start and e.time_range.end <= span.end]
        for event in inside:
            if event is not update and event.name.startswith("aten::"):
                kind = next((k for k, words in _KINDS.items() if any(w in event.name for w in words)), "other")
                kinds[kind] += float(getattr(event, attribute)) / 1e6
    return kinds
