"""Spare a run the compiler that DeepSpeed imports for an optimizer that no run here uses."""

from __future__ import annotations

import contextlib
import os
from importlib import import_module


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon (arXiv 2502.16982) before ``deepspeed.initialize`` does, without torch's compiler.

    DeepSpeed (0.19) imports it to compare classes with it; it is decorated with ``torch.compile``, which imports
    Inductor: a second of processor time on every rank. Can go when DeepSpeed imports it only where it is used.
    """
    name = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with contextlib.suppress(ImportError):
            import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
