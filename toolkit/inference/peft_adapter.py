"""Lay the adapters of a directory that peft wrote onto a base model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from toolkit.mask.adapters import Adapter, adapted_weight
from toolkit.mask.apply import add_adapters, merge_adapters, parameters_by_name, untie_head
from toolkit.models.exaone import llama_name
from toolkit.models.load import LoadedModel
from toolkit.runtime.errors import CheckpointError
from toolkit.runtime.safetensors_io import SafetensorsFile

log = logging.getLogger("frostline")

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"


def is_peft_adapter(directory: Path) -> bool:
    """Return True for a directory that peft's ``save_pretrained`` wrote."""
    return (directory / _CONFIG).is_file()


@torch.no_grad()
def apply_peft_adapter(loaded: LoadedModel, directory: Path) -> None:
    """Merge the adapters in ``directory`` into the model, in float32 and rounded once, and copy ``modules_to_save``.

    Args:
        loaded: the base model, changed in place; EXAONE may be the equivalent Llama.
        directory: adapter_config.json and adapter_model.safetensors.

    Raises:
        CheckpointError: a file is missing or damaged, it is no LoRA, or it does not fit the model.
    """
    config, tensors = _read(directory)
    model = loaded.model
    if loaded.anatomy.tied_head and f"{loaded.anatomy.head}.weight" in tensors:
        untie_head(model, loaded.anatomy)
    adapters = _adapters(config, tensors)
    layers = {f"{module}.weight" for adapter in adapters for module in adapter.modules}
    weights = loaded.anatomy.by_name
    wrong = [name for name in layers if name not in weights or weights[name].linear is None]
    if not wrong:
        add_adapters(model, adapters, seed=0)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters_by_name(model).items()}
        wrong = [name for name, tensor in tensors.items() if shapes.get(name) != tuple(tensor.shape)]
    if wrong:
        raise CheckpointError(
            f"{directory} does not fit {model.config.name_or_path or type(model).__name__}: {wrong[0]} and "
            f"{len(wrong) - 1} more of its {len(tensors)} tensors are not there, or have another shape; expected the "
            f"base model that it was trained on ({config.base_model_name_or_path}), and LoRA, rsLoRA or DoRA on linear "
            "layers"
        )
    parameters = parameters_by_name(model)
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
    merge_adapters(model, tensors)
    log.info(
        "model.delta: the adapters of %s are merged into %d layers", directory, sum(len(a.modules) for a in adapters)
    )


def _read(directory: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return peft's configuration, and the tensors by the names that they have in a model with adapters.

    Raises:
        CheckpointError: a file is missing or damaged, or it is no LoRA.
    """
    from peft import LoraConfig, PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(directory))
        file = SafetensorsFile(directory / _TENSORS)
        stored = {name: file.tensor(name) for name in file.entries}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{directory} is not a readable peft adapter ({type(error).__name__}: {error}); expected {_CONFIG} and "
            f"{_TENSORS}"
        ) from None
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{directory} holds a {config.peft_type}; expected LoRA, rsLoRA or DoRA")
    return config, {_model_name(name): tensor for name, tensor in stored.items()}


def _model_name(name: str) -> str:
    """Return the name of a tensor of peft's file in a model with adapters."""
    module, is_adapter, rest = llama_name(name.removeprefix("base_model.model.")).partition(".lora_")
    if not is_adapter:
        return module
    return f"{module}.lora_{rest.removesuffix('.weight')}.default.weight"


def _adapters(config: Any, tensors: Mapping[str, torch.Tensor]) -> list[Adapter]:
    """Return an adapter for each rank and alpha, beside the layers of ``tensors``."""
    from peft.utils.other import get_pattern_key

    found: dict[tuple[int, int], list[str]] = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.default.weight"):
            module = adapted_weight(name).removesuffix(".weight")
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
            found.setdefault((tensor.shape[0], alpha), []).append(module)
    return [
        Adapter(tuple(modules), rank, alpha, 0.0, bool(config.use_rslora), bool(config.use_dora), "kaiming")
        for (rank, alpha), modules in found.items()
    ]
