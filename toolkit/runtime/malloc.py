"""Tell the C library how to keep memory between one tensor on a CPU and the next."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Keep freed blocks for the next ones, also large ones; does nothing where the C library is not glibc.

    glibc gives a block of more than 32 MiB back at once, and the next is new memory, page fault by page fault. The
    gradient of a head and ZeRO's float32 copies are such blocks, in every step.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def release_free_memory() -> None:
    """Return freed memory to the kernel; does nothing where the C library is not glibc.

    glibc keeps what lies between blocks that are in use: 100 MiB after a model of 135M parameters was loaded and cut.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
