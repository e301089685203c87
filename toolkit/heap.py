"""Memory that the C library holds on to after tensors on a CPU are freed."""

from __future__ import annotations

import contextlib
import ctypes


def give_back() -> None:
    """Return freed memory to the kernel; does nothing where the C library is not glibc.

    glibc keeps what lies between blocks that are in use: 100 MiB after a model of 135M parameters was loaded and cut.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
