"""Turn a failed allocation of any allocator into one error that says what the run was doing."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from toolkit.runtime.errors import OutOfMemoryError

_OUT_OF_MEMORY_TEXT = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|unable to allocate|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
"""Matches the messages of CUDA, torch's CPU allocator (a plain RuntimeError in 2.13), the system, NumPy and cuBLAS."""


@contextmanager
def explain_out_of_memory(phase: str, shape: str | None = None, advice: str | None = None) -> Iterator[None]:
    """Turn a failed allocation of the body into ``OutOfMemoryError``; of nested blocks the innermost names the phase.

    ``phase`` is a phrase such as "the forward pass", ``shape`` the rows x tokens of the micro batch, ``advice`` the
    setting to change first.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(phase, shape, _first_sentence(error), advice) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if ``error`` reports a failed allocation, on the device or the host."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY_TEXT.search(str(error)))
    )


def _first_sentence(error: BaseException) -> str:
    """Return the first sentence of the allocator's message, without its advice and C++ stack."""
    text = " ".join(str(error).split()) or type(error).__name__
    sentence = re.search(r"DefaultCPUAllocator: .*?bytes|.*?\. (?=GPU|Of the|See|If)", text)
    text = sentence[0].strip() if sentence else text
    return text if len(text) <= 200 else f"{text[:200]}…"
