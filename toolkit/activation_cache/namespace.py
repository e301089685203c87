"""Identify stored activations: by the computation that gave them, and the sample they belong to."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import torch

from toolkit.data.sample_key import sample_key as sample_key

FORMAT = "frostline-activations-1"
"""Version of the shard layout; it is hashed into the namespace, so another version uses other directories."""
SHA256 = re.compile(r"[0-9a-f]{64}")
"""Pattern of a namespace's directory name, and of a sample's key."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that can be stored."""
_ENTRY_OVERHEAD = 512
"""Most bytes of an entry beside its data, those of a shard with a single entry."""

NAMESPACE_FILE = "namespace.json"
"""In the directory of a namespace: the text that its hash is of."""


@dataclass(frozen=True)
class Namespace:
    """The computation that activations come from; runs share stored ones if and only if all of it is the same."""

    identity: Mapping[str, str]
    """All that a value depends on: hash of the weights, boundary, attention implementation, versions, device …"""
    width: int
    """H, the size of one hidden state."""
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype} of activations; expected one of {', '.join(map(str, DTYPES))}")
        if self.width < 1:
            raise ValueError(f"width {self.width} of activations; expected at least 1")

    @cached_property
    def text(self) -> str:
        """Return the identity as JSON with sorted keys, for people and for the hash."""
        tensor_form = {"width": self.width, "dtype": str(self.dtype).removeprefix("torch.")}
        return json.dumps({"format": FORMAT, **tensor_form, "identity": dict(self.identity)}, indent=1, sort_keys=True)

    @cached_property
    def sha256(self) -> str:
        """Return the SHA-256 of ``text``: the name of the namespace's directory."""
        return sha256(self.text.encode()).hexdigest()

    def check(self, key: str, tensor: torch.Tensor) -> None:
        """Refuse a key or tensor that does not fit the namespace.

        Raises:
            ValueError: the key is no SHA-256, or the tensor is not [T, width] with T > 0, or has another dtype.
        """
        if not SHA256.fullmatch(key):
            raise ValueError(f"key {key!r} of an activation; expected 64 hexadecimal digits from sample_key")
        if tensor.dtype != self.dtype or tensor.ndim != 2 or tensor.shape[1] != self.width or not tensor.shape[0]:
            raise ValueError(
                f"activation of shape {list(tensor.shape)} in {tensor.dtype}; "
                f"expected [tokens, {self.width}] in {self.dtype}"
            )


def bytes_of(tokens: int, samples: int, width: int, dtype: torch.dtype) -> int:
    """Return the most bytes that ``samples`` entries, with ``tokens`` tokens in all, take on disk."""
    return tokens * width * dtype.itemsize + samples * _ENTRY_OVERHEAD
