"""Keep frozen weights on disk: a model's lower blocks in its own files, or tensors in a file of ours."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

from toolkit.models.anatomy import Anatomy
from toolkit.models.weight_files import open_weights
from toolkit.runtime.cache_root import cache_root
from toolkit.runtime.errors import ModelError
from toolkit.runtime.safetensors_io import SafetensorsFile, write_safetensors


@dataclass(frozen=True)
class OnDisk:
    """A tensor of a mapped safetensors file."""

    file: SafetensorsFile
    name: str
    """Name of the tensor in the file."""
    dtype: torch.dtype
    """Precision that ``read`` converts it to."""

    def read(self) -> torch.Tensor:
        """Return the tensor; a view of the file if that has the same precision."""
        return self.file.tensor(self.name).to(self.dtype)

    @property
    def nbytes(self) -> int:
        """Return the bytes that it takes in the file."""
        begin, end = self.file.entries[self.name]["data_offsets"]
        return int(end - begin)


def device_map(anatomy: Anatomy, blocks_on_disk: int) -> dict[str, str]:
    """Return ``from_pretrained``'s device map: the first blocks on disk, everything else on the CPU.

    Every block has an entry of its own, because transformers takes a name for the start of one (``layers.1`` for that
    of ``layers.10``) unless a longer one fits. There is none for the whole model: accelerate would place all of it.
    """
    others = {tensor.name.rpartition(".")[0]: "cpu" for tensor in anatomy.tensors if tensor.block is None}
    blocks = {
        f"{anatomy.blocks}.{index}": "disk" if index < blocks_on_disk else "cpu" for index in range(anatomy.block_count)
    }
    return others | blocks


@contextmanager
def silence_accelerate() -> Iterator[None]:
    """Suppress accelerate's warning about parameters on the meta device, which are meant to be there."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def detach_offloaded(model: nn.Module) -> dict[str, OnDisk]:
    """Return the parameters that were left on disk; remove accelerate's hooks, which would load them."""
    index = _offload_index(model)
    remove_hook_from_submodules(model)
    for attribute in ("to", "cuda", "hf_device_map"):  # accelerate's guards on the instance
        vars(model).pop(attribute, None)
    for module in model.modules():  # accelerate puts the method back, but on the instance, where copies would find it
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward
    open_once = cache(open_weights)
    return {
        name: OnDisk(open_once(Path(index[name]["safetensors_file"])), index[name]["weight_name"], parameter.dtype)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.is_meta
    }


def _offload_index(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the index of accelerate's offloaded weights: name to safetensors_file, weight_name and dtype."""
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        while weights is not None and not hasattr(weights, "index"):
            weights = getattr(weights, "dataset", None)
        if weights is not None:
            index: dict[str, dict[str, Any]] = weights.index
            return index
    return {}


def to_meta(module: nn.Module, name: str) -> None:
    """Move a parameter to the meta device: its memory is freed; shape and precision stay."""
    owner, _, leaf = name.rpartition(".")
    parameter = module.get_parameter(name)
    empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    module.get_submodule(owner)._parameters[leaf] = empty


def offload_to_disk(tensors: Mapping[str, torch.Tensor]) -> dict[str, OnDisk]:
    """Write tensors into a file of the cache directory and leave them there.

    The file has no name any more when this returns: its space is free again as soon as the process ends, however it
    ends.

    Raises:
        ModelError: the file cannot be written.
    """
    root = cache_root()
    size = sum(tensor.nbytes for tensor in tensors.values())
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".offload-", dir=root) as folder:
            path = Path(folder) / "weights.safetensors"
            write_safetensors(path, tensors)
            file = SafetensorsFile(path)
    except OSError as error:
        raise ModelError(
            f"{size / 2**20:.0f} MiB of weights could not be written to {root} ({error}); free space there, or name "
            "another directory in FROSTLINE_CACHE"
        ) from None
    return {name: OnDisk(file, name, tensor.dtype) for name, tensor in tensors.items()}
