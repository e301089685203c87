"""Identify a model by a hash of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from toolkit.models.disk_offload import OnDisk


def fingerprint(model: nn.Module, on_disk: Mapping[str, OnDisk] | None = None) -> str:
    """Return the ``fingerprint_of`` every parameter, tied ones once; it identifies a base model as it was loaded."""
    return fingerprint_of(dict(model.named_parameters()), on_disk)


def fingerprint_of(tensors: Mapping[str, torch.Tensor], on_disk: Mapping[str, OnDisk] | None = None) -> str:
    """Hash name, dtype, shape and bytes of ``tensors`` in the order of their names (SHA-256, as hex digits).

    Those of ``on_disk`` are read one by one and not kept in memory.
    """

    def digest(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        stored = on_disk.get(name) if on_disk else None
        if stored is not None:
            tensor = stored.read()
        sha = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        if stored is not None:
            stored.file.advise([stored.name], needed=False)
        return sha.digest()

    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(digest, sorted(tensors.items())))
    return hashlib.sha256(b"".join(digests)).hexdigest()
