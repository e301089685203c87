"""Read and write deltas: the trained tensors, the mask that selected them, and the base model they belong to.

A delta is a directory with ``trained.safetensors`` (float32 masters unless exported otherwise), ``mask.json`` and
``base.json``. ``launch/export.py --delta`` writes one; a checkpoint has the two JSON files, and the tensors in shards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from toolkit.config.schema import ModelConfig
from toolkit.mask.layer_mask import LayerMask
from toolkit.runtime.errors import CheckpointError
from toolkit.runtime.paths import read_regular
from toolkit.runtime.safetensors_io import SafetensorsFile, write_safetensors

MASK_FILE, BASE_FILE = "mask.json", "base.json"
_TENSORS_FILE = "trained.safetensors"
_LONGEST_JSON = 2**28  # bytes; a mask lists the ids of its rows


@dataclass(frozen=True)
class Base:
    """The base model of a delta."""

    config: ModelConfig
    """The recipe's model section that it was loaded with."""
    sha256: str
    """SHA-256 of its weights as loaded, before untying and training (``toolkit.models.weight_fingerprint``)."""
    identity: Mapping[str, Any] | None = None
    """Its other parts (``toolkit.checkpoint.base_identity``); None if an earlier version recorded it."""


@dataclass(frozen=True)
class Delta:
    """The trained tensors with their mask and base model."""

    tensors: dict[str, torch.Tensor]
    mask: LayerMask
    base: Base


def save_delta(delta: Delta, directory: Path) -> None:
    """Write ``delta`` into ``directory``, which is created if missing."""
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / _TENSORS_FILE, delta.tensors)
    delta.mask.save(directory / MASK_FILE)
    (directory / BASE_FILE).write_text(json.dumps(base_as_dict(delta.base), indent=1), encoding="utf-8")


def base_as_dict(base: Base) -> dict[str, object]:
    """Return the content of ``base.json``; without added tokens, it is that of versions that knew none."""
    values = base.config.model_dump(mode="json")
    model = {key: value for key, value in values.items() if value or key != "add_tokens"}
    return {"model": model, "sha256": base.sha256, **({"identity": base.identity} if base.identity else {})}


def read_mask_and_base(directory: Path) -> tuple[LayerMask, Base]:
    """Read the mask and the base model of a delta or checkpoint.

    Raises:
        OSError, ValueError, KeyError, TypeError: a file is missing or damaged.
    """
    mask = LayerMask.from_dict(json.loads(read_regular(directory / MASK_FILE, _LONGEST_JSON)))
    base = json.loads(read_regular(directory / BASE_FILE, _LONGEST_JSON))
    identity = base.get("identity")
    return mask, Base(ModelConfig(**base["model"]), base["sha256"], dict(identity) if identity else None)


def is_delta(directory: Path) -> bool:
    """Return True for a directory that ``save_delta`` wrote."""
    return (directory / BASE_FILE).is_file()


def read_delta(directory: Path) -> Delta:
    """Read the delta in ``directory``.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are not those of the mask.
    """
    try:
        mask, base = read_mask_and_base(directory)
        file = SafetensorsFile(directory / _TENSORS_FILE, writable=True)
        tensors = {name: file.tensor(name) for name in file.entries}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{directory} is not a readable delta ({type(error).__name__}: {error}); "
            f"expected {_TENSORS_FILE}, {MASK_FILE} and {BASE_FILE}"
        ) from None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {tensor.name: tensor.shape for tensor in mask.trainable}:
        raise CheckpointError(
            f"{directory}: {_TENSORS_FILE} does not hold the tensors that {MASK_FILE} lists; the delta is damaged"
        )
    return Delta(tensors, mask, base)


def mask_difference(saved: LayerMask, own: LayerMask) -> str | None:
    """Return how a checkpoint's mask differs from this run's; None if they are equal."""
    if saved == own:
        return None
    only_saved = [name for name in saved.names if name not in own.names]
    only_own = [name for name in own.names if name not in saved.names]
    if not only_saved and not only_own:
        return "the same names with other shapes, order, untying or base_precision"
    return (
        f"{len(only_saved)} tensors only there ({', '.join(only_saved[:2])} …), "
        f"{len(only_own)} only in this run ({', '.join(only_own[:2])} …)"
    )
