"""Read a model's safetensors files, and write its weights under the names of its source."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.models.source_files import SourceFiles
from toolkit.runtime.errors import ModelError
from toolkit.runtime.printable import one_line
from toolkit.runtime.safetensors_io import FLOATS, SafetensorsFile, write_safetensors

MAX_SHARD_BYTES = 5_000_000_000
"""Most bytes of one safetensors file; a larger model is written in several, with an index."""


def open_weights(file: Path) -> SafetensorsFile:
    """Map a model's safetensors file read-only, or raise ModelError if it is none."""
    try:
        return SafetensorsFile(file)
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is not a readable safetensors file ({error}); download it again") from None


class StoredTensors:
    """The tensors of a checkpoint by name, mapped from those safetensors files that ``from_pretrained`` reads.

    Raises:
        ModelError: a file is not in that format.
    """

    def __init__(self, files: SourceFiles) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self._file: dict[str, SafetensorsFile] = {}
        paths = [files.find("model.safetensors")]
        if paths == [None]:
            shards = files.read_json("model.safetensors.index.json").get("weight_map") or {}
            paths = [files.find(name) for name in dict.fromkeys(map(str, shards.values()))]
        for file in map(open_weights, filter(None, paths)):
            self.entries |= file.entries
            self._file |= dict.fromkeys(file.entries, file)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor as it is stored: a view of the file, which must not be written to."""
        return self._file[name].tensor(name)

    @property
    def are_unquantised(self) -> bool:
        """Return True if every tensor is floating point of 16 bits or more; quantised codes are integers or 8 bits."""
        return bool(self.entries) and all(entry["dtype"] in FLOATS for entry in self.entries.values())


@dataclass(frozen=True)
class WeightComparison:
    """Comparison of written tensors with the stored ones that they come from: counts, or names."""

    identical: int = 0
    """Number with the same bits."""
    same_values: int = 0
    """Number with the same values in another precision."""
    rounded: int = 0
    """Number whose values are the stored ones, rounded to another precision."""
    changed: tuple[str, ...] = ()
    """Names of those with other values."""
    added: tuple[str, ...] = ()
    """Names that the source does not have."""
    carried: tuple[str, ...] = ()
    """Names of those that the model does not use, written as they are."""


StateTransform = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
"""Maps a state dict to one with other names or layouts."""


def write_weights(
    model: PreTrainedModel,
    stored: StoredTensors,
    model_names: dict[str, str],
    to_stored_layout: StateTransform,
    directory: Path,
) -> WeightComparison:
    """Write the weights of ``model`` as safetensors under the names of the source; compare them with the source's.

    A tensor that is stored under two names (a tied head) is written under both again. One that the model does not use
    is carried as it is.

    Args:
        model: the model, none of its weights on the meta device.
        stored: tensors of the source.
        model_names: each stored name, mapped to the model's name of it, whether the model has it or not.
        to_stored_layout: maps the model's state dict to stored names and shapes, but for the base model's prefix.
        directory: target directory, which exists.

    Raises:
        OSError: the disk is full or refuses.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    tensors = _tensors_by_stored_name(model, state, stored, model_names, to_stored_layout)
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        kinds[_compare(tensor, stored.read(name)) if name in stored.entries else "added"].append(name)
    carried = sorted({name for name, model_name in model_names.items() if model_name not in state} - tensors.keys())
    _write_shards(tensors | {name: stored.read(name) for name in carried}, directory)
    return WeightComparison(
        len(kinds["identical"]), len(kinds["same_values"]), len(kinds["rounded"]),
        tuple(kinds["changed"]), tuple(kinds["added"]), tuple(carried),
    )  # fmt: skip


def _write_shards(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Write tensors in files of at most ``MAX_SHARD_BYTES``, as ``save_pretrained`` does.

    huggingface_hub's own writer refuses tensors that are slices, as those of a stack of experts are.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    many, index = len(shards) > 1, {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
        write_safetensors(directory / file, {name: tensors[name] for name in names}, {"format": "pt"})
        index.update(dict.fromkeys(names, file))
    if many:
        total = sum(tensor.nbytes for tensor in tensors.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (directory / "model.safetensors.index.json").write_text(f"{text}\n", encoding="utf-8")


def _tensors_by_stored_name(
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    stored: StoredTensors,
    model_names: dict[str, str],
    to_stored_layout: StateTransform,
) -> dict[str, torch.Tensor]:
    """Return the tensors of the model's ``state`` dict under the names of the source; see ``write_weights``."""
    names_of: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of[parameter].append(name)
    tied = {name: names for names in names_of.values() if len(names) > 1 for name in names}
    known_names = set(model_names.values())
    canonical = {
        name: next((other for other in names if other in known_names), names[0]) for name, names in tied.items()
    }
    saved = to_stored_layout({name: tensor for name, tensor in state.items() if canonical.get(name, name) == name})
    for name in model._keys_to_ignore_on_save or ():
        if name not in stored.entries:
            saved.pop(name, None)
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    names = {name: _stored_name(name, prefix, stored) for name in saved}
    if None in names.values():  # readers give all names the base model's prefix or none: a new head needs it
        names = {name: name for name in saved}
    tensors = {names[name] or name: tensor for name, tensor in saved.items()}
    for name, model_name in model_names.items():
        if name not in tensors and model_name in tied and f"{prefix}{name}" not in tensors:
            tensors[name] = state[model_name].clone()
    return tensors


def _stored_name(name: str, prefix: str, stored: StoredTensors) -> str | None:
    """Return a tensor's name in the checkpoint, with or without the base model's prefix; None if it is not there."""
    variants = (name, name.removeprefix(prefix), f"{prefix}{name}")
    return next((variant for variant in variants if variant in stored.entries), None)


def _compare(written: torch.Tensor, stored: torch.Tensor) -> str:
    """Return the kind of a written tensor, a field of ``WeightComparison``, against the stored tensor of its name."""
    if written.shape != stored.shape:
        return "changed"
    if written.dtype == stored.dtype and torch.equal(_raw_bytes(written), _raw_bytes(stored)):
        return "identical"
    common = torch.promote_types(written.dtype, stored.dtype)
    if torch.equal(written.to(common), stored.to(common)):
        return "same_values"
    roundings = (written.dtype, torch.bfloat16, torch.float16)
    if any(torch.equal(written, stored.to(dtype).to(written.dtype)) for dtype in roundings):
        return "rounded"
    return "changed"


def _raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor; comparing these tells -0.0 from 0.0, and finds NaN equal to itself."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def join_names(names: Iterable[str], most: int = 12) -> str:
    """Join names for a message; names that differ only in their numbers are given once, with their count."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in map(one_line, names):  # a file's own names are a stranger's
        groups[re.sub(r"\d+", "N", name)].append(name)
    texts = [group[0] if len(group) == 1 else f"{pattern} ({len(group)} times)" for pattern, group in groups.items()]
    more = f" and {len(texts) - most} more kinds" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
