"""Find out whether two computations give the same tensor, with weights or without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def same_computation(first: Callable[[], torch.Tensor], second: Callable[[], torch.Tensor], on_meta: bool) -> bool:
    """Return whether both give the same tensor bit for bit; on the meta device, if they call the same operators."""
    return _operator_calls(first) == _operator_calls(second) if on_meta else torch.equal(first(), second())


def _operator_calls(compute: Callable[[], torch.Tensor]) -> Counter[Any]:
    count = _OperatorCount()
    with count:
        compute()
    return count.calls


class _OperatorCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the calls of each operator that computes; views do not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.calls[func] += 1
        return func(*args, **(kwargs or {}))
