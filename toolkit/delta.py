"""A delta: the trained tensors, the mask that chose them, and the base model they belong to.

A directory with ``trained.safetensors`` (float32 masters unless exported otherwise), ``mask.json`` and ``base.json``.
Checkpoints hold one; ``launch/export.py --delta`` writes one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from toolkit.config.schema import ModelConfig
from toolkit.errors import CheckpointError, ModelError
from toolkit.mask.apply import apply_mask, trainable_parameters
from toolkit.mask.layer_mask import LayerMask
from toolkit.models.load import LoadedModel, fingerprint, load

_TENSORS, _MASK, _BASE = "trained.safetensors", "mask.json", "base.json"


@dataclass(frozen=True)
class Base:
    """The identity of the model a delta belongs to."""

    config: ModelConfig
    """How it was loaded."""
    sha256: str
    """Of its weights as loaded, before untying and training (``toolkit.models.load.fingerprint``)."""


@dataclass(frozen=True)
class Delta:
    """What training changed."""

    tensors: dict[str, torch.Tensor]
    mask: LayerMask
    base: Base


def save_delta(delta: Delta, directory: Path) -> None:
    """Write ``delta`` into ``directory``, which is created."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in delta.tensors.items()}, directory / _TENSORS)
    delta.mask.save(directory / _MASK)
    base = {"model": delta.base.config.model_dump(mode="json"), "sha256": delta.base.sha256}
    (directory / _BASE).write_text(json.dumps(base, indent=1), encoding="utf-8")


def is_delta(directory: Path) -> bool:
    """True for a directory that ``save_delta`` wrote."""
    return (directory / _BASE).is_file()


def read_delta(directory: Path) -> Delta:
    """The delta in ``directory``.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors and mask do not agree.
    """
    try:
        mask = LayerMask.from_dict(json.loads((directory / _MASK).read_text(encoding="utf-8")))
        base = json.loads((directory / _BASE).read_text(encoding="utf-8"))
        tensors = load_file(directory / _TENSORS)
        delta = Delta(tensors, mask, Base(ModelConfig(**base["model"]), base["sha256"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory} is not a readable delta ({type(error).__name__}: {error}); "
            f"expected {_TENSORS}, {_MASK} and {_BASE}"
        ) from None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {tensor.name: tensor.shape for tensor in mask.trainable}:
        raise CheckpointError(
            f"{directory}: {_TENSORS} does not hold the tensors that {_MASK} lists; the delta is damaged"
        )
    return delta


def load_delta(directory: Path, base: str | None = None, trust_remote_code: bool = False) -> LoadedModel:
    """The base model with the delta's tensors in place, in the base's precision.

    Args:
        directory: the delta.
        base: where the base model is, if no longer where it was trained from.
        trust_remote_code: run the code that ships with the base model, if the delta was trained with it.

    Raises:
        CheckpointError: damaged, or the base model's weights are not those the delta was trained on.
        ModelError: the base model cannot be loaded, or only with code of its own.
    """
    delta = read_delta(directory)
    config = delta.base.config.model_copy(update={"name_or_path": base} if base else {})
    if config.trust_remote_code and not trust_remote_code:
        raise ModelError(
            f"{directory} was trained on {config.name_or_path} with its own code (model.trust_remote_code), and "
            "whoever wrote the delta chose that; if you have read that code, pass --trust-remote-code"
        )
    loaded = load(config)
    if fingerprint(loaded.model) != delta.base.sha256:
        raise CheckpointError(
            f"{directory} was trained on other weights than {config.name_or_path} holds now (SHA-256 differs); "
            "pass the original model with --base"
        )
    apply_mask(loaded.model, delta.mask, loaded.anatomy)
    parameters = trainable_parameters(loaded.model, delta.mask)
    with torch.no_grad():
        for name, tensor in delta.tensors.items():
            parameters[name].copy_(tensor)
    return loaded


def describe_difference(found: LayerMask, expected: LayerMask) -> str | None:
    """How two masks differ, or none if they are the same tensors in the same order."""
    if asdict(found) == asdict(expected):
        return None
    only_found = [name for name in found.names if name not in expected.names]
    only_expected = [name for name in expected.names if name not in found.names]
    return (
        f"{len(only_found)} tensors only there ({', '.join(only_found[:2])} …), "
        f"{len(only_expected)} only in this run ({', '.join(only_expected[:2])} …)"
        if only_found or only_expected
        else "the same names with other shapes, order or untying"
    )
