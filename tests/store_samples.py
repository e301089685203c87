"""What the tests of the activation store share: samples whose values follow from their number."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from toolkit.activation_cache.namespace import Namespace, sample_key
from toolkit.activation_cache.store import ActivationStore

WIDTH = 8
NAMESPACE = Namespace({"weights": "0123", "boundary": "26"}, WIDTH, torch.bfloat16)


def key(number: int) -> str:
    return sample_key([number, 7])


def value(number: int, version: int = 0, namespace: Namespace = NAMESPACE) -> torch.Tensor:
    """Sample ``number``'s activations: 1 to 5 tokens."""
    generator = torch.Generator().manual_seed(1000 * version + number)
    return torch.randn(1 + number % 5, namespace.width, generator=generator).to(namespace.dtype)


def samples(numbers: Iterable[int]) -> dict[str, torch.Tensor]:
    return {key(number): value(number) for number in numbers}


def open_store(root: Path, namespace: Namespace = NAMESPACE, limit: int | None = None) -> ActivationStore:
    return ActivationStore(root, namespace, limit, keep_free_bytes=0)


def same(found: torch.Tensor | None, expected: torch.Tensor) -> bool:
    """Bit-identical, shape and dtype included."""
    return (
        found is not None
        and (found.dtype, found.shape) == (expected.dtype, expected.shape)
        and torch.equal(found, expected)
    )


def put(path: Path, content: bytes) -> None:
    """Write a file with a modification time that no earlier file has, however coarse the file system's clock."""
    path.write_bytes(content)
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def shards(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.safetensors"))


def size_of(root: Path) -> int:
    """Bytes of all shards."""
    return sum(path.stat().st_size for path in shards(root))


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.glob("*/.*")]
