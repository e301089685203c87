"""Turn a failed allocation into one clear error that says what the run was doing, whichever allocator failed."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from toolkit.runtime.errors import OutOfMemoryError

_SAID = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|unable to allocate|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
"""What CUDA, the CPU allocator (a plain RuntimeError in torch 2.13), the system, NumPy and cuBLAS say."""


@contextmanager
def during(phase: str, shape: str | None = None) -> Iterator[None]:
    """Turn a failed allocation of the body into ``OutOfMemoryError``; the innermost of several has the word.

    Args:
        phase: what the body does, as a phrase.
        shape: rows x tokens of the micro batch, where there is one.

    Raises:
        OutOfMemoryError: an allocation failed.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(phase, shape, _first_sentence(error)) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if ``error`` says that an allocation failed, of the device (torch's) or of the host."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_SAID.search(str(error))))


def _first_sentence(error: BaseException) -> str:
    """Return the allocator's own words without its advice and stack."""
    text = " ".join(str(error).split()) or type(error).__name__
    said = re.search(r"DefaultCPUAllocator: .*?bytes|.*?\. (?=GPU|Of the|See|If)", text)
    text = said[0].strip() if said else text
    return text if len(text) <= 200 else f"{text[:200]}…"
