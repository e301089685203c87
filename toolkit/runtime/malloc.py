"""Configure when glibc returns freed CPU memory to the kernel."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameters of mallopt, from malloc.h


def keep_freed_memory() -> None:
    """Keep freed blocks of any size for reuse; does nothing if the C library is not glibc.

    By default glibc unmaps a freed block of more than 32 MiB at once, and the next one costs a page fault per page. The
    gradient of the head and ZeRO's fp32 copies are such blocks, in every step.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def release_free_memory() -> None:
    """Return freed memory to the kernel; does nothing if the C library is not glibc.

    glibc keeps freed memory that lies between blocks in use: 100 MiB after a model of 135M parameters
    was loaded and its frozen prefix dropped.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
