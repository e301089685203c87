"""Stand-ins for ``torch.cuda``, so that code which asks it sees one GPU on a machine without any. Not a test itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import bitsandbytes  # noqa: F401 - before a GPU appears, for which it would load parts that need a real one
import torch

CUDA = torch.device("cuda", 0)


class _Event:
    """``torch.cuda.Event`` that is always reached; to wait for it on the host is a wait."""

    wait_on_host: Callable[[str], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _Event.wait_on_host("event.synchronize")


class _Stream(_Event):
    """``torch.cuda.Stream`` on which nothing happens."""

    device = CUDA

    def wait_event(self, event: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def record_event(self, *args: Any) -> _Event:
        return _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Take the kernel that CUDA takes: flash attention without a mask, else the memory-efficient one."""
    aten: Any = torch.ops.aten
    if key.shape[1] != query.shape[1]:
        repeat = query.shape[1] // key.shape[1]
        key, value = (t[:, :, None].expand(-1, -1, repeat, -1, -1).flatten(1, 2) for t in (key, value))
    if attn_mask is None and query.dtype != torch.float32:
        return first(aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], -1, -1)
    return first(
        aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )
    )


def first(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the attended values of an operator that returns more."""
    return outputs[0]


@contextlib.contextmanager
def one_gpu(wait: Callable[[str], None] = lambda what: None) -> Iterator[None]:
    """Let torch and this project see one GPU of 80 GiB; ``wait`` is called where the host would wait for it.

    Without fake tensors this is for what a run prepares on the host.
    """
    _Event.wait_on_host = staticmethod(wait)
    properties = mock.Mock(total_memory=80 * 2**30, multi_processor_count=132, major=9, minor=0)
    replaced: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "_lazy_init": lambda: None, "empty_cache": lambda: None,
        "set_device": lambda device: None, "manual_seed_all": lambda seed: None, "manual_seed": lambda seed: None,
        "synchronize": lambda *device: wait("cuda.synchronize"), "Stream": _Stream, "Event": _Event,
        "mem_get_info": lambda *device: (70 * 2**30, 80 * 2**30), "memory_allocated": lambda *device: 0,
        "max_memory_allocated": lambda *device: 0, "current_stream": lambda *device: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(), "get_device_properties": lambda *device: properties,
        "is_bf16_supported": lambda *args: True, "get_device_capability": lambda *device: (9, 0),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, replacement in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, replacement))
        yield
